"""What samples on a layout of cards: how many hold its weights, in which type. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from .hardware import Card
from .mesh import Layout
from .model_shape import ModelShape
from .workload import Work


@dataclass(frozen=True)
class Engine:
    """A sampler, as `cost` sees it."""

    cards: int  # that hold its weights together: vLLM's tensor parallelism
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


def engine_cards(work: Work, model: ModelShape, card: Card, layout: Layout) -> int:
    """Give the least power of two of a group's cards whose quarters hold a vLLM engine [R].

    This package's own engine, and transformers' generate, hold the whole model on each card: 1.
    """
    if work.backend != "vllm":
        return 1
    cards, most = 1, min(layout.parts, card.node)
    while 2 * model.parameters / cards > card.memory / 4 and 2 * cards <= most:
        if layout.parts % (2 * cards):
            break
        cards *= 2
    return cards
