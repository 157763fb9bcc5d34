"""Options that one recipe alone has; what all have is in config.py, tags and checks as there."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .options import opt, require


@dataclass(frozen=True)
class RicConfig:
    """Rewards-in-Context, where [P] is its own paper: meal_fast.ric."""

    offline: float = opt(0.5, "share of the run on the base model's responses; then online [R]")
    quantile: float = opt(0.7, "online: kept is what reaches it in any reward of its round [P]")
    replay: float = opt(0.5, "online: offline responses learnt beside each one that is kept [R]")
    buffer: int = opt(1024, "recent offline responses: replayed, and drawn for goals [R]")

    def __post_init__(self) -> None:
        for name, ok, remedy in (
            ("offline", 0 < self.offline <= 1, "a share of the run, in (0, 1]: goals come from it"),
            ("quantile", 0 <= self.quantile < 1, "must be in [0, 1)"),
            ("replay", 0 <= self.replay < math.inf, "must not be negative"),
            ("buffer", self.buffer >= 1, "must be at least 1"),
        ):
            require(ok, f"ric.{name}", getattr(self, name), remedy)
