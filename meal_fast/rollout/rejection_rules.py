"""Which sampled responses are kept: pure rules on tensors.

    R  rows, in the order drawn    B  groups (prompt, preference)    K  objectives, two or more

`group_R` holds any whole numbers, in any order, groups of any sizes. Ties are taken in the order of
rows. Nothing here knows a model: the engine draws, scores, calls `accept`, asks `redraws` how much
more each group needs, and calls `accept` again with *all* rows drawn so far, so that what is kept
does not depend on how the drawing was cut into rounds [R].

Source: Meta-Aligner trains on its policy's responses "with rejection sampling" [P]; the rules are
our reading of that [R], `statistical` after Liu et al., "Statistical Rejection Sampling Improves
Preference Optimization", 2023 [P].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from meal_fast.common import require
from meal_fast.config.config import RejectionConfig
from meal_fast.ops import checks
from meal_fast.ops.philox import uniform

FLOOR = 1e-4  # no entry of a preference is smaller: its logarithm is taken
_POSITION = -1  # in a row's random stream, whose tokens have the positions 0, 1, …
_LEAST_CHANCE = 0.01  # `statistical`: a row less likely to be accepted than this is hopeless
_RANKED = ("top-fraction", "combined")
_QUALITY = {"combined": "top-fraction"}


def floored(w_RK: Tensor) -> Tensor:
    """Clamp preferences (…, K) to at least 1e-4 and renormalise them to a sum of 1 [R]."""
    clamped = w_RK.clamp(min=FLOOR)
    return clamped / clamped.sum(-1, keepdim=True)


def realized_preference(standardized_RK: Tensor, tau: float) -> Tensor:
    """Compute ŵ_i = softmax(standardised r_i / τ), floored: what a response realises [R].

    It knows nothing of the score: what is best under w realises, read so, a sharper preference.

    Args:
        standardized_RK: rewards (R, K) minus the calibration sample's mean, over its standard
            deviation (`Normalizer.fit(sample, "standard").apply`), whatever normalisation the score
            uses. Not by the group's own statistics: among responses that are all helpful and
            none harmless, half would seem to realise the opposite.
        tau: temperature, positive; Meta-Aligner ablates 1, 0.5, 0.3 and 0.2 [P].

    Returns:
        (R, K) on the simplex, every entry above 0.99e-4.

    Raises:
        ValueError: fewer than two objectives, a reward that is not finite, tau not positive.
    """
    require(
        standardized_RK.dim() == 2 and standardized_RK.shape[1] >= 2,
        "standardized_RK.shape",
        tuple(standardized_RK.shape),
        "must be (R, K), K at least 2",
    )
    checks.positive("tau", tau)
    _finite("standardized_RK", standardized_RK)
    return floored(torch.softmax(standardized_RK / tau, -1))


def ray_preference(normalized_RK: Tensor, utopia_K: Tensor, tau: float = 1.0) -> Tensor:
    """Compute ŵ_k ∝ (z*_k − r̃_k)^(−1/τ), floored: on whose ray a response lies [R].

    With τ = 1 it is the preference under which the response scores best: it maximises the
    Tchebycheff score −max_k w_k (z*_k − r̃_k) over the simplex, where all terms are equal. So where
    that score sends w, it reads w back, which the softmax of the rewards does not; a smaller τ
    sharpens it. A gap below 1e-4, a reward at or above the utopia point, counts as 1e-4.

    Args:
        normalized_RK: rewards (R, K) as the score sees them.
        utopia_K: z*, in the same units.
        tau: temperature, positive; Meta-Aligner ablates 1, 0.5, 0.3 and 0.2 [P].

    Returns:
        (R, K) on the simplex, every entry above 0.99e-4.

    Raises:
        ValueError: fewer than two objectives, another shape of z*, a value that is not finite,
            tau not positive.
    """
    require(
        normalized_RK.dim() == 2 and normalized_RK.shape[1] >= 2,
        "normalized_RK.shape",
        tuple(normalized_RK.shape),
        "must be (R, K), K at least 2",
    )
    checks.shape("utopia_K", utopia_K, (normalized_RK.shape[1],))
    _finite("normalized_RK", normalized_RK)
    _finite("utopia_K", utopia_K)
    checks.positive("tau", tau)
    return floored(torch.softmax(-(utopia_K - normalized_RK).clamp(min=1e-4).log() / tau, -1))


def total_variation(w_hat_RK: Tensor, w_RK: Tensor) -> Tensor:
    """Compute TV(ŵ, w) = ½ Σ_k |ŵ_k − w_k|, (R,): 0 where equal, 1 where nothing is shared."""
    checks.shape("w_hat_RK", w_hat_RK, tuple(w_RK.shape))
    return (w_hat_RK - w_RK).abs().sum(-1) / 2


def acceptance_uniform(seed: int, row_R: Tensor) -> Tensor:
    """Draw the uniforms (R,) float64 in [0, 1) of the `statistical` rule.

    A function of seed and row id (int64, the sampler's own), apart from those that drew the tokens.
    """
    return uniform(seed, row_R, torch.full_like(row_R, _POSITION))


def accept(
    config: RejectionConfig,
    score_R: Tensor,
    group_R: Tensor,
    *,
    w_hat_RK: Tensor | None = None,
    w_RK: Tensor | None = None,
    uniform_R: Tensor | None = None,
    last: bool = True,
) -> tuple[Tensor, dict[str, int]]:
    """Decide which rows are kept, and how many each gate has turned away.

    The rules, for a row with score S in a group of n:

        top-fraction  it is among the ceil(q n) highest scores of its group
        threshold     S ≥ threshold
        statistical   u < exp((S − S_max) / τ_a), S_max the highest score of its group
        trade-off     TV(ŵ, w) ≤ δ
        combined      top-fraction and trade-off

    With `config.keep` = m > 0 a group keeps at most m of those that pass: the highest scores where
    the rule ranks (top-fraction, combined), elsewhere the first drawn, so that threshold's rows
    need not wait for each other and statistical's stay draws of its distribution [R].

    Args:
        score_R: floating, higher is better. group_R: int64.
        w_hat_RK, w_RK: realised and asked preference (R, K), for trade-off and combined.
        uniform_R: see `acceptance_uniform`, for statistical.
        last: no redraws follow: a group of which nothing passes falls back on its best score,
            unless config.fallback is "none".

    Returns:
        accepted_R (bool), and counts of rows: "quality" and "trade-off" (turned away by that gate,
        whatever the other said; absent where the rule has no such gate), "keep" (passed, one too
        many), "fallback" (kept though they passed no gate).

    Raises:
        ValueError: a score that is not finite (names the row), shapes that differ, a missing input.
    """
    checks.floating("score_R", score_R)
    require(score_R.dim() == 1, "score_R.shape", tuple(score_R.shape), "must be (R,)")
    checks.shape("group_R", group_R, tuple(score_R.shape))
    checks.integer("group_R", group_R)
    checks.same_device("score_R", score_R, group_R=group_R)
    _finite("score_R", score_R)
    group_R, groups = _numbered(group_R)
    passed_R = torch.ones_like(group_R, dtype=torch.bool)
    counts: dict[str, int] = {}
    if config.rule != "trade-off":
        good_R = _quality(config, score_R, group_R, groups, uniform_R)
        counts["quality"] = int((~good_R).sum())
        passed_R = passed_R & good_R
    if config.rule in ("trade-off", "combined"):
        if w_hat_RK is None or w_RK is None:
            raise ValueError(
                f"w_hat_RK, w_RK: rejection.rule={config.rule!r} needs both, see "
                "realized_preference"
            )
        checks.shape("w_RK", w_RK, (len(score_R), w_RK.shape[-1]))
        require(w_RK.shape[1] >= 2, "w_RK.shape", tuple(w_RK.shape), "K must be 2 or more")
        _finite("w_hat_RK", w_hat_RK)
        _finite("w_RK", w_RK)
        near_R = total_variation(w_hat_RK, w_RK) <= config.delta
        counts["trade-off"] = int((~near_R).sum())
        passed_R = passed_R & near_R
    kept_R = passed_R
    if config.keep:
        value_R = score_R if config.rule in _RANKED else torch.zeros_like(score_R)
        place_R = _rank(torch.where(passed_R, value_R, -math.inf), group_R, groups)
        kept_R = passed_R & (place_R < config.keep)
    counts["keep"] = int((passed_R & ~kept_R).sum())
    counts["fallback"] = 0
    if last and config.fallback == "best":
        empty_B = torch.bincount(group_R[kept_R], minlength=groups) == 0
        best_R = (_rank(score_R, group_R, groups) == 0) & empty_B[group_R]
        counts["fallback"] = int(best_R.sum())
        kept_R = kept_R | best_R
    return kept_R, counts


def redraws(config: RejectionConfig, kept_B: Tensor, drawn_B: Tensor, first: int) -> Tensor:
    """Decide how many rows each group draws in the next round, (B,) int64.

    As many as its acceptance rate so far asks for to keep `config.keep`, ceil(missing · drawn /
    max(kept, 1)), at most the `first` rows of the first round, and at most what `config.draws`
    leaves. 0 for a group that has enough [R]. The caller counts `config.rounds`.
    """
    missing_B = (config.keep - kept_B).clamp(min=0)
    kept_B = kept_B.clamp(min=1)
    wanted_B = ((missing_B * drawn_B + kept_B - 1) // kept_B).clamp(max=first)
    left_B = (config.draws - drawn_B).clamp(min=0) if config.draws else wanted_B
    return torch.minimum(wanted_B, left_B)


def surplus(
    config: RejectionConfig, accepted_R: Tensor, finished_R: Tensor, group_R: Tensor
) -> Tensor:
    """Find rows (R,) bool still decoding that can no longer be kept: stopping them alters nothing.

    Those before which, in the order of rows, `config.keep` finished rows of their group have been
    accepted. Only where a row's acceptance stands whatever the others score: threshold, trade-off.
    """
    if not config.keep or config.rule not in ("threshold", "trade-off"):
        return torch.zeros_like(finished_R)
    group_R, groups = _numbered(group_R)
    order = group_R.argsort(stable=True)
    accepted = (accepted_R & finished_R)[order].long()
    sizes_B = torch.bincount(group_R, minlength=groups)
    before = accepted.cumsum(0) - accepted
    first_B = sizes_B.cumsum(0) - sizes_B
    before = before - before[first_B][group_R[order]] if len(order) else before
    enough_R = torch.empty_like(finished_R)
    enough_R[order] = before >= config.keep
    return enough_R & ~finished_R


def hopeless_below(config: RejectionConfig, finished: Sequence[float]) -> float:
    """Give the score below which an unfinished row is given up, from its group's finished ones [R].

    The lowest score that the quality gate would let pass now, less `config.slack`, since the scores
    of unfinished text are only a guess: the threshold; the ceil(q n)-th highest finished score;
    S_max + τ_a log 0.01. −inf (never) for trade-off, and where the gate looks at the group and no
    row of it has finished.
    """
    if config.rule == "threshold":
        return config.threshold - config.slack
    if config.rule == "trade-off" or not finished:
        return -math.inf
    if config.rule == "statistical":
        return max(finished) + config.tau_a * math.log(_LEAST_CHANCE) - config.slack
    place = _top(config.q, len(finished)) - 1
    return sorted(finished, reverse=True)[place] - config.slack


def cut_back(segment_scores: Sequence[float], bar: float) -> int | None:
    """Decide whether a row is hopeless, and how much of it to keep [R].

    `segment_scores[j]` is the score of the response up to the end of its segment j. None while the
    latest is at least `bar` (`hopeless_below`): the row goes on. Otherwise the number of leading
    segments to continue from, up to the last one that ended at `bar` or above; 0 leaves the prompt
    alone. A cut row draws under its next attempt: under the same key it would draw the same text.

    Raises ValueError for a NaN score, naming the segment.
    """
    for j, score in enumerate(segment_scores):
        if math.isnan(score):
            raise ValueError(f"segment_scores: segment {j} is NaN; score it with a number")
    if not segment_scores or segment_scores[-1] >= bar:
        return None
    return max((j + 1 for j, score in enumerate(segment_scores) if score >= bar), default=0)


def _quality(
    config: RejectionConfig,
    score_R: Tensor,
    group_R: Tensor,  # int64, 0 … groups − 1
    groups: int,
    uniform_R: Tensor | None,
) -> Tensor:
    rule = _QUALITY.get(config.rule, config.rule)
    if rule == "threshold":
        return score_R >= config.threshold
    if rule == "top-fraction":
        sizes = torch.bincount(group_R, minlength=groups).tolist()
        room_B = torch.tensor([_top(config.q, n) for n in sizes], device=group_R.device)
        return _rank(score_R, group_R, groups) < room_B[group_R]
    if uniform_R is None:
        raise ValueError("uniform_R: rejection.rule='statistical' needs it; see acceptance_uniform")
    checks.shape("uniform_R", uniform_R, tuple(score_R.shape))
    score_R = score_R.double()
    best_B = score_R.new_full((groups,), -math.inf).scatter_reduce(0, group_R, score_R, "amax")
    return uniform_R < torch.exp((score_R - best_B[group_R]) / config.tau_a)


def _top(q: float, n: int) -> int:
    return math.ceil(q * n - 1e-9)  # 0.7 * 10 is a little above 7


def _numbered(group_R: Tensor) -> tuple[Tensor, int]:
    """The groups as 0 … B − 1, and B."""
    known, group_R = torch.unique(group_R, return_inverse=True)
    return group_R, len(known)


def _rank(score_R: Tensor, group_R: Tensor, groups: int) -> Tensor:
    """Each row's place in its group by falling score, from 0; ties in the order of rows."""
    order = score_R.argsort(descending=True, stable=True)
    order = order[group_R[order].argsort(stable=True)]
    sizes_B = torch.bincount(group_R, minlength=groups)
    first_B = sizes_B.cumsum(0) - sizes_B
    rank_R = torch.empty_like(group_R)
    rank_R[order] = torch.arange(len(order), device=order.device) - first_B[group_R[order]]
    return rank_R


def _finite(argument: str, x: Tensor) -> None:
    bad = ~torch.isfinite(x)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise ValueError(f"{argument}: row {row} is {x[row].tolist()}; every value must be finite")
