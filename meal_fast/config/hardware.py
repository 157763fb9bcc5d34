"""Cards and their links as data: what the cost model divides by. Imports no torch.

The figures of GPUs are their makers' data sheets'; those of `cpu` were measured, see docs/scale.md.
What of them a run reaches is not known: `Shares` are assumptions, which a plan prints.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from meal_fast.common import require

GB = 1e9  # bytes: decimal, as data sheets have them


@dataclass(frozen=True)
class Shares:
    """What is assumed of a card: shares of its peaks, in (0, 1], and seconds [R]."""

    learn: float = 0.40  # of FLOP/s: forward and backward passes over many tokens
    prefill: float = 0.50  # of FLOP/s: a pass over prompts, and one of a reward model
    decode: float = 0.50  # of FLOP/s: a step that makes one token of each row
    read: float = 0.60  # of the memory's bytes/s
    link: float = 0.70  # of the bytes/s between cards
    launch: float = 2.5e-6  # seconds of a kernel beside its work; 20 a layer, 28 with factors apart
    push: float = 8 * GB  # bytes/s of new weights into a vLLM engine
    hop: float = 20e-6  # seconds until another process has a message's first byte

    def __post_init__(self) -> None:
        for name in ("learn", "prefill", "decode", "read", "link"):
            value = getattr(self, name)
            require(0 < value <= 1, name, value, "a share, in (0, 1]")
        require(self.push > 0, "push", self.push, "bytes/s, positive")
        for name in ("launch", "hop"):
            value = getattr(self, name)
            require(0 <= value < math.inf, name, value, "seconds, not negative")


@dataclass(frozen=True)
class Card:
    """One process's device: bytes, FLOP/s, bytes/s."""

    name: str
    memory: float  # bytes
    flops: float  # dense products of what frozen weights are: bfloat16 on a GPU, float32 on a CPU
    flops_full: float  # of float32 weights of which all are trained: tfloat32 on a GPU
    flops_exact: float  # of float32, nothing rounded
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s, one way, to a card of its node
    nic: float  # bytes/s, one way, to another node
    node: int  # cards of a node
    runtime: float  # bytes that libraries and contexts take [R]
    half: bool = True  # frozen weights are bfloat16
    shares: Shares = Shares()

    def __post_init__(self) -> None:
        for name in (
            "memory",
            "flops",
            "flops_full",
            "flops_exact",
            "bandwidth",
            "link",
            "nic",
            "node",
        ):
            value = getattr(self, name)
            good = 0 < value < 1e30
            require(good, f"card {self.name!r}: {name}", value, "must be positive, below 1e30")

    def products(self, dtype: str) -> float:
        """Give the FLOP/s of products with weights of a type, as policy.dtype names it."""
        return {"bfloat16": self.flops, "tfloat32": self.flops_full}.get(dtype, self.flops_exact)

    def between(self, cards: int) -> float:
        """Give the bytes/s, one way, that `cards` neighbours reach among themselves."""
        return self.shares.link * (self.link if cards <= self.node else self.nic)


# SXM modules. NVLink: half of the data sheet's sum of both ways; a NIC of 400 (A100: 200) Gb/s a
# card. The CPU: one core of the machine of docs/scale.md, its shares too.
CARDS = {
    "h100": Card("h100", 80 * GB, 989e12, 494e12, 67e12, 3.35e12, 450 * GB, 50 * GB, 8, 2 * GB),
    "h200": Card("h200", 141 * GB, 989e12, 494e12, 67e12, 4.8e12, 450 * GB, 50 * GB, 8, 2 * GB),
    "a100": Card("a100", 80 * GB, 312e12, 156e12, 19.5e12, 2.039e12, 300 * GB, 25 * GB, 8, 2 * GB),
    "cpu": Card(
        "cpu",
        24 * GB,
        231e9,
        231e9,
        231e9,
        41 * GB,
        2 * GB,
        1.25 * GB,
        2,
        0.7 * GB,
        half=False,
        shares=Shares(learn=0.60, launch=8e-6, hop=100e-6),
    ),
}


def card_named(
    name: str,
    *,
    memory: float | None = None,
    flops: float | None = None,
    bandwidth: float | None = None,
    node: int | None = None,
) -> Card:
    """Give a card by name, with the figures given (bytes, FLOP/s, bytes/s, cards a node) instead.

    A name that is not known needs the first three; its links and proportions are then an h100's.

    Raises ValueError for a name without them, and for figures that are not positive.
    """
    given = {"memory": memory, "flops": flops, "bandwidth": bandwidth, "node": node}
    changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if flops is not None:
        like = CARDS.get(name, CARDS["h100"])  # in the same proportion
        changes["flops_full"] = flops * like.flops_full / like.flops
        changes["flops_exact"] = flops * like.flops_exact / like.flops
    if name not in CARDS:
        remedy = (
            f"not known; choose from {', '.join(CARDS)}, or give --card-memory, --card-flops and "
            "--card-bandwidth too"
        )
        require({"memory", "flops", "bandwidth"} <= changes.keys(), "card", name, remedy)
        return dataclasses.replace(CARDS["h100"], name=name, **changes)
    return dataclasses.replace(CARDS[name], **changes)
