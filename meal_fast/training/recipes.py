"""The code behind the recipes' names: `meal_fast.config.recipes` says what each is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from meal_fast.config.config import Config
from meal_fast.config.recipes import OUTERS as OUTER_SPECS
from meal_fast.config.recipes import RECIPES, RecipeSpec, spec_of
from meal_fast.data.preferences import Preference, drawn_tasks, model_tasks

from .collectors.base import BaseSamples, Sampled
from .collectors.meal import Meal
from .collectors.ric import RiC
from .losses.dpo import dpo
from .losses.grpo import grpo
from .losses.parm import parm
from .losses.sft import sft
from .outer import Joint, ParallelReptile, Reptile, Separate

# A loss, made for a run: (policy, rollout, scored, config.grpo, temperature) -> metrics.
LOSSES: dict[str, Callable[[Config], Callable]] = {
    "grpo": lambda config: grpo,
    "dpo": lambda config: dpo,
    "parm": lambda config: partial(parm, beta_r=config.parm.beta_r),
    "sft": lambda config: sft,
}
OUTERS: dict[str, type[Joint]] = {
    "joint": Joint,
    "reptile": Reptile,
    "parallel-reptile": ParallelReptile,
    "separate": Separate,
}
COLLECTORS: dict[str, type[Sampled]] = {
    "samples": Sampled,
    "base-samples": BaseSamples,
    "meal": Meal,
    "ric": RiC,
}

__all__ = ["COLLECTORS", "LOSSES", "OUTERS", "RECIPES", "Recipe", "recipe_of"]


@dataclass(frozen=True)
class Recipe:
    """Hold a run's method as code."""

    spec: RecipeSpec
    loss: Callable
    outer: type[Joint]
    collector: type[Sampled]
    preferences: Callable[[Config, int], list[Preference]]  # of a meta-step's tasks


def recipe_of(config: Config) -> Recipe:
    """Resolve the run's recipe, with `meta.parallel` and the options that switch a part."""
    spec = spec_of(config)
    outer = OUTER_SPECS[spec.outer].at_once if config.meta.parallel else spec.outer
    return Recipe(
        spec,
        LOSSES[spec.loss](config),
        OUTERS[outer],
        COLLECTORS[spec.collector],
        model_tasks if spec.models else drawn_tasks,
    )
