"""The methods, as values: preference x score x learner x outer loop. A new one is a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .config import Config
from .family import Rule
from .learners import grpo
from .meta import Joint, Reptile, Separate
from .preference import Weights, drawn_tasks, model_tasks

Score = Literal["linear", "tchebycheff", "smooth-tchebycheff"]


@dataclass(frozen=True)
class Recipe:
    """One method: of BPS (A.7 [P]), or one that the two papers compare theirs with."""

    score: Score
    learner: Callable
    outer: type[Joint]
    about: str
    preferences: Callable[[Config, int], list[Weights]] = drawn_tasks  # of a meta-step's tasks
    rule: Rule | None = None  # of several models: what stands for a w between theirs


RECIPES: dict[str, Recipe] = {
    "weighted-meta-grpo": Recipe(
        "smooth-tchebycheff", grpo, Reptile, "smooth Tchebycheff score, Reptile over preferences"
    ),
    "weighted-grpo": Recipe("smooth-tchebycheff", grpo, Joint, "the same without the outer loop"),
    "grid-meta-grpo": Recipe("linear", grpo, Reptile, "linear score, Reptile over preferences"),
    "grid-grpo": Recipe("linear", grpo, Joint, "linear score, no outer loop"),
    # The linear score at a corner is the one reward r_k, normalised.
    "rewarded-soups": Recipe(
        "linear",
        grpo,
        Separate,
        "a model for each reward, their weights interpolated at w",
        model_tasks,
        "interpolate",
    ),
    "morlhf": Recipe(
        "linear",
        grpo,
        Separate,
        "a model for each of a few w, linear score; the nearest one serves",
        model_tasks,
        "nearest",
    ),
}
