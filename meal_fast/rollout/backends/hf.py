"""The backend `generate`: transformers' own, every row by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from meal_fast import ops
from meal_fast.common import require
from meal_fast.models.network import Network, cut
from meal_fast.models.policy import Policy
from meal_fast.models.shared_prefix import pad

from ..sequence import Drawn, Sampling, Tokens
from .plain import Plain


class Generate(Plain):
    """Samples by transformers' `generate`, in batches of `max_rows` rows padded on the left.

    Attention is transformers' own, adapters stay apart, a row's prompt is computed anew for every
    sample, and no row leaves its batch before the last has ended. The tokens are drawn by
    `ops.sample` under the same (seed, row id, position), so they equal the engine's up to the
    rounding of the logits.
    """

    name: ClassVar[str] = "generate"

    def __init__(self, policy: Policy, model: Any, max_rows: int) -> None:
        super().__init__(policy)
        self.model, self.max_rows = model, max_rows

    def drawn(
        self,
        prefixes: Sequence[Tokens],
        row_ids: Sequence[int],
        tasks: Sequence[int],
        sampling: Sampling,
        ended: Callable[[int], None],
    ) -> tuple[list[Drawn], int]:
        """Draw batch by batch: see `Plain.drawn`."""
        device, stop = self.policy.device, sorted(self.policy.stop_ids)
        drawn: list[Drawn] = []
        for low in range(0, len(row_ids), self.max_rows):
            part = slice(low, low + self.max_rows)
            draw = _Draw(row_ids[part], sampling, device)
            # Reversed, padded on the right, and reversed again: padded on the left.
            tokens_RP, valid_RP = pad([prefix[::-1] for prefix in prefixes[part]], device)
            out = self.model.generate(
                input_ids=tokens_RP.flip(1),
                attention_mask=valid_RP.flip(1).long(),
                generation_config=GenerationConfig(
                    max_new_tokens=sampling.max_new_tokens,
                    do_sample=False,  # the processor has drawn: one token is left
                    eos_token_id=stop or None,
                    pad_token_id=stop[0] if stop else 0,
                ),
                logits_processor=LogitsProcessorList([draw]),
            )
            sampled = out[:, tokens_RP.shape[1] :].tolist()
            logp = torch.stack(draw.logp, 1).tolist()
            drawn += [self.ended_at(t, lp, sampling) for t, lp in zip(sampled, logp, strict=True)]
            ended(len(drawn))
        return drawn, 0


@contextmanager
def open_generate(
    policy: Policy,
    *,
    network: Network | None = None,
    max_rows: int = 0,
    max_cache_bytes: int = 0,  # no effect: nothing is kept
    join: bool = False,  # likewise
    adapters: int = 1,  # likewise
) -> Iterator[Generate]:
    """Open transformers' `generate` on the policy's model, or on its reference's."""
    require(max_rows >= 0, "max_rows", max_rows, "0 (as suits the device) or positive")
    own = network is None or policy.causal_lm.base_model is network.body
    model = policy.causal_lm if own else policy.reference_lm
    with _plain(model):
        yield Generate(policy, model, max_rows or policy.sizes.slots)


class _Draw(LogitsProcessor):
    """Draws each row's token and leaves it alone possible."""

    def __init__(self, row_ids: Sequence[int], sampling: Sampling, device: torch.device) -> None:
        self.row, self.sampling = torch.tensor(row_ids, device=device), sampling
        self.logp: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token, logp, _ = ops.sample(
            scores,
            seed=self.sampling.seed,
            row=self.row,
            position=len(self.logp),
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
            min_p=self.sampling.min_p,
        )
        self.logp.append(logp)
        return torch.full_like(scores, float("-inf")).scatter_(1, token[:, None], 0.0)


@contextmanager
def _plain(model: Any) -> Iterator[None]:
    """Give it transformers' attention, none of the sampling options that the model came with, and
    logits that are not rounded to half precision."""
    attention, options = model.config._attn_implementation, model.generation_config
    model.generation_config = GenerationConfig()
    head, raw = model.get_output_embeddings(), replace(cut(model), softcap=None)

    def unrounded(hidden: Tensor) -> Tensor:
        return raw.logits(hidden.flatten(0, -2)).view(*hidden.shape[:-1], -1)

    if head.weight.dtype != torch.float32:
        head.forward = unrounded
    try:
        model.set_attn_implementation("sdpa")
        yield
    finally:
        model.set_attn_implementation(attention)
        model.generation_config = options
        vars(head).pop("forward", None)
