"""The prompts whose answers a report shows at every weight: few, and mild ones first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from meal_fast.data.markers import mild
from meal_fast.data.preferences import Preference
from meal_fast.data_types import Prompt

from .generate import Sweep
from .metrics import Array

BENIGN, ALL = 2, 5  # at most, the asked one not counted
ASKED = "asked"  # its id


@dataclass(frozen=True)
class Example:
    """A prompt to show: the one that is asked for, a benign one, or one of the evaluation."""

    prompt: Prompt
    kind: Literal["asked", "benign", "evaluation"]


def choose(prompts: Sequence[Prompt], benign: Sequence[Prompt], ask: str) -> list[Example]:
    """Choose what to show: what is asked for, the first benign prompts, then those of the sweep.

    Of the sweep those come first that are benign as well, then those that are mild by the rule of
    `data.markers`; others only where there is nothing else.
    """
    ours = {p.id for p in prompts}
    ordinary = {p.id for p in benign}
    found = [Example(Prompt(ASKED, ask), "asked")] if ask else []
    found += [Example(p, "benign") for p in benign if p.id not in ours][:BENIGN]
    room = ALL - len(found) + bool(ask)
    usable = [p for p in prompts if p.id in ordinary or mild(p.text)]
    if not usable and not found:
        usable = list(prompts)
    first = sorted(usable, key=lambda p: p.id not in ordinary)  # stable: else as they stand
    return found + [Example(p, "evaluation") for p in first[:room]]


def said(
    names: Sequence[str],
    prompts: Sequence[Prompt],
    weights: Sequence[Preference],
    greedy: Sweep,
    reward_WPSK: Array,
) -> dict[tuple[str, Preference], dict[str, Any]]:
    """Give the greedy answer to each prompt at each weight, and its raw rewards."""
    return {
        (prompt.id, w): {
            "text": greedy.texts[i * len(weights) + j],
            "reward": dict(zip(names, reward_WPSK[j, i, 0], strict=True)),
        }
        for i, prompt in enumerate(prompts)
        for j, w in enumerate(weights)
    }
