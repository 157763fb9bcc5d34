"""What an evaluation measures of a sweep: pure functions of arrays, no model, no torch.

    W  weights of the sweep    P  prompts    K  objectives    B  bootstrap resamples

Points are mean normalised rewards, higher is better. Leading dimensions (`...`) are free, so that
the same function serves a mean and its B resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from meal_fast.data.preferences import Preference
from meal_fast.data_types import rng_seed

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and its bootstrap interval; none where a single prompt leaves nothing to resample."""

    value: float
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """Plain values for JSON, which knows no NaN: undefined becomes null."""
        parts = {"value": self.value, "low": self.low, "high": self.high}
        return {k: None if v is None or not np.isfinite(v) else float(v) for k, v in parts.items()}


def resamples(prompts: int, count: int, *, seed: int) -> Array:
    """Bootstrap over prompts as weights (B, P), rows summing to 1: a mean is one product.

    Keyed by (seed, prompts, count) alone: every quantity of an evaluation sees the same resamples,
    so differences between models are paired.
    """
    rng = np.random.Generator(np.random.Philox(key=rng_seed(seed, "bootstrap", prompts, count)))
    return rng.multinomial(prompts, np.full(prompts, 1.0 / prompts), size=count) / prompts


def mean(values: Array, axis: int | tuple[int, ...]) -> Array:
    """Means over what is there: NaN, a reward of an objective that does not apply, is left out.

    NaN where nothing is there.
    """
    there = ~np.isnan(values)
    if there.all():
        return np.asarray(values.mean(axis))
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(there, values, 0.0).sum(axis) / there.sum(axis))


def resampled_means(by_prompt: Array, draw_BP: Array) -> Array:
    """Means over prompts of by_prompt (W, P, K) under every resample: (B, W, K).

    Of the prompts that an objective applies to, as `mean`.
    """
    there = ~np.isnan(by_prompt)
    if there.all():
        return np.einsum("bp,wpk->bwk", draw_BP, by_prompt)
    total = np.einsum("bp,wpk->bwk", draw_BP, np.where(there, by_prompt, 0.0))
    with np.errstate(invalid="ignore"):
        return total / np.einsum("bp,wpk->bwk", draw_BP, there.astype(np.float64))


FEW = 5


def estimate(value: float, sample_B: Array, *, prompts: int, level: float = 0.95) -> Estimate:
    """`value` with the percentile interval of its resamples; undefined (NaN) ones are left out.

    No interval below FEW prompts: resamples of so few say next to nothing of other prompts.
    """
    known = sample_B[np.isfinite(sample_B)]
    if prompts < FEW or not np.isfinite(value) or not len(known):
        return Estimate(float(value))
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(value), float(low), float(high))


def share(value: float, trials: int) -> Estimate:
    """Give a share in [0, 1] with Wilson's 95 % interval, which a share of 0 or 1 has as well.

    (p + z²/2n ± z sqrt(p(1 - p)/n + z²/4n²)) / (1 + z²/n) at z = 1.96. `trials` n: the prompts;
    where each has several samples that is cautious, for the samples of a prompt are alike.
    """
    z = 1.959964
    scale = 1 + z**2 / trials
    middle = (value + z**2 / (2 * trials)) / scale
    half = z * np.sqrt(value * (1 - value) / trials + z**2 / (4 * trials**2)) / scale
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Estimate(value, float(low), float(high))


def ranks(x: Array) -> Array:
    """Ranks along the last dimension, 1 the smallest, ties sharing their mean rank."""
    below = (x[..., None, :] < x[..., :, None]).sum(-1)
    equal = (x[..., None, :] == x[..., :, None]).sum(-1)
    return below + (equal + 1) / 2.0


def spearman(x_W: Array, y: Array) -> Array:
    """Spearman's rank correlation of x (W,) with each y (..., W); NaN where either is constant."""
    a, b = ranks(x_W), ranks(y)
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    scale = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 0, (a * b).sum(-1) / scale, np.nan)


def neighbours(weights: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Pairs of the sweep that lie beside each other on the simplex.

    K = 2: consecutive in w_1, however uneven the grid. K > 2: pairs at the smallest distance found,
    which on a lattice are one step apart.
    """
    w = np.asarray(weights, dtype=np.float64)
    if len(w) < 2:
        return []
    if w.shape[1] == 2:
        order = np.argsort(-w[:, 0], kind="stable")
        return [(int(i), int(j)) for i, j in pairwise(order)]
    distance = np.abs(w[:, None] - w[None]).sum(-1)
    i, j = np.triu_indices(len(w), 1)
    near = distance[i, j] <= distance[i, j].min() + 1e-9
    return [(int(a), int(b)) for a, b in zip(i[near], j[near], strict=True)]


def gaps(points: Array, pairs: Sequence[tuple[int, int]]) -> Array:
    """Euclidean distances between neighbours: points (..., W, K) -> (..., pairs).

    The largest shows a hollow front. It says little where the ends of the sweep lie together.
    """
    i, j = np.asarray(pairs, dtype=np.int64).reshape(-1, 2).T
    return np.sqrt(((points[..., i, :] - points[..., j, :]) ** 2).sum(-1))


def violations(
    weights: Sequence[Sequence[float]], points_WK: Array, pairs: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Per objective k: pairs where w_k rises and mean reward k falls; pairs where w_k rises."""
    w = np.asarray(weights, dtype=np.float64)
    i, j = np.asarray(pairs, dtype=np.int64).reshape(-1, 2).T
    rise, gain = w[j] - w[i], points_WK[j] - points_WK[i]
    moved = np.abs(rise) > 1e-9
    against = moved & (np.sign(rise) * gain < -1e-9)
    return [(int(a), int(m)) for a, m in zip(against.sum(0), moved.sum(0), strict=True)]


def ends(weights: Sequence[Sequence[float]], points: Array) -> Array:
    """What asking buys: mean reward k at the largest w_k of the sweep minus that at the smallest.

    points (..., W, K) -> (..., K). Where several weights share the extreme w_k, their mean counts.
    """
    w = np.asarray(weights, dtype=np.float64)
    columns = []
    for k in range(w.shape[1]):
        top = np.isclose(w[:, k], w[:, k].max())
        bottom = np.isclose(w[:, k], w[:, k].min())
        columns.append(points[..., top, k].mean(-1) - points[..., bottom, k].mean(-1))
    return np.stack(columns, -1)


@dataclass(frozen=True)
class Rise:
    """How a curve rises over its levels: where half of it is reached, and its largest step."""

    half: float  # a level, linear between neighbours
    largest: float  # the share of the rise that lies between two neighbouring levels
    between: tuple[float, float]  # these


def rise(levels_L: Array, value_L: Array) -> Rise | None:
    """Describe how a curve rises over ascending levels; None where it does not.

    Of the nearest curve that never falls (least squares), since noise alone makes steps.
    """
    fit_L = isotonic(value_L)
    whole = fit_L[-1] - fit_L[0]
    if whole <= 0:
        return None
    steps = np.diff(fit_L) / whole
    j = int(steps.argmax())
    passed = (fit_L - fit_L[0]) / whole
    i = int((passed >= 0.5).argmax())
    part = (0.5 - passed[i - 1]) / (passed[i] - passed[i - 1])
    return Rise(
        float(levels_L[i - 1] + part * (levels_L[i] - levels_L[i - 1])),
        float(steps[j]),
        (float(levels_L[j]), float(levels_L[j + 1])),
    )


def isotonic(value_L: Array) -> Array:
    """Give the curve that never falls and is nearest in least squares: neighbours pooled."""
    blocks: list[tuple[float, int]] = []  # mean, count
    for value in value_L:
        mean, count = float(value), 1
        while blocks and blocks[-1][0] >= mean:
            before, n = blocks.pop()
            mean, count = (before * n + mean * count) / (n + count), n + count
        blocks.append((mean, count))
    return np.repeat([mean for mean, _ in blocks], [count for _, count in blocks])


def expected_utility(weights: Sequence[Sequence[float]], points: Array) -> Array:
    """Mean over w of max over the sweep's points of w · r: points (..., W, K) -> (...).

    How good the set of points is to users with linear utilities, whoever asked for which point.
    """
    utility = np.asarray(weights, dtype=np.float64) @ np.swapaxes(points, -1, -2)
    return utility.max(-1).mean(-1)


def reference_point(points: Array) -> Array:
    """Nadir of all points (N, K) minus a tenth of their range, for every model of a comparison."""
    low, high = points.min(0), points.max(0)
    return low - 0.1 * (high - low)


def hypervolume(points: Array, reference_K: Array) -> Array:
    """Volume dominated by the points and above the reference: points (..., W, K) -> (...)."""
    flat = points.reshape(-1, *points.shape[-2:])
    import moocore

    volumes = [
        moocore.hypervolume(front, ref=reference_K, maximise=True)
        if np.isfinite(front).all()
        else np.nan  # a resample of prompts that an objective applies to none of
        for front in flat
    ]
    return np.asarray(volumes, dtype=np.float64).reshape(points.shape[:-2])


def nondominated(points: Array) -> NDArray[np.bool_]:
    """(N, K) -> (N,): true where no other point is at least as good in all and better in one."""
    import moocore

    return np.asarray(moocore.is_nondominated(points, maximise=True, keep_weakly=True), dtype=bool)


def summarise(
    names: Sequence[str],
    weights: Sequence[Preference],
    seen: Sequence[bool],  # W: could training draw it
    raw_WPK: Array,
    norm_WPK: Array,
    pu_WP: Array,
    solid_W: NDArray[np.bool_],  # among all models' points: not dominated
    reference_K: Array,
    draw_BP: Array,
) -> tuple[dict[str, Any], dict[str, tuple[float, Array]]]:
    """All measures of one sweep, and those compared between models as (value, resamples)."""
    prompts = raw_WPK.shape[1]
    point_WK, point_raw_WK = mean(norm_WPK, 1), mean(raw_WPK, 1)
    raw_BWK = resampled_means(raw_WPK, draw_BP)
    norm_BWK = resampled_means(norm_WPK, draw_BP)
    pu_BW = draw_BP @ pu_WP.T
    w_WK = np.asarray(weights)
    pairs = neighbours(weights)
    distance = gaps(point_WK, pairs)
    widest = int(distance.argmax())
    broken = violations(weights, point_WK, pairs)

    def interval(value: float, sample_B: Array) -> Estimate:
        return estimate(value, sample_B, prompts=prompts)

    def per_objective(value_K: Array, sample_BK: Array) -> dict[str, Estimate]:
        return {n: interval(value_K[k], sample_BK[:, k]) for k, n in enumerate(names)}

    def pu_of(chosen: Sequence[bool]) -> Estimate | None:
        keep = np.asarray(chosen)
        return interval(pu_WP[keep].mean(), pu_BW[:, keep].mean(1)) if keep.any() else None

    raw_ends = per_objective(ends(weights, point_raw_WK), ends(weights, raw_BWK))
    norm_ends = per_objective(ends(weights, point_WK), ends(weights, norm_BWK))
    rank = {
        n: interval(
            float(spearman(w_WK[:, k], point_WK[:, k])),
            spearman(w_WK[:, k], norm_BWK[:, :, k]),
        )
        for k, n in enumerate(names)
    }
    compared = {
        "hypervolume": (
            float(hypervolume(point_WK, reference_K)),
            hypervolume(norm_BWK, reference_K),
        ),
        "pu": (float(pu_WP.mean()), pu_BW.mean(1)),
        "expected_utility": (
            float(expected_utility(weights, point_WK)),
            expected_utility(weights, norm_BWK),
        ),
    }
    summary = {
        "points": [
            {
                "w": w,
                "raw": per_objective(point_raw_WK[i], raw_BWK[:, i]),
                "normalized": per_objective(point_WK[i], norm_BWK[:, i]),
                "pu": interval(pu_WP[i].mean(), pu_BW[:, i]),
                "nondominated": bool(solid_W[i]),
            }
            for i, w in enumerate(weights)
        ],
        **{name: interval(*pair) for name, pair in compared.items()},
        "pu_seen": pu_of(seen),
        "pu_unseen": pu_of([not s for s in seen]),
        "spearman": rank,
        "ends": {n: {"raw": raw_ends[n], "normalized": norm_ends[n]} for n in names},
        "largest_gap": {
            "value": distance[widest],
            "between": [weights[i] for i in pairs[widest]],
        },
        "violations": {n: {"count": c, "of": m} for n, (c, m) in zip(names, broken, strict=True)},
        # for a later comparison of runs, paired by prompt
        "prompt_rewards": raw_WPK,
        "prompt_normalized": norm_WPK,
        "prompt_pu": pu_WP,
    }
    return summary, compared


def five_weights(weights: Sequence[Preference]) -> list[int]:
    """Indices of up to five weights that span the sweep: K = 2 evenly, K > 2 corners and centre."""
    w = np.asarray(weights)
    k = w.shape[1]
    if k == 2:
        wanted = [(a, 1 - a) for a in (1.0, 0.75, 0.5, 0.25, 0.0)]
    else:
        wanted = [tuple(row) for row in np.eye(k)[:4]] + [(1.0 / k,) * k]
    near = [int(((w - np.asarray(x)) ** 2).sum(1).argmin()) for x in wanted]
    return list(dict.fromkeys(near))


def plain(x: Any) -> Any:
    """Arrays and estimates inside nested values turned into plain JSON ones, floats to 6 digits."""
    if isinstance(x, Estimate):
        return plain(x.to_dict())
    if isinstance(x, dict):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, list | tuple):
        return [plain(v) for v in x]
    if isinstance(x, np.ndarray | np.generic):
        return plain(x.tolist())
    if isinstance(x, float):
        return float(f"{x:.6g}") if np.isfinite(x) else None
    return x
