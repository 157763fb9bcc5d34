"""How well scores agree with human labels: Spearman's correlation and AUC, with intervals."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation; nan when either side is constant."""
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(a), rankdata(b))[0, 1])


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """P(score of a positive > score of a negative), ties half; nan when either class is empty."""
    n_positive = int(positive.sum())
    n_negative = len(scores) - n_positive
    if not n_positive or not n_negative:
        return float("nan")
    rank_sum = float(rankdata(scores)[positive].sum())
    return (rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)


def quality(
    scores: Sequence[float],
    labels: Sequence[float],
    groups: Sequence[Hashable],
    seed: int,
    resamples: int = 1000,
) -> dict[str, Any]:
    """Spearman and AUC (label above 0.5 is positive) with 95 % bootstrap intervals.

    Whole groups are resampled: rows that share a prompt are not independent.
    """
    s, y = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    blocks = [np.asarray(rows) for rows in members.values()]
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(resamples):
        rows = np.concatenate([blocks[i] for i in rng.integers(len(blocks), size=len(blocks))])
        draws.append((spearman(s[rows], y[rows]), auc(s[rows], y[rows] > 0.5)))
    low, high = np.nanpercentile(np.asarray(draws), [2.5, 97.5], axis=0)
    return {
        "spearman": spearman(s, y),
        "spearman_interval": [float(low[0]), float(high[0])],
        "auc": auc(s, y > 0.5),
        "auc_interval": [float(low[1]), float(high[1])],
    }
