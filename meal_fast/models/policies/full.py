"""A policy of which all parameters are trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..network import Network
from ..reference_offload import FrozenCopy
from .base import Policy


class FullPolicy(Policy):
    """All parameters are trained; the reference is a frozen copy made before."""

    def __init__(self, model: Any, frozen: FrozenCopy, *format: Any) -> None:
        embedding = model.get_input_embeddings()
        # Tied to the head, it gets a dense gradient there: no second one for a few of its rows.
        embedding.sparse = embedding.weight is model.get_output_embeddings().weight
        super().__init__(model, *format)
        self.frozen = frozen

    @property
    def reference_lm(self) -> Any:
        """The frozen copy."""
        return self.frozen.model

    @property
    def named(self) -> dict[str, nn.Parameter]:
        # Gathered, a model has other parameters than those that are trained.
        return super().named if self.sharded is None else dict(self.sharded.held)

    @contextmanager
    def reference(self) -> Iterator[Network]:
        """Give the copy made before training; its memory is given back afterwards."""
        try:
            yield self.frozen.network
        finally:
            self.frozen.release()

    @torch.no_grad()
    def rebase(self, values: Mapping[str, Tensor]) -> None:
        """Copy these parameters into the policy and its frozen copy, which then stays in memory."""
        for name, p in self.named.items():
            p.copy_(values[name])
        self.frozen = FrozenCopy(self.causal_lm)
        self._copy = self.kept = None
