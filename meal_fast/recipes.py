"""The methods, as values: preference x score x learner x outer loop. A new one is a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .config import Config
from .experience import Sampled, Score
from .learners import dpo, grpo, sft
from .meal import Meal
from .meta import Joint, Reptile
from .ric import RiC


@dataclass(frozen=True)
class Recipe:
    """One method of "Barriers to Pareto Steerability" (BPS A.7 [P]) or "Meta-Aligner" [P]."""

    score: Score
    learner: Callable
    outer: type[Joint]
    about: str
    experience: type[Sampled] = Sampled


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
    "ric": Recipe("linear", sft, Joint, "rewards in the prompt: SFT on what they were", RiC),
}


def recipe_of(config: Config) -> Recipe:
    """The run's recipe, with the switches of `config.meal` set."""
    recipe = RECIPES[config.recipe]
    if config.recipe == "meal":
        if config.meal.policy == "grpo":
            recipe = replace(recipe, learner=grpo)
        if config.meal.outer == "reptile+net":
            recipe = replace(recipe, outer=Reptile)
    return recipe
