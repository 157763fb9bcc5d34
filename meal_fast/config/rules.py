"""The rules that hold between options. They follow what a recipe is made of, never its name.

Checks of a single value stand at its section, in `config.py` and `algorithms.py`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from meal_fast.common import require

from .recipes import OWN_SECTIONS, RECIPES, RecipeSpec, named, spec_of
from .schema import check_device, check_names

if TYPE_CHECKING:
    from .config import Config


MOST_POINTS = 100_000  # of a lattice: each is a tuple, and in a sweep many answers


def check_run(config: Config) -> None:
    """Raise ValueError for a recipe, objectives or run options that are none by themselves."""
    known = f"unknown; choose from {', '.join(RECIPES)}"
    require(config.recipe in RECIPES, "recipe", config.recipe, known)
    check_device("objectives_device", config.objectives_device)
    names = [o.partition("=")[0] for o in config.objectives]
    several = len(names) >= 2 and all("=" in o for o in config.objectives)
    require(several, "objectives", config.objectives, "two or more, each NAME=SOURCE")
    check_names(names)
    limit, remedy = config.objectives_timeout, "seconds; 0 is no limit"
    require(limit >= 0, "objectives_timeout", limit, remedy)
    z, remedy = config.score.utopia, f"needs {len(names)} numbers, one per objective"
    require(len(z) in (0, len(names)), "score.utopia", z, remedy)
    ok = 0 <= config.threads <= 1024
    require(ok, "threads", config.threads, "must be 0 (automatic) or 1 to 1024")
    require(config.checkpoint_every >= 1, "checkpoint_every", config.checkpoint_every, "≥ 1")


def check(config: Config) -> None:
    """Raise ValueError for options that do not go together; `check_run` has passed."""
    spec = spec_of(config)
    _check_policy(config, spec)
    _check_preferences(config)
    _check_warmup(config)
    _check_outer(config, spec)
    _check_loss(config, spec)
    _check_sections(config, spec)
    _check_collector(config, spec)
    _check_shard(config, spec)


def _check_policy(config: Config, spec: RecipeSpec) -> None:
    text, tuning, recipe = config.policy.preference_text, config.policy.tuning, config.recipe
    steered = f"the policy of {recipe} is steered by that text; choose bar or numbers"
    if text == "scores":
        reader = named(lambda other: other.reads == "scores")
        steered = f"{recipe} reads no rewards, recipe {reader} does; choose bar or numbers"
    ok = text == spec.reads or (text not in ("none", "scores") and spec.reads == "preference")
    require(ok, "policy.preference_text", text, steered)
    guides = named(lambda other: other.guide)
    remedy = f"is for the guide of recipe {guides!r}; choose lora or full"
    require(spec.guide or tuning != "bilinear", "policy.tuning", tuning, remedy)


def _check_preferences(config: Config) -> None:
    options, k = config.preference, len(config.names)
    for name, side in (("preference", options.grid), ("evaluation", config.evaluation.grid)):
        points = math.comb(side + k - 2, k - 1) if side else 0
        remedy = f"with {k} objectives that is more than {MOST_POINTS} preferences; lower it"
        require(points <= MOST_POINTS, f"{name}.grid", side, remedy)
    m = options.per_prompt
    if m == 1:
        return
    if options.mates == "rotations":
        remedy = f"{k} objectives have {k} rotations; lower it, or set preference.mates=draws"
        require(m <= k, "preference.per_prompt", m, remedy)
        remedy = "with preference.per_prompt every task asks its rotations by itself; leave it out"
        require(not options.rotate, "preference.rotate", True, remedy)
    elif options.grid:
        points = math.comb(options.grid + k - 2, k - 1)
        remedy = f"preference.grid={options.grid} has {points} preferences; lower it"
        require(m <= points, "preference.per_prompt", m, remedy)
    ahead = config.meal.update == "hypergradient"
    remedy = "the hypergradient holds half of the prompts out, one preference each; leave it out"
    require(not ahead, "preference.per_prompt", m, remedy)


def _check_warmup(config: Config) -> None:
    options = config.warmup
    if not options.steps:
        return
    for entry in options.answers:
        name, equals, source = entry.partition("=")
        names = ", ".join(config.names)
        remedy = f"names no objective of {names}: give NAME=SOURCE for these, or warmup.steps=0"
        require(name in config.names and bool(equals and source), "warmup.answers", entry, remedy)
        own = source == "own" or (source.startswith("own:") and source[4:].strip())
        fit = own or source == "packaged:refusals" or source.endswith(".jsonl")
        remedy = "SOURCE is own, own:INSTRUCTION, packaged:refusals or a .jsonl file"
        require(bool(fit), "warmup.answers", entry, remedy)
    once = len({entry.partition("=")[0] for entry in options.answers}) == len(options.answers)
    require(once, "warmup.answers", options.answers, "name an objective once")


def _check_outer(config: Config, spec: RecipeSpec) -> None:
    n, least = config.meta.n_inner, spec.n_inner
    remedy = (
        f"recipe {config.recipe!r} needs at least {least} inner updates a task: with 1 Reptile is "
        "joint training; raise it, or choose a recipe without an outer loop"
    )
    require(n >= least, "meta.n_inner", n, remedy)
    if config.meta.parallel:
        backend, tuning = config.rollout.backend, config.policy.tuning
        for ok, reason in (
            (bool(spec.at_once), f"recipe {config.recipe!r} has no tasks that go at once"),
            (tuning == "lora", f"policy.tuning={tuning!r} has no adapters to stack"),
            (backend != "generate", f"rollout.backend={backend!r} takes one adapter: use engine"),
        ):
            require(ok, "meta.parallel", True, f"{reason}; or leave it out")


def _check_loss(config: Config, spec: RecipeSpec) -> None:
    n, remedy = config.rollout.samples, f"recipe {config.recipe!r} pairs a prompt's samples: even"
    require(n % 2 == 0 or not spec.pairs, "rollout.samples", n, remedy)
    beta, remedy = config.grpo.beta, "DPO's beta must be positive"
    require(beta > 0 or not spec.needs_beta, "grpo.beta", beta, remedy)


def _check_sections(config: Config, spec: RecipeSpec) -> None:
    for section in OWN_SECTIONS:
        if section in spec.sections:
            continue
        held = getattr(config, section)
        users = " or ".join(n for n, other in RECIPES.items() if section in other.sections)
        unused = f"recipe {config.recipe!r} has no use for it; leave it out, or use {users}"
        for f in dataclasses.fields(held):
            value = getattr(held, f.name)
            require(value == f.default, f"{section}.{f.name}", value, unused)


def _check_collector(config: Config, spec: RecipeSpec) -> None:
    backend, remedy = (
        config.rollout.backend,
        f"recipe {config.recipe!r} rejects on the engine alone",
    )
    require(backend == "engine" or not spec.rejects, "rollout.backend", backend, remedy)
    shard, remedy = config.mesh.shard, "vLLM is given whole weights; use rollout.backend=engine"
    require(backend != "vllm" or shard == 1, "mesh.shard", shard, remedy)
    if config.ric.data:
        remedy = "a data set generates no tokens, and would never end: set meta.steps instead"
        require(not config.meta.tokens, "meta.tokens", config.meta.tokens, remedy)
    if config.meal.update == "hypergradient":
        policy, n = config.meal.policy, config.rollout.prompts
        require(policy == "sft", "meal.policy", policy, "the hypergradient needs sft")
        require(n >= 2, "rollout.prompts", n, "the hypergradient holds half of them out: 2 or more")


def _check_shard(config: Config, spec: RecipeSpec) -> None:
    shard, tuning, backend = config.mesh.shard, config.policy.tuning, config.rollout.backend
    if shard == 1:
        return
    full, ahead = tuning == "full", config.meal.update == "hypergradient"
    for ok, reason in (
        (not spec.guide, f"the guide of recipe {config.recipe!r} runs its model twice in a pass"),
        (
            not (full and spec.models),
            f"recipe {config.recipe!r} keeps whole models, with policy.tuning='full' all of each",
        ),
        (
            not (full and ahead),
            "meal.update='hypergradient' moves parameters that are whole: use policy.tuning=lora",
        ),
        (backend == "engine", f"rollout.backend={backend!r} reads weights that are whole: engine"),
    ):
        remedy = f"{reason}; or leave it out, with mesh.data for as many processes"
        require(ok, "mesh.shard", shard, remedy)
