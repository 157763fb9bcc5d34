"""The methods, as values: preference x score x learner x outer loop. A new one is a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from meal_fast.config.config import Config
from meal_fast.data.preferences import Preference, drawn_tasks, model_tasks
from meal_fast.models.model_soup import Rule

from .collectors.base import BaseSamples, Sampled, Score
from .collectors.meal import Meal
from .collectors.ric import RiC
from .losses import dpo, grpo, parm, sft
from .outer import Joint, ParallelReptile, Reptile, Separate


@dataclass(frozen=True)
class Recipe:
    """One method: of BPS (A.7 [P]), of Meta-Aligner [P], or one that these compare theirs with."""

    score: Score
    learner: Callable
    outer: type[Joint]
    about: str
    experience: type[Sampled] = Sampled
    preferences: Callable[[Config, int], list[Preference]] = drawn_tasks  # of a meta-step's tasks
    rule: Rule | None = None  # of several models: what stands for a w between theirs


RECIPES: dict[str, Recipe] = {
    "weighted-meta-grpo": Recipe(
        "smooth-tchebycheff", grpo, Reptile, "smooth Tchebycheff score, Reptile over preferences"
    ),
    "weighted-grpo": Recipe("smooth-tchebycheff", grpo, Joint, "the same without the outer loop"),
    "grid-meta-grpo": Recipe("linear", grpo, Reptile, "linear score, Reptile over preferences"),
    "grid-grpo": Recipe("linear", grpo, Joint, "linear score, no outer loop"),
    "meal": Recipe(
        "smooth-tchebycheff",
        sft,
        Joint,
        "a preference-weight-net and the policy teach each other, by rejection sampling",
        Meal,
    ),
    "mo-odpo": Recipe("linear", dpo, Joint, "online DPO on pairs ordered by the linear score"),
    # The linear score at a corner is the one reward r_k, normalised.
    "rewarded-soups": Recipe(
        "linear",
        grpo,
        Separate,
        "a model for each reward, their weights interpolated at w",
        preferences=model_tasks,
        rule="interpolate",
    ),
    "morlhf": Recipe(
        "linear",
        grpo,
        Separate,
        "a model for each of a few w, linear score; the nearest one serves",
        preferences=model_tasks,
        rule="nearest",
    ),
    "parm": Recipe(
        "linear",
        parm,
        Joint,
        "a guide whose weights depend on w, added to the frozen base model at decoding",
        BaseSamples,
    ),
    "ric": Recipe("linear", sft, Joint, "rewards in the prompt: SFT on what they were", RiC),
}


def recipe_of(config: Config) -> Recipe:
    """The run's recipe, with the switches of `config.meal` and `meta.parallel` set."""
    recipe = RECIPES[config.recipe]
    if config.meta.parallel:
        recipe = replace(recipe, outer=ParallelReptile)
    if config.recipe == "meal":
        if config.meal.policy == "grpo":
            recipe = replace(recipe, learner=grpo)
        if config.meal.outer == "reptile+net":
            recipe = replace(recipe, outer=Reptile)
    if config.recipe == "parm":
        recipe = replace(recipe, learner=partial(parm, beta_r=config.parm.beta_r))
    return recipe
