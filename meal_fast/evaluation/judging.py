"""How methods of a comparison are held to each other: intervals over seeds, leaders, the claims.

    S  seeds of a method    B  bootstrap resamples

An interval resamples seeds and, where there are enough of them, the prompts that all seeds share.
Of so few seeds percentiles are far too narrow: it is value ± t(S − 1) · sqrt(S/(S − 1)) · the
bootstrap's standard error, which over seeds alone is Student's interval. Below three seeds there
is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from meal_fast.config.cli import option_named, values_of
from meal_fast.config.config import Config

from . import metrics
from .claims import Claim, Side
from .metrics import Array, Estimate

if TYPE_CHECKING:
    from .comparison import Method

RESAMPLES = 1000
FEWEST_SEEDS = 3
# measure -> whether more is better; "spearman NAME", one an objective, beside them
MEASURES = {
    "pu": False,
    "pu_seen": False,
    "pu_unseen": False,
    "pu_interior": False,
    "hypervolume": True,
    "largest_gap": False,
    "reach": True,
    "expected_utility": True,
    "distance": False,
}
Quantities = dict[str, Array]
# By method and seed: the measures, and those under resampled prompts, (B,) or (1,).
Found = Mapping[tuple["Method", int], tuple[Quantities, Quantities]]


def over_seeds(value_S: Sequence[float] | Array, drawn: Array | None = None) -> Estimate:
    """Give the mean over seeds with its interval, see the head of this file.

    `drawn` (B, S) or (1, S): each seed's figure under resampled prompts; None: prompts are fixed.
    """
    values = np.asarray(value_S, dtype=np.float64)
    seeds = len(values)
    if seeds < FEWEST_SEEDS:
        return Estimate(float(values.mean()))
    sample = values[None] if drawn is None else drawn
    draw_BS = metrics.resamples(seeds, RESAMPLES, seed=1)  # not that of as many prompts
    error = (draw_BS * sample).sum(1).std() * np.sqrt(seeds / (seeds - 1))
    from scipy import stats

    half = float(stats.t.ppf(0.975, seeds - 1) * error)
    mean = float(values.mean())
    return Estimate(mean, mean - half, mean + half)


def gain(better: Method, worse: Method, measure: str, found: Found) -> tuple[Estimate, int] | None:
    """Give by how much a measure is better, paired over common seeds, and the number of these.

    None where they have no seed in common, or one lacks the measure.
    """
    seeds = [seed for method, seed in found if method == better and (worse, seed) in found]
    pairs = [(found[better, seed], found[worse, seed]) for seed in seeds]
    if not pairs or any(measure not in side[0] for pair in pairs for side in pair):
        return None
    sign = 1.0 if MEASURES.get(measure, True) else -1.0  # of Spearman more is better
    difference = over_seeds(
        [sign * float(a[measure] - b[measure]) for (a, _), (b, _) in pairs],
        np.stack([sign * (a[measure] - b[measure]) for (_, a), (_, b) in pairs], -1),
    )
    return difference, len(seeds)


def leaders(methods: Sequence[Method], found: Mapping[str, Found]) -> list[dict[str, Any]]:
    """Name for each of the leading measures the best method and the next, by their means.

    With the gain of the one on the other, paired by seed. `found`: by mode. Fewer than two methods
    have none.
    """
    out: list[dict[str, Any]] = []
    for measure in _leading(methods, found):
        mode = "greedy" if measure == "distance" else "sampled"
        sign = 1.0 if MEASURES.get(measure, True) else -1.0
        values: dict[Method, list[float]] = {method: [] for method in methods}
        for (method, _), (value, _) in found[mode].items():
            if method in values:
                values[method].append(float(value[measure]))
        means = {method: sum(each) / len(each) for method, each in values.items()}
        best, following = sorted(methods, key=lambda m: -sign * means[m])[:2]
        held = gain(best, following, measure, found[mode])
        if held is not None:
            out.append(
                {
                    "measure": measure,
                    "mode": mode,
                    "best": best.name,
                    "value": means[best],
                    "next": following.name,
                    "gain": held[0],
                    "seeds": held[1],
                }
            )
    return out


def _leading(methods: Sequence[Method], found: Mapping[str, Found]) -> list[str]:
    """Hypervolume, PU, how each objective follows its weight, and, if known, the true front."""
    if len(methods) < 2:
        return []
    sampled = next(iter(found["sampled"].values()))[0]
    followed = [name for name in sampled if name.startswith("spearman ")]
    known = [value for value, _ in found["greedy"].values()]
    truth = ["distance"] if all("distance" in value for value in known) else []
    return ["hypervolume", "pu", *followed, *truth]


def method_of(side: Side, base: Config, methods: Sequence[Method]) -> Method | None:
    """The method among `methods` that a claim means, or None where it was not run."""
    shared = values_of(base)
    try:
        asked = {option_named(short, base): value for short, value in side.options}
    except ValueError:
        return None  # no recipe here has that option
    wanted = {option: value for option, value in asked.items() if shared[option] != value}
    return next((m for m in methods if m.recipe == side.recipe and dict(m.changes) == wanted), None)


def judge(
    claim: Claim,
    base: Config,
    methods: Sequence[Method],
    found: Found,
) -> dict[str, Any]:
    """A claim and what became of it: held, contradicted, not shown or not run.

    By the interval of the difference, paired over common seeds, in the direction of the claim.
    """
    said = {"claim": claim.text, "source": claim.source, "measure": claim.measure}
    sides = [method_of(side, base, methods) for side in (claim.better, claim.worse)]
    better, worse = sides
    if better is None or worse is None or better == worse:
        return said | {"verdict": "not run"}
    held = gain(better, worse, claim.measure, found)
    if held is None:
        return said | {"verdict": "not run"}
    difference, seeds = held
    if difference.low is None or difference.high is None:
        verdict = f"not shown: fewer than {FEWEST_SEEDS} common seeds"
    elif difference.low > 0:
        verdict = "held"
    elif difference.high < 0:
        verdict = "contradicted"
    else:
        verdict = "not shown"
    return said | {
        "verdict": verdict,
        "better": better.name,
        "worse": worse.name,
        "seeds": seeds,
        "gain": difference,  # positive: as claimed
    }
