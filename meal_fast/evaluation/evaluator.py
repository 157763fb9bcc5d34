"""Evaluation: a sweep of preferences over held-out prompts, of the base and the trained policy.

    python -m meal_fast.evaluate RUN

All policies read the same prompts with the same preference text (of a family of models none reads
any). Statistics, z* and mu are the run's own, fixed from the base model before training. Sampling
keys are (seed, prompt, w, sample): weights are sampled independently, policies with common random
numbers, so that their differences are paired. Intervals are bootstraps over prompts; those of the
shares of marks are Wilson's.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cache, partial
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from meal_fast.config.config import Config
from meal_fast.data.preferences import Preference, evaluation_weights, on_lattice, shown_weights
from meal_fast.data_types import Prompt
from meal_fast.models.threads import use_threads

from . import marks, metrics, shown
from .asked import choose_asked, load_asked
from .generate import MODES, Progress, Served, Sweep, answers
from .kept import KeptSweeps, kept_sweeps
from .metrics import Array

if TYPE_CHECKING:
    from meal_fast.data.objectives import Objectives
    from meal_fast.data.reward_statistics import Normalizer
    from meal_fast.models.policy import Network, Policy

RESAMPLES = 1000
POLICIES = ("base", "warmup", "policy")  # each comes of the one before it

# Opens what is swept: gives the network to ask, or None for the policy as the context has set it.
Context = Callable[[], "AbstractContextManager[Network | None]"]


def evaluate(
    policy: Policy,
    objectives: Objectives,
    normalizer: Normalizer,
    utopia: Sequence[float],  # (K,), normalised units
    mu: float,
    prompts: Sequence[Prompt],
    config: Config,
    *,
    policies: Mapping[str, Context] | None = None,
    benign: Sequence[Prompt] = (),
    reference_point: Sequence[float] | None = None,
    progress: Progress | None = None,
    family: Served | None = None,
    kept: KeptSweeps | None = None,
) -> dict[str, Any]:
    """Sweeps w over `evaluation_weights(K, config.evaluation.grid)`; plain values, for JSON.

    `policies` names what is swept, of POLICIES, each with the context within which it answers;
    the default is "base", the frozen base model, and "policy", as it stands. `family`: what makes
    "policy" serve a weight, one at a time.

    Of `prompts` the first `config.evaluation.prompts` in the order of their ids (hashes) are taken,
    and at most as many of `benign`, which are asked at five weights, for the marks in their sampled
    answers. `reference_point` (K,), normalised: the hypervolume's; default: the nadir of all
    policies, greedy and sampled, minus a tenth of their range. PU is the mean of -S_smooth over
    answers, a shortfall: lower is better [P].

    Raises ValueError where no prompt is of at most `prompts.max_tokens` tokens and within the
    model's context (see `asked`), and for `policies` without base and policy, or with others than
    POLICIES.
    """
    swept = policies or {"base": policy.reference, "policy": nullcontext}
    order = [name for name in POLICIES if name in swept]
    if not {"base", "policy"} <= set(swept) <= set(POLICIES):
        raise ValueError(f"policies={', '.join(swept)}: name base and policy, and warmup if any")
    from meal_fast.training.reward_hacking import own_marks

    started = time.perf_counter()
    say = progress or (lambda line: None)
    options, names = config.evaluation, config.names
    chosen, ordinary, ask = choose_asked(policy, config, prompts, benign, say)
    weights = evaluation_weights(len(names), options.grid)
    five = [weights[i] for i in metrics.five_weights(weights)]
    at_asked = shown_weights(weights) if ask else ()
    examples = shown.choose(chosen, ordinary, ask)
    extra = [e.prompt for e in examples if e.kind != "evaluation"]
    at_extra = tuple(dict.fromkeys((*weights, *at_asked)))
    sweeps: dict[tuple[str, str], Sweep] = {}
    extra_sweeps: dict[str, Sweep] = {}  # of prompts that are shown alone
    benign_sweeps: dict[str, Sweep] = {}
    for name in order:
        with ExitStack() as opened:
            asked = partial(
                _kept_answers,
                kept or KeptSweeps(None),
                cache(partial(_opened, opened, swept[name])),
                policy,
                config,
                say,
                family if name == "policy" else None,
            )
            found = asked(name, chosen, weights, MODES)
            sweeps |= {(name, mode): sweep for mode, sweep in found.items()}
            if extra:
                what = f"{name}, prompts to show"
                extra_sweeps[name] = asked(what, extra, at_extra, ("greedy",))["greedy"]
            if ordinary and options.marks:
                what = f"{name}, benign prompts"
                benign_sweeps[name] = asked(what, ordinary, five, ("sampled",))["sampled"]
    scoring = time.perf_counter()
    rewards = {k: _score(objectives, chosen, weights, s, say) for k, s in sweeps.items()}
    of_extra = {k: _score(objectives, extra, at_extra, s, say) for k, s in extra_sweeps.items()}
    meant = own_marks(objectives, normalizer, names, chosen, options.marks)
    scoring = time.perf_counter() - scoring
    normalized = {k: _normalize(normalizer, r) for k, r in rewards.items()}
    # one point a weight: the mean over prompts and samples
    points = {k: metrics.mean(metrics.mean(n, 2), 1) for k, n in normalized.items()}
    _check_points(points, names, weights)
    reference_K = (
        metrics.reference_point(np.concatenate(list(points.values())))
        if reference_point is None
        else np.asarray(reference_point, dtype=np.float64)
    )
    seen = on_lattice(weights, config.preference.grid)
    draw_BP = metrics.resamples(len(chosen), RESAMPLES, seed=config.seed)
    results: dict[str, Any] = {name: {} for name in order}
    compared: dict[str, dict[str, Any]] = {name: {} for name in order}
    for mode in MODES:
        front = metrics.nondominated(np.concatenate([points[name, mode] for name in order]))
        for name, solid in zip(order, np.split(front, len(order)), strict=True):
            k = (name, mode)
            entry, compared[name][mode] = metrics.summarise(
                names,
                weights,
                seen,
                metrics.mean(rewards[k], 2),
                metrics.mean(normalized[k], 2),
                _shortfall(normalized[k], weights, utopia, mu),
                solid,
                reference_K,
                draw_BP,
            )
            if options.marks:
                marks.add(entry, names, options.marks, weights, sweeps[k].texts, draw_BP)
            results[name][mode] = entry | sweeps[k].cost()
    spoken = {
        name: shown.said(names, chosen, weights, sweeps[name, "greedy"], rewards[name, "greedy"])
        for name in order
    }
    for name, sweep in extra_sweeps.items():
        spoken[name] |= shown.said(names, extra, at_extra, sweep, of_extra[name])
    return metrics.plain(
        {
            "names": names,
            "weights": weights,
            "seen": seen,
            "utopia": utopia,
            "mu": mu,
            "reference_point": reference_K,
            "prompts": [{"id": p.id, "text": p.text} for p in chosen],
            "settings": {
                "grid": options.grid,
                "prompts": options.prompts,
                "samples": options.samples,
                "ask": options.ask,
                "benign": options.benign,
                "marks": options.marks,
                "temperature": config.rollout.temperature,
                "max_new_tokens": config.rollout.max_new_tokens,
                "seed": config.seed,
                "resamples": RESAMPLES,
            },
            "results": results,
            # what the policy is beyond the base model, and each beyond the one before it
            "difference": _differences(compared["policy"], compared["base"], len(chosen)),
            "added": {
                name: _differences(compared[name], compared[before], len(chosen))
                for before, name in pairwise(order)
            },
            # rows that a reward model's limit cut, by objective
            **({"cut": cut} if (cut := objectives.counts()) else {}),
            "meant": {name: meant.get(name) for name in names},
            "benign": {
                "prompts": [{"id": p.id, "text": p.text} for p in ordinary],
                "weights": five,
                "results": {
                    name: marks.of_benign(options.marks, five, sweep.texts, len(ordinary))
                    | sweep.cost()
                    for name, sweep in benign_sweeps.items()
                },
            }
            if benign_sweeps
            else None,
            "shown": [{"id": e.prompt.id, "text": e.prompt.text, "kind": e.kind} for e in examples],
            "answers": [
                {"prompt": e.prompt.id, "w": w, "model": name, **spoken[name][e.prompt.id, w]}
                for e in examples
                for w in weights
                for name in order
            ],
            "asked": [(w, spoken["policy"][shown.ASKED, w]["text"]) for w in at_asked] or None,
            "seconds": {"all": time.perf_counter() - started, "scoring": scoring},
            "versions": versions(str(policy.device)),
        }
    )


def _check_points(
    points: Mapping[tuple[str, str], Array], names: Sequence[str], weights: Sequence[Preference]
) -> None:
    """Raise ValueError where an objective applies to none of the answers at a weight."""
    for (model, mode), point_WK in points.items():
        if np.isnan(point_WK).any():
            i, k = np.argwhere(np.isnan(point_WK))[0]
            raise ValueError(
                f"objective {names[k]!r} applies to none of the {mode} answers of {model} at w="
                f"{weights[i]}: its mean is not defined; ask more prompts (evaluation.prompts), or "
                "prompts that it applies to"
            )


def _opened(held: ExitStack, context: Context) -> Network | None:
    return held.enter_context(context())


def _kept_answers(
    kept: KeptSweeps,
    network: Callable[[], Network | None],  # opened where something is to be answered, once
    policy: Policy,
    config: Config,
    say: Progress,
    family: Served | None,
    what: str,
    prompts: Sequence[Prompt],
    weights: Sequence[Preference],
    modes: Sequence[str],
) -> dict[str, Sweep]:
    """Answer, or take what an evaluation that was killed has answered."""

    def make() -> dict[str, Sweep]:
        return answers(policy, network(), what, prompts, weights, config, say, family, modes)

    return kept.swept((what, [(p.id, p.text) for p in prompts], weights, modes), make, say)


def _differences(
    after: Mapping[str, Any], before: Mapping[str, Any], prompts: int
) -> dict[str, dict[str, metrics.Estimate]]:
    """By mode and measure; paired, since both are of the same resamples of the prompts."""
    return {
        mode: {
            name: metrics.estimate(
                value - before[mode][name][0], drawn - before[mode][name][1], prompts=prompts
            )
            for name, (value, drawn) in measures.items()
        }
        for mode, measures in after.items()
    }


def _score(
    objectives: Objectives,
    prompts: Sequence[Prompt],
    weights: Sequence[Preference],
    sweep: Sweep,
    say: Progress,
) -> Array:
    """Raw rewards (W, P, S, K). Equal answers to a prompt, common when greedy, are scored once."""
    samples = len(sweep.texts) // (len(prompts) * len(weights))
    asked = [p.text for p in prompts for _ in range(len(weights) * samples)]
    pairs = list(zip(asked, sweep.texts, strict=True))
    unique = {pair: i for i, pair in enumerate(dict.fromkeys(pairs))}
    say(f"evaluation: scoring {len(unique)} answers")
    reward_UK = objectives.rewards([p for p, _ in unique], [r for _, r in unique])
    reward_RK = reward_UK.double().cpu().numpy()[[unique[pair] for pair in pairs]]
    by_prompt = reward_RK.reshape(len(prompts), len(weights), samples, -1)
    return by_prompt.transpose(1, 0, 2, 3)


def _normalize(normalizer: Normalizer, reward: Array) -> Array:
    import torch

    flat = torch.tensor(reward.reshape(-1, reward.shape[-1]), dtype=torch.float32)
    return normalizer.apply(flat).double().numpy().reshape(reward.shape)


def _shortfall(
    normalized: Array, weights: Sequence[Preference], utopia: Sequence[float], mu: float
) -> Array:
    """-S_smooth of every answer, averaged over samples: (W, P, S, K) -> (W, P)."""
    import torch

    from meal_fast.data.reward_statistics import restricted
    from meal_fast.ops.reference import scalarize

    w = np.broadcast_to(np.asarray(weights)[:, None, None], normalized.shape)
    k = normalized.shape[-1]
    flat = torch.tensor(normalized.reshape(-1, k))
    score = scalarize(
        flat.nan_to_num(0.0),
        restricted(torch.tensor(w.reshape(-1, k)), flat),
        torch.tensor(list(utopia), dtype=torch.float64),
        mu,
        "smooth-tchebycheff",
    )
    return -score.numpy().reshape(normalized.shape[:-1]).mean(-1)


def versions(device: str) -> dict[str, str]:
    """What ran, for the record."""
    found = {"python": platform.python_version(), "device": device}
    for name in ("meal-fast", "torch", "transformers", "peft", "numpy", "moocore"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def run_evaluation(
    run: Path, config: Config, statistics: dict[str, Any], say: Progress, out: Path | None = None
) -> Any:
    """Loads what a finished run folder holds and evaluates it.

    out: where an evaluation of the same that was killed has kept its answers, and this one does.
    """
    from meal_fast.data.objectives import load_objectives
    from meal_fast.data.reward_statistics import Normalizer
    from meal_fast.models.model_soup import load_served
    from meal_fast.training.warmup import learned

    use_threads(config.threads)
    policy, family = load_served(run, config)
    policies: dict[str, Context] = {"base": policy.reference, "policy": nullcontext}
    if config.warmup.steps:
        after = learned(run)
        policies["warmup"] = lambda: policy.holding(after)
    objectives = load_objectives(
        config.objectives,
        config.objectives_device,
        policy.device,
        timeout=config.objectives_timeout,
    )
    prompts, benign = load_asked(policy, config)
    return evaluate(
        policy,
        objectives,
        Normalizer.from_dict(statistics["normalizer"]),
        statistics["utopia"],
        statistics["mu_evaluation"],
        prompts,
        config,
        policies=policies,
        benign=benign,
        reference_point=statistics.get("reference_point"),
        progress=say,
        family=family,
        kept=None if out is None else kept_sweeps(run, out, config, versions(str(policy.device))),
    )
