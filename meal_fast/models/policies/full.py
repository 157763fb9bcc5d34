"""A policy of which all parameters are trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..network import Network
from ..reference_offload import FrozenCopy
from ..shards import local
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

    @property
    def in_parts(self) -> bool:
        return self.sharded is not None

    @contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Set the parameters, all of them, by name, for as long as the context lasts."""
        if self.sharded is None:
            with super().holding(values):
                yield
            return
        own = [local(p) for p in self.trainable]
        kept = [x.clone() for x in own]
        try:
            self.sharded.put({name: values[name] for name in self.named})
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(own, kept)

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
        if self.sharded is not None and self.frozen.sharded is not None:
            for held in (self.sharded, self.frozen.sharded):
                held.put({name: values[name] for name in self.named})
            return
        for name, p in self.named.items():
            p.copy_(values[name])
        self.frozen = FrozenCopy(self.causal_lm)
        self._copy = self.kept = None
