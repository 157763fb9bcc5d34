"""OpenRLHF: its `log_probs_from_logits`, the same from hidden states, and preferences.

    from meal_fast.integrations.openrlhf import install
    install()        # in the process of the actor, before its first forward

OpenRLHF knows one scalar reward a response, and normalises it in the group itself (`group_norm`,
`dr_grpo`, `rloo`, …). So K rewards become one where they are made, in the reward function; the
preference w arrives there in the dataset's label column, the one that OpenRLHF hands on:

    {"input": "How do ... [helpful=0.80 harmless=0.20]", "label": {"preference": [0.8, 0.2]}}

    # my_reward.py, --reward.remote_url my_reward.py --data.label_key label
    def reward_func(queries, prompts, labels):                 # one of each at a time
        r, w = [helpful(queries[0]), harmless(queries[0])], labels[0]["preference"]
        score = float(preference_score([r], [w], utopia=[1.1, 1.1]))
        return {"rewards": score, "scores": score,
                "extra_logs": {"helpful": r[0], "harmless": r[1]}}

`log_probs_from_logits` is tested against the text of OpenRLHF 0.11.2's, on the CPU. `install` is
untested: OpenRLHF imports DeepSpeed, and runs on GPUs only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from meal_fast.ops import linear_logprob
from meal_fast.ops.checks import floating, positive, same_device, shape, targets_in_range
from meal_fast.ops.reference import compute_dtype
from meal_fast.ops.vocab_sweep import LogitsSource, Readout, sweep

from . import framework, preference_score

__all__ = ["install", "log_probs_from_hidden", "log_probs_from_logits", "preference_score"]


def install() -> None:
    """Put `log_probs_from_logits` into OpenRLHF's actor; ValueError where OpenRLHF is missing."""
    framework(
        "openrlhf.models.actor", "openrlhf>=0.11"
    ).log_probs_from_logits = log_probs_from_logits


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Give log softmax(logits / temperature) at the labels: (…, V), (…) → (…), float32.

    Made in tiles, so that nothing of the logits' size is allocated but their gradient; the logits
    stay as they are, where OpenRLHF's function divides them by the temperature in place.

    Raises:
        ValueError: shapes, a temperature, or on the CPU a label outside [0, V).
    """
    positive("temperature", temperature)
    floating("logits", logits)
    shape("labels", labels, tuple(logits.shape[:-1]))
    same_device("logits", logits, labels=labels)
    target = labels.reshape(-1).long()
    if target.device.type == "cpu":
        targets_in_range(target, torch.ones_like(target, dtype=torch.bool), logits.shape[-1])
    rows = logits.reshape(-1, logits.shape[-1])
    return _LogProbs.apply(rows, target, Readout(temperature, None)).view(labels.shape)


def log_probs_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    *,
    bias: Tensor | None = None,
) -> Tensor:
    """`log_probs_from_logits(hidden @ weightᵀ + bias, …)` without the logits: `linear_logprob`.

    hidden: (N, D) or (B, T, D); weight: (V, D); labels: (N,) or (B, T). For an actor of one's own,
    whose forward stops at the last hidden state.
    """
    logp, _ = linear_logprob(hidden, weight, labels, temperature=temperature, bias=bias)
    return logp


class _LogProbs(torch.autograd.Function):
    """Log-probabilities of rows of logits; going back makes the softmax again, tile by tile."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, readout: Readout) -> Tensor:
        ctx.save_for_backward(logits, target)
        ctx.readout = readout
        source = LogitsSource(logits, readout, compute_dtype(logits), needs=False)
        return sweep(source, target).logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None]:
        logits, target = ctx.saved_tensors
        source = LogitsSource(logits, ctx.readout, compute_dtype(logits), needs=True)
        sweep(source, target, gradient=lambda rows, _: (upstream[rows], None, None))
        return source.grad_logits, None, None
