"""A policy of which a guide is trained, conditioned on the preference through its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..export import GUIDE
from ..network import Network
from ..pblora import Adapter
from .base import Policy


class PBLoRAPolicy(Policy):
    """The frozen base model, guided by itself with a bilinear adapter (`models.guided`)."""

    adapter: Adapter

    def __init__(self, model: Any, adapter: Adapter, *format: Any) -> None:
        super().__init__(model, *format)
        self.adapter = adapter

    @contextmanager
    def reference(self) -> Iterator[Network]:
        """Give the base model: the adapter is off as long as the context lasts."""
        with self.adapter.at(None):
            yield self.network

    @contextmanager
    def merged(self) -> Iterator[Network]:
        """Give what `guided.guided` put here: each preference has its own.

        Raises ValueError outside of that.
        """
        if self.served is None:
            raise ValueError("policy: its guide answers at one preference: models.guided.guided")
        yield self.served

    def merged_state(self) -> dict[str, Tensor]:
        """Give the plain model's state with the guide added at equal weights."""
        equal = torch.full((len(self.names),), 1 / len(self.names), device=self.device)
        return self.adapter.state(self.causal_lm.state_dict(), equal)

    def save_factors(self, folder: Path) -> None:
        """Write the guide's factors, `guide.safetensors`."""
        self.adapter.save(folder / GUIDE)
