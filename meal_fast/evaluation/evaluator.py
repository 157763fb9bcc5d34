"""Evaluation: a sweep of preferences over held-out prompts, base model beside trained policy.

    python -m meal_fast.evaluate RUN

Both models read the same prompts with the same preference text (of a family of models none reads
any). Statistics, z* and mu are the run's own, fixed from the base model before training. Sampling
keys are (seed, prompt, w, sample): weights are sampled independently, base and trained with common
random numbers, so that their difference is paired; all intervals are bootstraps over prompts.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from meal_fast.config.config import Config
from meal_fast.data.preferences import Preference, evaluation_weights, on_lattice, shown_weights
from meal_fast.data_types import Prompt
from meal_fast.models.threads import use_threads

from . import metrics
from .generate import MODES, Progress, Served, Sweep, answers
from .metrics import Array

if TYPE_CHECKING:
    from meal_fast.data.objectives import Objectives
    from meal_fast.data.reward_statistics import Normalizer
    from meal_fast.models.policy import Policy

RESAMPLES = 1000
MODELS = ("base", "trained")


def evaluate(
    policy: Policy,
    objectives: Objectives,
    normalizer: Normalizer,
    utopia: Sequence[float],  # (K,), normalised units
    mu: float,
    prompts: Sequence[Prompt],
    config: Config,
    *,
    reference_point: Sequence[float] | None = None,
    progress: Progress | None = None,
    family: Served | None = None,
) -> dict[str, Any]:
    """Sweeps w over `evaluation_weights(K, config.evaluation.grid)`; plain values, for JSON.

    Of `prompts` the first `config.evaluation.prompts` in the order of their ids (hashes) are taken.
    `reference_point` (K,), normalised: the hypervolume's; default: the nadir of base and trained,
    greedy and sampled, minus a tenth of their range. PU is the mean of -S_smooth over answers, a
    shortfall: lower is better [P]. `family`: what makes `policy` serve a weight, one at a time.
    Raises ValueError where no prompt is of at most `prompts.max_tokens` tokens.
    """
    limit = config.prompts.max_tokens
    fitting = [p for p in prompts if len(policy.encode_prompt(p.text)) <= limit]
    if not fitting:
        raise ValueError(
            f"prompts.evaluation: none of {len(prompts)} prompts has at most {limit} tokens; raise "
            "prompts.max_tokens"
        )
    started = time.perf_counter()
    say = progress or (lambda line: None)
    options = config.evaluation
    chosen = tuple(sorted(fitting, key=lambda p: p.id)[: options.prompts])
    weights = evaluation_weights(len(config.names), options.grid)
    seen = on_lattice(weights, config.preference.grid)
    sweeps: dict[tuple[str, str], Sweep] = {}
    for model in MODELS:
        base = model == "base"
        with policy.reference() if base else nullcontext() as network:
            of = None if base else family
            found = answers(policy, network, model, chosen, weights, config, say, of)
        sweeps |= {(model, mode): sweep for mode, sweep in found.items()}
    shown, asked = shown_weights(weights), None
    if options.ask:
        prompt = (Prompt("asked", options.ask),)
        found = answers(
            policy, None, "trained, one more prompt", prompt, shown, config, say, family
        )
        asked = list(zip(shown, found["greedy"].texts, strict=True))
    scoring = time.perf_counter()
    rewards = {k: _score(objectives, chosen, weights, s, say) for k, s in sweeps.items()}
    scoring = time.perf_counter() - scoring
    normalized = {k: _normalize(normalizer, r) for k, r in rewards.items()}
    # one point a weight: the mean over prompts and samples
    points = {k: n.mean((1, 2)) for k, n in normalized.items()}
    reference_K = (
        metrics.reference_point(np.concatenate(list(points.values())))
        if reference_point is None
        else np.asarray(reference_point, dtype=np.float64)
    )
    draw_BP = metrics.resamples(len(chosen), RESAMPLES, seed=config.seed)
    results: dict[str, Any] = {model: {} for model in MODELS}
    difference: dict[str, Any] = {}
    for mode in MODES:
        front = metrics.nondominated(np.concatenate([points[m, mode] for m in MODELS]))
        drawn = {}
        for model, solid in zip(MODELS, np.split(front, 2), strict=True):
            k = (model, mode)
            pu_WP = _shortfall(normalized[k], weights, utopia, mu)
            entry, drawn[model] = metrics.summarise(
                config.names,
                weights,
                seen,
                rewards[k].mean(2),
                normalized[k].mean(2),
                pu_WP,
                solid,
                reference_K,
                draw_BP,
            )
            results[model][mode] = entry | sweeps[k].cost()
        difference[mode] = {
            name: metrics.estimate(
                drawn["trained"][name][0] - drawn["base"][name][0],
                drawn["trained"][name][1] - drawn["base"][name][1],
                prompts=len(chosen),
            )
            for name in drawn["base"]
        }
    return metrics.plain(
        {
            "names": config.names,
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
                "temperature": config.rollout.temperature,
                "max_new_tokens": config.rollout.max_new_tokens,
                "seed": config.seed,
                "resamples": RESAMPLES,
            },
            "results": results,
            "difference": difference,
            "answers": _answers(config.names, chosen, weights, sweeps, rewards),
            "asked": asked,
            "seconds": {"all": time.perf_counter() - started, "scoring": scoring},
            "versions": versions(str(policy.device)),
        }
    )


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

    from meal_fast.ops.reference import scalarize

    w = np.broadcast_to(np.asarray(weights)[:, None, None], normalized.shape)
    k = normalized.shape[-1]
    score = scalarize(
        torch.tensor(normalized.reshape(-1, k)),
        torch.tensor(w.reshape(-1, k)),
        torch.tensor(list(utopia), dtype=torch.float64),
        mu,
        "smooth-tchebycheff",
    )
    return -score.numpy().reshape(normalized.shape[:-1]).mean(-1)


def _answers(
    names: Sequence[str],
    prompts: Sequence[Prompt],
    weights: Sequence[Preference],
    sweeps: dict[tuple[str, str], Sweep],
    rewards: dict[tuple[str, str], Array],
    shown: int = 4,
) -> list[dict[str, Any]]:
    """Greedy answers of both models at five weights, to the first few prompts."""
    out = []
    for i, prompt in enumerate(prompts[:shown]):
        for j in metrics.five_weights(weights):
            for model in MODELS:
                reward_K = rewards[model, "greedy"][j, i, 0]
                out.append(
                    {
                        "prompt": prompt.id,
                        "w": weights[j],
                        "model": model,
                        "text": sweeps[model, "greedy"].texts[i * len(weights) + j],
                        "reward": dict(zip(names, reward_K, strict=True)),
                    }
                )
    return out


def versions(device: str) -> dict[str, str]:
    """What ran, for the record."""
    found = {"python": platform.python_version(), "device": device}
    for name in ("meal-fast", "torch", "transformers", "peft", "numpy", "moocore"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def run_evaluation(run: Path, config: Config, statistics: dict[str, Any], say: Progress) -> Any:
    """Loads what a finished run folder holds and evaluates it."""
    from meal_fast.data.objectives import load_objectives
    from meal_fast.data.prompts import load_prompts
    from meal_fast.data.reward_statistics import Normalizer
    from meal_fast.models.model_soup import load_served

    use_threads(config.threads)
    policy, family = load_served(run, config)
    objectives = load_objectives(config.objectives, config.objectives_device, policy.device)
    # a set of its own is held out as a whole; of the training set, one split is
    prompts = load_prompts(
        config.prompts.evaluation or config.prompts.train,
        "evaluation",
        whole=bool(config.prompts.evaluation),
        count_tokens=lambda text: len(policy.encode_prompt(text)),
        max_tokens=config.prompts.max_tokens,
    )
    return evaluate(
        policy,
        objectives,
        Normalizer.from_dict(statistics["normalizer"]),
        statistics["utopia"],
        statistics["mu_evaluation"],
        prompts,
        config,
        reference_point=statistics.get("reference_point"),
        progress=say,
        family=family,
    )
