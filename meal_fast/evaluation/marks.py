"""How many of a sweep's answers bear each mark, by weight: counted by rule, beside the rewards.

W  weights of the sweep    P  prompts    S  samples    M  marks    B  resamples
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from meal_fast.data.markers import MARKERS
from meal_fast.data.preferences import Preference

from . import metrics
from .metrics import Array


def shares(marks: Sequence[str], texts: Sequence[str], weights: int, prompts: int) -> Array:
    """Count the marks in a sweep's answers: per prompt, the share of its samples, (M, W, P).

    `texts`: P * W * S answers, ordered by prompt, then weight, then sample.
    """
    borne = np.array([[MARKERS[mark](text) for text in texts] for mark in marks], dtype=np.float64)
    return borne.reshape(len(marks), prompts, weights, -1).mean(-1).transpose(0, 2, 1)


def by_weight(marks: Sequence[str], share_MWP: Array) -> list[dict[str, metrics.Estimate]]:
    """Give at each weight the share of answers that bear each mark, with its interval."""
    prompts = share_MWP.shape[2]
    return [
        {m: metrics.share(float(x), prompts) for m, x in zip(marks, column, strict=True)}
        for column in share_MWP.mean(2).T
    ]


def bought(
    names: Sequence[str],
    marks: Sequence[str],
    weights: Sequence[Preference],
    share_MWP: Array,
    draw_BP: Array,
) -> dict[str, dict[str, metrics.Estimate]]:
    """Give for each objective what the whole weight on it adds to each mark's share against none.

    Both ends have the same prompts; the intervals are bootstraps over them.
    """

    def ends(share: Array) -> Array:  # (..., W) -> (..., K)
        return metrics.ends(weights, np.repeat(share[..., None], len(names), -1))

    found: dict[str, dict[str, metrics.Estimate]] = {name: {} for name in names}
    for mark, share_WP in zip(marks, share_MWP, strict=True):
        value_K, sample_BK = ends(share_WP.mean(1)), ends(draw_BP @ share_WP.T)
        for k, name in enumerate(names):
            found[name][mark] = metrics.estimate(
                float(value_K[k]), sample_BK[:, k], prompts=share_WP.shape[1]
            )
    return found


def add(
    entry: dict[str, Any],
    names: Sequence[str],
    marks: Sequence[str],
    weights: Sequence[Preference],
    texts: Sequence[str],
    draw_BP: Array,
) -> None:
    """Add the marks of a sweep's answers to its summary, at each point and over all."""
    share_MWP = shares(marks, texts, len(weights), draw_BP.shape[1])
    for point, there in zip(entry["points"], by_weight(marks, share_MWP), strict=True):
        point["marks"] = there
    entry["mark_ends"] = bought(names, marks, weights, share_MWP, draw_BP)
    entry["prompt_marks"] = dict(zip(marks, share_MWP, strict=True))


def of_benign(
    marks: Sequence[str], weights: Sequence[Preference], texts: Sequence[str], prompts: int
) -> dict[str, Any]:
    """Sum up the marks of answers to benign prompts: at each weight, and prompt by prompt."""
    share_MWP = shares(marks, texts, len(weights), prompts)
    there = by_weight(marks, share_MWP)
    return {
        "points": [{"w": w, "marks": found} for w, found in zip(weights, there, strict=True)],
        "prompt_marks": dict(zip(marks, share_MWP, strict=True)),
    }
