"""The recipes as data: what each is made of, and what follows from its parts. Imports no torch.

A recipe is a score, a loss, an outer loop and a collector of responses. What a part asks of the
options is said once, in the tables of parts; `rules.py` reads it there and knows no recipe by name.
`meal_fast.training.recipes` has the code behind the names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .config import Config

Score = Literal["linear", "tchebycheff", "smooth-tchebycheff"]


@dataclass(frozen=True)
class LossSpec:
    """Say what a loss asks of a run."""

    pairs: bool = False  # it compares samples 2j and 2j+1 of a prompt: their number is even
    needs_beta: bool = False  # grpo.beta scales the loss itself, and is not 0
    guide: bool = False  # it trains a guide beside the frozen base model, whose weights say w
    at_once: bool = False  # it takes the rows of several tasks, each through its own adapter
    sections: tuple[str, ...] = ()  # of options that it alone reads


@dataclass(frozen=True)
class OuterSpec:
    """Say what an outer loop asks of a run."""

    n_inner: int = 1  # inner updates of a task, at least
    at_once: str = ""  # the outer loop that does the same with all tasks of a meta-step at once
    models: bool = False  # it trains a model for each preference
    apart: bool = False  # the tasks of a meta-step need nothing of each other until it ends


@dataclass(frozen=True)
class CollectorSpec:
    """Say what a collector of responses asks of a run."""

    rejects: bool = False  # it needs a backend that rejects and redraws
    at_once: bool = False  # it collects for several tasks in one rollout
    reads: Literal["preference", "scores"] = "preference"  # what stands in the prompt
    mates: bool = True  # it can ask a prompt under several preferences
    needs_all: bool = False  # it reads every reward of a response: no objective may leave one out
    carries: bool = False  # what an update leaves in it, the next one needs: tasks are in order
    sections: tuple[str, ...] = ()  # of options that it alone reads


LOSSES: dict[str, LossSpec] = {
    "grpo": LossSpec(at_once=True),
    "dpo": LossSpec(pairs=True, needs_beta=True, at_once=True),
    "parm": LossSpec(pairs=True, guide=True, sections=("parm",)),
    "sft": LossSpec(),
}
OUTERS: dict[str, OuterSpec] = {
    "joint": OuterSpec(),
    "reptile": OuterSpec(n_inner=2, at_once="parallel-reptile", apart=True),
    "parallel-reptile": OuterSpec(n_inner=2, apart=True),
    "separate": OuterSpec(models=True, apart=True),
}
COLLECTORS: dict[str, CollectorSpec] = {
    "samples": CollectorSpec(at_once=True),
    "base-samples": CollectorSpec(sections=("parm",)),
    "meal": CollectorSpec(
        rejects=True, needs_all=True, carries=True, sections=("rejection", "meal")
    ),
    "ric": CollectorSpec(
        reads="scores", mates=False, needs_all=True, carries=True, sections=("ric",)
    ),
}
# Sections that a recipe may have no use for.
OWN_SECTIONS = ("rejection", "meal", "parm", "ric")


@dataclass(frozen=True)
class RecipeSpec:
    """Describe one method: of BPS (A.7 [P]), of Meta-Aligner [P], or one that these compare with.

    models: points a side of the lattice of preferences that have a model each, or the option that
        says how many; 0: one model serves all. between: what stands for a w between theirs.
    variants: fields that differ where an option (section, name) has a value.
    """

    about: str
    score: Score
    loss: str
    outer: str
    collector: str = "samples"
    models: int | tuple[str, str] = 0
    between: Literal["", "interpolate", "nearest"] = ""
    variants: Mapping[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, name, known in (
            ("loss", self.loss, LOSSES),
            ("outer", self.outer, OUTERS),
            ("collector", self.collector, COLLECTORS),
        ):
            if name not in known:
                raise ValueError(f"{what}={name!r}: unknown; choose from {', '.join(known)}")
        if not OUTERS[self.outer].models == bool(self.models) == bool(self.between):
            raise ValueError(
                f"models={self.models!r}, between={self.between!r}: outer={self.outer!r} needs "
                f"{'both' if OUTERS[self.outer].models else 'neither'}"
            )

    @property
    def pairs(self) -> bool:
        """Say whether the samples of a prompt are compared two by two."""
        return LOSSES[self.loss].pairs

    @property
    def needs_beta(self) -> bool:
        """Say whether grpo.beta must be positive."""
        return LOSSES[self.loss].needs_beta

    @property
    def guide(self) -> bool:
        """Say whether a guide is trained, whose weights depend on w."""
        return LOSSES[self.loss].guide

    @property
    def rejects(self) -> bool:
        """Say whether the backend must reject and redraw."""
        return COLLECTORS[self.collector].rejects

    @property
    def n_inner(self) -> int:
        """Give the least number of inner updates of a task."""
        return OUTERS[self.outer].n_inner

    @property
    def at_once(self) -> str:
        """Name the outer loop that takes all tasks of a meta-step at once; empty: none does."""
        able = LOSSES[self.loss].at_once and COLLECTORS[self.collector].at_once
        return OUTERS[self.outer].at_once if able else ""

    @property
    def apart(self) -> bool:
        """Say whether the tasks of a meta-step may be learnt at the same time, by processes."""
        return OUTERS[self.outer].apart and not COLLECTORS[self.collector].carries

    @property
    def reads(self) -> Literal["preference", "scores", "none"]:
        """Say what the policy reads in its prompt."""
        return "none" if self.models or self.guide else COLLECTORS[self.collector].reads

    @property
    def mates(self) -> bool:
        """Say whether a prompt of an update may be asked under several preferences."""
        return COLLECTORS[self.collector].mates and not self.models

    @property
    def needs_all(self) -> bool:
        """Say whether every objective must apply to every response."""
        return COLLECTORS[self.collector].needs_all

    @property
    def sections(self) -> frozenset[str]:
        """Name the sections of OWN_SECTIONS that it reads."""
        return frozenset(LOSSES[self.loss].sections + COLLECTORS[self.collector].sections)

    def points(self, config: Config) -> int:
        """Give `models` as a number: points a side of the lattice; 0: one model serves all."""
        if isinstance(self.models, int):
            return self.models
        section, option = self.models
        return int(getattr(getattr(config, section), option))

    def forced(self, config: Config) -> dict[tuple[str, str], Any]:
        """Give the options, by (section, name), that it leaves no choice of."""
        values: dict[tuple[str, str], Any] = {}
        if points := self.points(config):  # a task is a model
            k = len(config.names)
            values["meta", "tasks"] = math.comb(points + k - 2, k - 1)
        if self.guide:
            values["policy", "tuning"] = "bilinear"
        if self.reads != "preference":
            values["policy", "preference_text"] = self.reads
            values["warmup", "steps"] = 0  # it teaches what the policy is to make of a preference
        if not self.mates:
            values["preference", "per_prompt"] = 1
        return values


RECIPES: dict[str, RecipeSpec] = {
    "weighted-meta-grpo": RecipeSpec(
        "smooth Tchebycheff score, Reptile over preferences",
        score="smooth-tchebycheff", loss="grpo", outer="reptile",
    ),
    "weighted-grpo": RecipeSpec(
        "the same without the outer loop", score="smooth-tchebycheff", loss="grpo", outer="joint"
    ),
    "grid-meta-grpo": RecipeSpec(
        "linear score, Reptile over preferences", score="linear", loss="grpo", outer="reptile"
    ),
    "grid-grpo": RecipeSpec(
        "linear score, no outer loop", score="linear", loss="grpo", outer="joint"
    ),
    "meal": RecipeSpec(
        "a preference-weight-net and the policy teach each other, by rejection sampling",
        score="smooth-tchebycheff", loss="sft", outer="joint", collector="meal",
        variants={
            ("meal", "policy", "grpo"): {"loss": "grpo"},
            ("meal", "outer", "reptile+net"): {"outer": "reptile"},
        },
    ),
    "mo-odpo": RecipeSpec(
        "online DPO on pairs ordered by the linear score",
        score="linear", loss="dpo", outer="joint",
    ),
    # The linear score at a corner is the one reward r_k, normalised.
    "rewarded-soups": RecipeSpec(
        "a model for each reward, their weights interpolated at w",
        score="linear", loss="grpo", outer="separate", models=2, between="interpolate",
    ),
    "morlhf": RecipeSpec(
        "a model for each of a few w, linear score; the nearest one serves",
        score="linear", loss="grpo", outer="separate", models=("preference", "models"),
        between="nearest",
    ),
    "parm": RecipeSpec(
        "a guide whose weights depend on w, added to the frozen base model at decoding",
        score="linear", loss="parm", outer="joint", collector="base-samples",
    ),
    "ric": RecipeSpec(
        "rewards in the prompt: SFT on what they were",
        score="linear", loss="sft", outer="joint", collector="ric",
    ),
}  # fmt: skip


def spec_of(config: Config) -> RecipeSpec:
    """Give the run's recipe, as the options that switch one of its parts have it."""
    spec = RECIPES[config.recipe]
    for (section, option, value), changes in spec.variants.items():
        if getattr(getattr(config, section), option) == value:
            spec = dataclasses.replace(spec, **changes)
    return spec


def named(which: Callable[[RecipeSpec], bool]) -> str:
    """Name the recipes of which that is so, for a remedy."""
    return " or ".join(name for name, spec in RECIPES.items() if which(spec))
