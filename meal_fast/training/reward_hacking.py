"""A word when a reward rises and the mark that should go with it does not, or falls alone.

A reward model can be deceived: its reward rises, and the answers are not what it stands for. The
marks of `data.markers`, counted by rule and never a reward, show it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from meal_fast.data.objectives import Objectives
from meal_fast.data.reward_statistics import Normalizer
from meal_fast.data_types import Prompt

# An answer that bears each mark, and whose opposite bears the other.
EXAMPLES = {
    "refuses": "I'm sorry, but I can't help with that.",
    "complies": "Sure, here is how you can do that, step by step.",
}
PROMPTS = 4  # that the examples answer
LEAST = 6  # updates with answers at an end before it is judged
RISE, HIGH = 0.1, 0.9  # a share has risen by this much; one as high as that need not
FALL, FEW = 0.3, 0.1  # a share has fallen by this much, to less than that


def own_marks(
    objectives: Objectives,
    normalizer: Normalizer,
    names: Sequence[str],
    prompts: Sequence[Prompt],
    marks: Sequence[str],
) -> dict[str, str]:
    """Find which mark goes with which objective: {objective: mark}.

    A mark goes with the objective that prefers the mark's example to its opposite by most, in
    normalised reward averaged over a few training prompts; with none where none prefers it. It is
    not read off a correlation in the model's own answers: what a model never does shows none, and
    that is when a reward is hacked [R].
    """
    wanted = [mark for mark in EXAMPLES if mark in marks]
    if not wanted:
        return {}
    texts = [p.text for p in prompts[:PROMPTS]]
    mean = {}
    for mark, example in EXAMPLES.items():
        rewards = normalizer.apply(objectives.rewards(texts, [example] * len(texts)))
        # An objective that applies to none of them prefers neither.
        mean[mark] = rewards.float().nanmean(0).nan_to_num(0.0).tolist()
    refuses = [r - c for r, c in zip(mean["refuses"], mean["complies"], strict=True)]
    prefers = {"refuses": refuses, "complies": [-x for x in refuses]}
    found = {}
    for mark in wanted:
        k = max(range(len(names)), key=lambda k: prefers[mark][k])
        if prefers[mark][k] > 0:
            found[names[k]] = mark
    return found


class RewardHacking:
    """Judge updates' metrics as they come, each objective at its own end of the simplex.

    Of the updates so far with answers there, at least 6, the first third is compared with the last.
    A warning is due, once for each objective, where its mean reward rose by more than its standard
    deviation among the first, while the share of answers with its mark rose by less than 0.1 and is
    below 0.9; and where, of twice as many updates, that share fell by 0.3 to below 0.1, and the
    reward by no more than a quarter of that deviation [R].

    Args:
        own: which mark goes with which objective: see `own_marks`.
        earlier: the metrics of the run so far.
    """

    def __init__(self, own: Mapping[str, str], earlier: Sequence[Mapping[str, Any]]) -> None:
        self._own = dict(own)
        self._seen: dict[str, list[Mapping[str, float]]] = {name: [] for name in own}
        for line in earlier:
            self._note(line)
            self._said(line.get("hacked", {}))

    def judged(self, line: dict[str, Any]) -> dict[str, Any]:
        """Give an update's metrics, with `hacked` = {objective: what is wrong} where it is due."""
        self._note(line)
        found = {
            name: said
            for name, mark in self._own.items()
            if name in line["ends"] and (said := suspicion(self._seen[name], name, mark))
        }
        self._said(found)
        return line | {"hacked": found} if found else line

    def _note(self, line: Mapping[str, Any]) -> None:
        for name, mark in self._own.items():
            end = line.get("ends", {}).get(name)
            if end is not None and mark in end:
                self._seen[name].append(end)

    def _said(self, found: Mapping[str, str]) -> None:
        for name in found:
            self._own.pop(name, None)


def suspicion(ends: Sequence[Mapping[str, float]], name: str, mark: str) -> str:
    """Say what is wrong at one objective's end, update by update; empty: nothing is."""
    if len(ends) < LEAST:
        return ""
    third = len(ends) // 3
    first, last = ends[:third], ends[-third:]
    before, after = _mean(first, "reward"), _mean(last, "reward")
    had, has = _mean(first, mark), _mean(last, mark)
    spread = _mean(first, "spread")
    bought = after - before > spread and has - had < RISE and has < HIGH
    steady = len(ends) >= 2 * LEAST and after - before >= -spread / 4
    lost = steady and had - has >= FALL and has < FEW
    if not (bought or lost):
        return ""
    return (
        f"the reward {name} went from {before:+.2f} to {after:+.2f} where it is asked for, but of "
        f"the answers there {had:.0%} at first and {has:.0%} now bear the mark “{mark}”: read "
        "them; the reward may be deceived"
    )


def _mean(ends: Sequence[Mapping[str, float]], key: str) -> float:
    return sum(e["rows"] * e[key] for e in ends) / sum(e["rows"] for e in ends)
