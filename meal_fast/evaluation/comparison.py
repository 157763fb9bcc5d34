"""What a comparison of methods finds in its runs' evaluations: pure functions, no model, no torch.

    S  seeds of a method    B  bootstrap resamples    W, P, K  as in metrics.py

All runs are measured by one set of statistics, one z*, one mu and one hypervolume reference point.
A method's figure is the mean over its seeds, with the interval of judging.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meal_fast.config.config import Config

from . import metrics as measures
from .claims import CLAIMS, Claim
from .judging import RESAMPLES, Quantities, judge, leaders, over_seeds
from .metrics import FEW, Array, Estimate

MODES = ("sampled", "greedy")
Distance = Callable[[Array], Array]  # rewards (N, K) -> distance of each to the true front (N,)


@dataclass(frozen=True)
class Method:
    """A recipe, and the options (`section.option`, value) at which it differs from the others."""

    recipe: str
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """`grid-grpo beta=0.6`."""
        said = (f"{option.rpartition('.')[2]}={shown(value)}" for option, value in self.changes)
        return " ".join([self.recipe, *said])

    @property
    def folder(self) -> str:
        """Of its runs: `grid-grpo/grpo.beta=0.6`."""
        parts = "+".join(f"{option}={shown(value)}" for option, value in self.changes)
        return "/".join(filter(None, [self.recipe, parts]))


def shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).replace("/", "_")


@dataclass(frozen=True)
class Finished:
    """A run that has been trained and evaluated."""

    method: Method
    seed: int
    evaluation: dict[str, Any]  # evaluation.json
    metrics: Sequence[dict[str, Any]]  # metrics.jsonl
    peak_bytes: int | None  # the most memory that training held, where it is known


def compare(
    runs: Sequence[Finished],
    base: Config,
    tokens: int,
    distance: Distance | None = None,
    claims: Sequence[Claim] = CLAIMS,
) -> dict[str, Any]:
    """The whole comparison, as plain values for JSON.

    `base` is the configuration that the runs share, `tokens` the budget of each, `distance`, where
    the truth is known, that of raw rewards to the true front. Raises ValueError for runs that were
    not measured alike.
    """
    measured_alike(runs)
    first = runs[0].evaluation
    names, weights = first["names"], [tuple(w) for w in first["weights"]]
    methods = list(dict.fromkeys(run.method for run in runs))
    everything = [
        normalized(run.evaluation, model, mode).mean(1)
        for run in runs
        for model in run.evaluation["results"]
        for mode in MODES
    ]
    reference_K = measures.reference_point(np.concatenate(everything))
    prompts = len(first["prompts"])
    draw_BP = measures.resamples(prompts, RESAMPLES, seed=0) if prompts >= FEW else None

    def measure(run: Finished, model: str, mode: str) -> tuple[Quantities, Quantities]:
        return quantities_of(run.evaluation, model, mode, reference_K, draw_BP, distance)

    found = {mode: {(r.method, r.seed): measure(r, "policy", mode) for r in runs} for mode in MODES}
    # the base model is the same in every run; its sampled answers differ with the seed
    most = max(methods, key=lambda m: sum(run.method == m for run in runs))
    same = [run for run in runs if run.method == most]
    before = {"base": "base model"}
    if all("warmup" in run.evaluation["results"] for run in runs):
        before["warmup"] = "warm start"
    entries = [
        {
            "name": name,
            "recipe": None,
            "seeds": [run.seed for run in same],
            **_summary(
                same,
                model,
                {mode: [measure(run, model, mode) for run in same] for mode in MODES},
            ),
        }
        for model, name in before.items()
    ]
    for method in methods:
        own = [run for run in runs if run.method == method]
        entries.append(
            {
                "name": method.name,
                "recipe": method.recipe,
                "changes": dict(method.changes),
                "seeds": [run.seed for run in own],
                **_summary(
                    own,
                    "policy",
                    {mode: [found[mode][method, run.seed] for run in own] for mode in MODES},
                ),
                "cost": cost([run.metrics for run in own], [run.peak_bytes for run in own]),
                "asked": own[0].evaluation.get("asked"),
            }
        )
    for mode in MODES:
        points = [point for entry in entries for point in entry["points"][mode]]
        values = np.array([[point["normalized"][name] for name in names] for point in points])
        for point, solid in zip(points, measures.nondominated(values), strict=True):
            point["nondominated"] = bool(solid)
    return measures.plain(
        {
            "names": names,
            "weights": weights,
            "seen": first["seen"],
            "utopia": first["utopia"],
            "mu": first["mu"],
            "reference_point": reference_K,
            "prompts": prompts,
            "settings": first["settings"],
            "tokens": tokens,
            "methods": entries,
            "leaders": leaders([m for m in methods if not m.changes], found),
            "claims": [judge(claim, base, methods, found["sampled"]) for claim in claims],
        }
    )


def measured_alike(runs: Sequence[Finished]) -> None:
    """Raises ValueError where two runs' evaluations are not on one scale."""
    for run in runs:
        for what in ("names", "weights", "utopia", "mu", "prompts"):
            if run.evaluation[what] != runs[0].evaluation[what]:
                raise ValueError(
                    f"{run.method.name}, seed {run.seed}: evaluated with other {what} than "
                    f"{runs[0].method.name}, seed {runs[0].seed}; use another folder for it"
                )
        if "prompt_pu" not in run.evaluation["results"]["policy"]["sampled"]:
            raise ValueError(
                f"{run.method.name}, seed {run.seed}: evaluated by a version that kept no figures "
                "by prompt; remove its evaluation.json"
            )


def normalized(evaluation: dict[str, Any], model: str, mode: str) -> Array:
    """Normalised rewards of a sweep, (W, P, K): means over a prompt's samples."""
    return np.asarray(evaluation["results"][model][mode]["prompt_normalized"], dtype=np.float64)


def quantities(
    weights: Sequence[tuple[float, ...]],
    seen: Sequence[bool],
    names: Sequence[str],
    reference_K: Array,
    point: Array,  # (..., W, K), mean normalised rewards
    pu: Array,  # (..., W), mean shortfall
) -> Quantities:
    """Every measure of a sweep; what its weights do not allow is left out.

    `reach`: what the whole weight on an objective buys of it against none, mean over objectives.
    `pu_interior`: over weights of at least 0.6/K on every objective, for K = 2 from 0.3 to 0.7 [R].
    Spearman of rewards that do not move at all counts as 0.
    """
    w_WK = np.asarray(weights, dtype=np.float64)
    out = {"pu": pu.mean(-1)}
    for name, keep in (
        ("pu_seen", np.asarray(seen)),
        ("pu_unseen", ~np.asarray(seen)),
        ("pu_interior", w_WK.min(1) >= 0.6 / len(names) - 1e-9),
    ):
        if keep.any():
            out[name] = pu[..., keep].mean(-1)
    out["hypervolume"] = measures.hypervolume(point, reference_K)
    for k, name in enumerate(names):
        out[f"spearman {name}"] = np.nan_to_num(measures.spearman(w_WK[:, k], point[..., k]))
    out["largest_gap"] = measures.gaps(point, measures.neighbours(weights)).max(-1)
    out["reach"] = measures.ends(weights, point).mean(-1)
    out["expected_utility"] = measures.expected_utility(weights, point)
    return out


def quantities_of(
    evaluation: dict[str, Any],
    model: str,
    mode: str,
    reference_K: Array,
    draw_BP: Array | None,
    distance: Distance | None,
) -> tuple[Quantities, Quantities]:
    """The measures of one sweep, and under resampled prompts (B,), or (1,) where there are none."""
    entry = evaluation["results"][model][mode]
    weights, names = [tuple(w) for w in evaluation["weights"]], evaluation["names"]
    norm_WPK, pu_WP = normalized(evaluation, model, mode), np.asarray(entry["prompt_pu"])
    fixed = (weights, evaluation["seen"], names, reference_K)
    value = quantities(*fixed, measures.mean(norm_WPK, 1), pu_WP.mean(1))
    if mode == "greedy" and distance is not None:
        raw_WK = measures.mean(np.asarray(entry["prompt_rewards"], dtype=np.float64), 1)
        value["distance"] = np.asarray(distance(raw_WK).mean())
    if draw_BP is None:
        return value, {name: np.reshape(x, 1) for name, x in value.items()}
    drawn = quantities(*fixed, measures.resampled_means(norm_WPK, draw_BP), draw_BP @ pu_WP.T)
    return value, {name: drawn.get(name, np.reshape(x, 1)) for name, x in value.items()}


def _together(pairs: Sequence[tuple[Quantities, Quantities]]) -> dict[str, Estimate]:
    """Every measure that all seeds have, over the seeds."""
    common = [name for name in pairs[0][0] if all(name in value for value, _ in pairs)]
    return {
        name: over_seeds(
            [float(value[name]) for value, _ in pairs],
            np.stack([drawn[name] for _, drawn in pairs], -1),
        )
        for name in common
    }


def _summary(
    runs: Sequence[Finished], model: str, pairs: dict[str, list[tuple[Quantities, Quantities]]]
) -> dict[str, Any]:
    names, weights = runs[0].evaluation["names"], runs[0].evaluation["weights"]
    points: dict[str, list[dict[str, Any]]] = {}
    for mode in MODES:
        norm_SWK = np.stack([measures.mean(normalized(r.evaluation, model, mode), 1) for r in runs])
        entries = [r.evaluation["results"][model][mode] for r in runs]
        pu_SW = np.stack([np.asarray(e["prompt_pu"]).mean(1) for e in entries])
        points[mode] = [
            {
                "w": w,
                "normalized": dict(zip(names, norm_SWK[:, i].mean(0), strict=True)),
                "by_seed": norm_SWK[:, i],
                "pu": over_seeds(pu_SW[:, i]),
            }
            for i, w in enumerate(weights)
        ]
    return {
        "points": points,
        "marks": _marks([r.evaluation["results"][model]["sampled"] for r in runs]),
        "benign": _marks([_of_benign(r.evaluation, model) for r in runs]),
        "measures": {mode: _together(pairs[mode]) for mode in MODES},
        "by_seed": {mode: [value for value, _ in pairs[mode]] for mode in MODES},
    }


def _of_benign(evaluation: dict[str, Any], model: str) -> dict[str, Any]:
    benign = evaluation.get("benign")
    return benign["results"][model] if benign else {}


def _marks(sweeps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The shares of sampled answers that bear each mark, at each weight; none were counted: []."""
    if not all("prompt_marks" in sweep for sweep in sweeps):
        return []
    share = [  # a seed: mark -> (W,), means over prompts
        {mark: np.asarray(by_WP).mean(1) for mark, by_WP in sweep["prompt_marks"].items()}
        for sweep in sweeps
    ]
    return [
        {
            "w": point["w"],
            "marks": {
                mark: _within(over_seeds([of[mark][i] for of in share])) for mark in share[0]
            },
        }
        for i, point in enumerate(sweeps[0]["points"])
    ]


def _within(e: Estimate) -> Estimate:
    """A share's interval has no part below 0 and above 1."""
    if e.low is None or e.high is None:
        return e
    return Estimate(e.value, max(0.0, e.low), min(1.0, e.high))


def cost(
    metrics: Sequence[Sequence[dict[str, Any]]], peaks: Sequence[int | None]
) -> dict[str, Any]:
    """Of the mean run: tokens generated, updates, seconds, acceptance; the highest peak of memory.

    Acceptance, the share of drawn responses that was kept, is known of recipes that reject.
    """
    accepted = [u["acceptance"] for run in metrics for u in run if u.get("acceptance") is not None]
    known = [peak for peak in peaks if peak is not None]
    count = len(metrics)
    return {
        "tokens": sum(u["tokens"] for run in metrics for u in run) / count,
        "updates": sum(len(run) for run in metrics) / count,
        "seconds": sum(sum(u["seconds"].values()) for run in metrics for u in run) / count,
        "peak_bytes": max(known) if known else None,
        "acceptance": sum(accepted) / len(accepted) if accepted else None,
    }
