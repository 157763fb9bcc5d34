"""A causal LM cut before its head: what a sampler and a learner run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from meal_fast.ops.gemm import linear


@dataclass(frozen=True)
class Network:
    """A decoder cut before its head: `body(input_ids, …)` gives hidden states (…, D)."""

    body: nn.Module
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    softcap: float | None
    runs: int = 1  # of each of the body's layers in a pass: so many keys and values a token

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """Layers, heads, and numbers of a head: the keys of one token, and its values."""
        config: Any = self.body.config
        text = config.get_text_config()
        queries = text.num_attention_heads
        heads = getattr(text, "num_key_value_heads", None) or queries
        return (
            text.num_hidden_layers * self.runs,
            1 if getattr(text, "multi_query", False) else heads,
            getattr(text, "head_dim", None) or text.hidden_size // queries,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute full logits of a few hidden states, (R, D) -> (R, V) float32: a sampler's.

        In bfloat16 too they are float32 sums that were never rounded, as `ops.linear_logprob`'s
        are: rounded ones put a token's log-probability off by up to 0.09.
        """
        if self.weight.dtype in (torch.float32, torch.float64):
            out = linear(hidden, self.weight, self.bias).float()
        elif self.weight.is_cuda:
            out = torch.mm(hidden, self.weight.t(), out_dtype=torch.float32)
            out = out if self.bias is None else out + self.bias
        else:
            out = linear(hidden.float(), *self._wide)
        return out if self.softcap is None else torch.tanh(out / self.softcap) * self.softcap

    @cached_property
    def _wide(self) -> tuple[Tensor, Tensor | None]:
        """A frozen head in float32, made once: a CPU has no product of half precision into it."""
        bias = None if self.bias is None else self.bias.detach().float()
        return self.weight.detach().float(), bias


def cut(model: Any) -> Network:
    """Cut a transformers causal LM into body and head."""
    head = model.get_output_embeddings()
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return Network(model.base_model, head.weight, getattr(head, "bias", None), softcap)
