"""Which cards a plan is for: of the command line, of this launch, or of this machine. No torch."""

from __future__ import annotations

import argparse
import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meal_fast.common import require

from .config import Config
from .hardware import CARDS, GB, Card, card_named
from .mesh import Layout, layout, world_of
from .model_shape import ModelShape, shape_of


@dataclass(frozen=True)
class Cards:
    """What is said of cards; None where nothing is."""

    cards: int | None = None
    card: str | None = None
    card_memory: float | None = None  # GB
    card_flops: float | None = None  # TFLOP/s
    card_bandwidth: float | None = None  # GB/s
    node: int | None = None

    def layout(self, config: Config) -> Layout:
        """Lay out as many processes as there are cards; without, those of this launch."""
        if self.cards is not None:
            require(1 <= self.cards <= 1 << 20, "cards", self.cards, "1 to 1,048,576")
        return layout(config, self.cards or world_of(os.environ)[1])

    def card_for(self, config: Config) -> Card:
        """Give the card that was named, or else this machine's."""
        return self.chosen(card_here(config))

    def chosen(self, default: str) -> Card:
        """Give the card. Raises ValueError for one that is not known."""
        scaled: dict[str, Any] = {
            "memory": self.card_memory and self.card_memory * GB,
            "flops": self.card_flops and self.card_flops * 1e12,
            "bandwidth": self.card_bandwidth and self.card_bandwidth * GB,
            "node": self.node,
        }
        return card_named(self.card or default, **scaled)


def card_here(config: Config) -> str:
    """Name the card that stands for this machine's: cpu, or h100 where there is an NVIDIA GPU."""
    there = any(Path("/dev", name).exists() for name in ("nvidiactl", "nvidia0"))
    return "cpu" if config.policy.device == "cpu" or not there else "h100"


def shape_here(config: Config) -> ModelShape | None:
    """Give the shape of the run's model; None where its files are not here."""
    try:
        return shape_of(config.policy.path)
    except (ValueError, OSError):
        return None


def add_cards(parser: argparse.ArgumentParser) -> None:
    """Add the options of `Cards`."""
    group = parser.add_argument_group("cards, for a plan")
    names = ", ".join(CARDS)
    group.add_argument("--cards", type=int, metavar="N", help="how many, a process each")
    group.add_argument("--card", metavar="NAME", help=f"{names}, or one whose figures are given")
    group.add_argument("--card-memory", type=float, metavar="GB", help="its memory, in 10^9 bytes")
    group.add_argument("--card-flops", type=float, metavar="TFLOP/S", help="its dense products")
    group.add_argument("--card-bandwidth", type=float, metavar="GB/S", help="its memory's, read")
    group.add_argument("--node", type=int, metavar="N", help="cards of a node")


def take_cards(found: dict[str, Any]) -> Cards:
    """Take the options of `Cards` out of what a parser has found."""
    return Cards(**{f.name: found.pop(f.name) for f in dataclasses.fields(Cards)})
