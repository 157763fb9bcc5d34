"""What the ops with a head are measured against: the same loss by other means.

`eager` is always there; TRL, liger-kernel and cut-cross-entropy where they are installed. Each
rival takes a `Head` and gives the GRPO loss of its tokens (token mean, no KL), to go back through.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable

import torch
from torch import Tensor

from meal_fast import ops

Rival = Callable[["Head"], Tensor]


class Head:
    """Hidden states, a head, and what the loss needs to know of the tokens."""

    def __init__(
        self,
        sequences: int,
        length: int,
        width: int,
        vocabulary: int,
        *,
        frozen: bool = False,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(0)
        n = sequences * length
        self.sequences, self.length = sequences, length
        self.hidden = torch.randn(n, width, device=device, dtype=dtype, requires_grad=True)
        weight = 0.05 * torch.randn(vocabulary, width, device=device, dtype=dtype)
        self.weight = weight.requires_grad_(not frozen)
        self.target = torch.randint(0, vocabulary, (n,), device=device)
        self.per_sequence = torch.randn(sequences, device=device)
        self.advantage = self.per_sequence.repeat_interleave(length)

    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight) if x.requires_grad]


def surrogate(logp: Tensor, advantage: Tensor) -> Tensor:
    """The clipped loss of the behaviour policy's own tokens, in plain torch."""
    ratio = (logp - logp.detach()).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()


def meal_fast(head: Head, impl: str | None = None) -> Tensor:
    loss, _ = ops.linear_policy_loss(
        head.hidden, head.weight, head.target, head.advantage, reduce="dapo", impl=impl
    )
    return loss


def eager(head: Head) -> Tensor:
    log_p = (head.hidden @ head.weight.T).float().log_softmax(1)
    with torch.no_grad():  # for the log, as all of these make it
        torch.special.entr(log_p.exp()).sum(1)
    return surrogate(log_p.gather(1, head.target[:, None]).squeeze(1), head.advantage)


@functools.cache
def compiled() -> Rival:
    function = torch.compile(eager)
    return lambda head: function(head)


def trl(head: Head) -> Tensor:
    """TRL's default: whole logits, its log-probability and entropy of them."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    logits = head.hidden @ head.weight.T
    logp, _ = selective_log_softmax_and_entropy(logits, head.target, entropy_requires_grad=False)
    return surrogate(logp, head.advantage)


def trl_chunked(head: Head) -> Tensor:
    """TRL's fused head, tiles of 4,096 tokens by its own number of columns."""
    from trl.trainer import utils

    columns = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    logp, *_ = utils._ChunkedLogProbFunction.apply(
        head.hidden, head.weight, None, head.target, 1.0, columns, None, 1.0, ("entropy",)
    )
    return surrogate(logp, head.advantage)


def liger(head: Head) -> Tensor:
    """liger-kernel's GRPO loss, at its defaults; compiled on a GPU alone. It makes no entropy."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    function = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="dapo", compiled=head.hidden.is_cuda
    )
    shape = (head.sequences, head.length)
    mask = torch.ones(shape, dtype=torch.int64, device=head.hidden.device)
    hidden, target = head.hidden.view(*shape, -1), head.target.view(shape)
    loss, _ = function(hidden, head.weight, target, mask, head.per_sequence)
    return loss


def cut_cross_entropy(head: Head) -> Tensor:
    """Cut Cross-Entropy's kernel, with its filter of small gradients off. It makes no entropy."""
    from cut_cross_entropy import linear_cross_entropy

    loss = linear_cross_entropy(
        head.hidden, head.weight, head.target, reduction="none", filter_eps=None
    )
    return surrogate(-loss, head.advantage)


def installed(*, gpu: bool) -> dict[str, Rival]:
    """Those that run here, by name."""
    found: dict[str, Rival] = {"eager": eager}
    if gpu:
        found["torch.compile"] = compiled()
    # TRL looks for its trainers' other libraries, and may ask a hub, on import.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if importlib.util.find_spec("trl"):
        found |= {"trl": trl, "trl chunked": trl_chunked}
    if importlib.util.find_spec("liger_kernel") and importlib.util.find_spec("triton"):
        found["liger"] = liger
    if gpu and importlib.util.find_spec("cut_cross_entropy"):
        found["cut-cross-entropy"] = cut_cross_entropy
    return found
