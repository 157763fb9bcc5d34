"""The methods, as values: preference x score x learner x outer loop. A new one is a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from .learners import grpo
from .meta import Joint, Reptile

Score = Literal["linear", "tchebycheff", "smooth-tchebycheff"]


@dataclass(frozen=True)
class Recipe:
    """One method of "Barriers to Pareto Steerability" (BPS A.7 [P])."""

    score: Score
    learner: Callable
    outer: type[Joint]
    about: str


RECIPES: dict[str, Recipe] = {
    "weighted-meta-grpo": Recipe(
        "smooth-tchebycheff", grpo, Reptile, "smooth Tchebycheff score, Reptile over preferences"
    ),
    "weighted-grpo": Recipe("smooth-tchebycheff", grpo, Joint, "the same without the outer loop"),
    "grid-meta-grpo": Recipe("linear", grpo, Reptile, "linear score, Reptile over preferences"),
    "grid-grpo": Recipe("linear", grpo, Joint, "linear score, no outer loop"),
}
