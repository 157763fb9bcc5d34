"""PARM's decoding: the frozen base model, guided at a preference w (Lin et al., 2025 [P]).

log pi(y_t) = log base(y_t) + 1/beta log guide_w(y_t) + constant
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from meal_fast.common import require_simplex
from meal_fast.data.preferences import Preference

from .pblora import Adapter
from .policy import Network, Policy, cut
from .shared_prefix import Pass


@dataclass(frozen=True)
class Guides:
    """A guide for every preference: `answers.Served`."""

    beta: float

    def groups(self, weights: Sequence[Preference]) -> list[list[int]]:
        """Group the places in `weights` that one guide serves."""
        found: dict[Preference, list[int]] = {}
        for place, w in enumerate(weights):
            found.setdefault(w, []).append(place)
        return list(found.values())

    def at(self, policy: Policy, w: Preference) -> AbstractContextManager[None]:
        """Guide the policy at w, within it: `guided`."""
        return guided(policy, w, self.beta)


@contextmanager
def guided(policy: Policy, w: Sequence[float], beta: float) -> Iterator[None]:
    """Guide the policy at w, within it: the engine samples from logits = base + guide(w) / beta.

    Raises ValueError for a policy without a guide, another number of objectives, beta <= 0.
    """
    adapter = policy.adapter
    if adapter is None:
        raise ValueError("policy: has no guide; policy.tuning=bilinear trains one")
    require_simplex(w, policy.names)
    if not beta > 0:
        raise ValueError(f"beta={beta}: must be positive; the guide's logits are divided by it")
    base = cut(policy.causal_lm)
    body = Guided(base.body, adapter, w, beta)
    bias = None if base.bias is None else base.bias * (1 + 1 / beta)
    with adapter.merged(body.w_K):
        policy.served = Network(body, base.weight, bias, None, runs=2)
        try:
            yield
        finally:
            policy.served = None


@dataclass(frozen=True)
class _Second:
    """A pass whose keys and values lie behind those of the first `layers` layers."""

    to: Pass
    layers: int

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return self.to.attend(self.layers + layer, query, key, value, scale)


class Guided(nn.Module):
    """Base and guide as one decoder body: hidden states h_base + h_guide(w) / beta.

    Both have the base's head, so W h is the sum of their logits; sampling needs no normalisation of
    either, since log-softmax shifts all logits of a place alike. Each layer runs twice, and the
    guide's keys and values are those of layers L, L + 1, ... .
    """

    def __init__(self, body: Any, adapter: Adapter, w: Sequence[float], beta: float) -> None:
        super().__init__()
        self.body, self.adapter, self.beta, self.config = body, adapter, beta, body.config
        self.w_K = torch.tensor(list(w), device=next(body.parameters()).device)

    def forward(self, *, tree: Pass | None = None, **inputs: Any) -> BaseModelOutput:
        layers = self.config.get_text_config().num_hidden_layers
        second = None if tree is None else _Second(tree, layers)
        with self.adapter.at(None):
            base = self.body(tree=tree, **inputs).last_hidden_state
        with self.adapter.at(self.w_K):
            guide = self.body(tree=second, **inputs).last_hidden_state
        return BaseModelOutput(last_hidden_state=base + guide / self.beta)
