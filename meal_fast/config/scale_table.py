"""The table of docs/scale.md: models of three sizes on 1 to 1,024 cards, by the cost model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import product

from .config import Config, from_dict
from .cost import Cost, cost
from .hardware import CARDS, GB, Card
from .mesh import layout
from .mesh_plan import count, time
from .model_shape import ModelShape, shape_of
from .presets import preset
from .workload import work_of

SIZES, COUNTS = ("0.5B", "7B", "70B"), (1, 8, 64, 256, 1024)
TASKS, PROMPTS, SAMPLES, TOKENS = 16, 4, 16, (256, 512)
MICRO = (
    0,
    2048,
    4096,
    8192,
    16384,
)  # tokens of a micro-batch; 0: by the memory that is free
GAIN = 0.95
_HEAD = (
    ("model", "trained", "cards", "G x D x S", "sampler", "GB a card", "meta-step", "rollout",
     "reward", "learn", "wait", "GB sent", "tokens/s"),
    ("---",) * 2 + ("---:",) * 11,
)  # fmt: skip


def table() -> str:
    """Give the table in Markdown: a row a model, a tuning and a number of H100s."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (*_HEAD, *_rows()))


def _rows() -> Iterator[tuple[str, ...]]:
    for name in SIZES:
        model = shape_of(name)
        for tuning in ("lora", "full"):
            for cards in COUNTS:
                found = quickest(model, tuning, CARDS["h100"], cards)
                start = (name, tuning, f"{cards:,}")
                yield (*start, *(_figures(found) if found else ("does not fit", *("",) * 9)))


def quickest(model: ModelShape, tuning: str, card: Card, cards: int) -> Cost | None:
    """Cost the layout of the shortest meta-step that fits so many cards; None where none does.

    Tried: shards in powers of two, each with this package's engine and vLLM, with activations kept
    and recomputed, and micro-batches of several sizes. One takes the place of those before it where
    it is shorter by 5 %.
    """
    best: Cost | None = None
    for shard in (1 << i for i in range(cards.bit_length())):
        samplers = ("engine", "vllm") if shard == 1 else ("engine",)  # vLLM is given whole weights
        for backend, recompute, micro in product(samplers, (False, True), MICRO):
            config = _config(tuning, backend, recompute, micro, shard)
            laid = layout(config, cards)
            each = dataclasses.replace(config.rollout, prompts=PROMPTS * laid.parts)
            config = dataclasses.replace(config, rollout=each)
            found = cost(work_of(config, *TOKENS), model, card, laid)
            if found.fits and (best is None or found.total < GAIN * best.total):
                best = found
    return best


def _config(tuning: str, backend: str, recompute: bool, micro: int, shard: int) -> Config:
    values = {
        "objectives": preset("hh-qwen2").objectives,
        "policy": {"tuning": tuning},
        "rollout": {
            "prompts": 1 << 20,
            "samples": SAMPLES,
            "max_new_tokens": TOKENS[1],
            "backend": backend,
        },
        "grpo": {"recompute": recompute, "micro_tokens": micro},
        "meta": {"tasks": TASKS},
        "mesh": {"shard": shard},
    }
    return from_dict(values)


def _figures(found: Cost) -> tuple[str, ...]:
    laid, seconds, total = found.layout, found.seconds, found.total
    engine = "engine" if found.work.backend == "engine" else "vLLM"
    parts = [seconds[name] / total for name in ("rollout", "reward", "learn")]
    sent = sum(found.wire.values()) / GB
    return (
        f"{laid.groups} x {laid.data} x {laid.shard}",
        engine + ", recompute" * found.work.recompute,
        f"{found.memory.most / GB:.0f}",
        time(total),
        *(f"{part:.0%}" for part in (*parts, max(0.0, 1 - sum(parts)))),
        f"{sent:.3g}" if sent < 100 else f"{sent:,.0f}",
        count(found.tokens_per_second),
    )
