"""What samples on a card, which holds all weights for it: in which type. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from .hardware import Card
from .workload import Work


@dataclass(frozen=True)
class Engine:
    """A sampler, as `cost` sees it."""

    dtype: str  # of a weight
    slots: int  # rows that grow at a time
    factors: int  # numbers of LoRA's factors that stay apart; 0: there are none, or they are added
    merged: bool  # the factors are multiplied out before each rollout

    @property
    def bytes(self) -> int:
        """Give the bytes of a weight."""
        return bytes_of(self.dtype)


def weight_type(work: Work, card: Card) -> str:
    """Name the type of the model's weights and products: what policy.dtype=auto means on a card."""
    if work.dtype != "auto":
        return work.dtype
    if not card.half:
        return "float32"
    return "tfloat32" if work.tuning == "full" else "bfloat16"


def bytes_of(dtype: str) -> int:
    """Give the bytes of a number of a type of policy.dtype."""
    return 2 if dtype == "bfloat16" else 4
