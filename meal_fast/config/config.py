"""Every option of a run, as frozen dataclasses.

Importing this file imports no torch: `--help` and every check below answer at once. A check that
fails raises `ValueError` naming the option, the value and the remedy.

Tags: [P] stated in "Barriers to Pareto Steerability" (BPS) or "Meta-Aligner"; [R] our reading of
what the papers leave open.
"""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from meal_fast.common import require

from . import algorithms, rules, sections
from .algorithms import MealConfig, ParmConfig, RejectionConfig, RicConfig
from .mesh import MeshConfig
from .recipes import RECIPES, spec_of
from .schema import opt, replaced
from .sections import (
    EvaluationConfig,
    GRPOConfig,
    Logger,
    MetaConfig,
    PolicyConfig,
    PreferenceConfig,
    PromptConfig,
    RolloutConfig,
    ScoreConfig,
    WarmupConfig,
)

RecipeName = str  # of RECIPES
_CHOICES = sections.CHOICES | algorithms.CHOICES


@dataclass(frozen=True)
class Config:
    """One run: its recipe, objectives and seed, and a section for each part."""

    recipe: RecipeName = opt("weighted-meta-grpo", "The method.")
    seed: int = opt(0, "The one seed that all randomness hangs on.")
    objectives: tuple[str, ...] = opt(
        ("helpful=packaged:complied", "harmless=packaged:harmless"),
        "Two objectives or more, each NAME=SOURCE; docs/objectives.md has the forms of SOURCE.",
    )
    objectives_device: str = opt(
        "auto",
        "Where the reward models are: cpu, cuda, cuda:N, or auto, which is the policy's device.",
    )
    objectives_timeout: float = opt(
        300.0,
        "Seconds that a Python or HTTP objective may take for each 256 responses of a call; 0 "
        "waits for ever.",
    )
    checkpoint_every: int = opt(5, "Meta-steps between checkpoints.")
    logger: Logger = opt(
        "none", "A logger beside metrics.jsonl, which is sent some of the answers as well."
    )
    completions: bool = opt(
        True, "Whether completions.jsonl keeps every update's answers, with their rewards."
    )
    threads: int = opt(
        0, "CPU threads, which are saved with the run; 0 takes as many as this machine has cores."
    )
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    rejection: RejectionConfig = field(default_factory=RejectionConfig)
    meal: MealConfig = field(default_factory=MealConfig)
    parm: ParmConfig = field(default_factory=ParmConfig)
    ric: RicConfig = field(default_factory=RicConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        rules.check_run(self)
        for (section, option), value in self.settled.items():
            changed = dataclasses.replace(getattr(self, section), **{option: value})
            object.__setattr__(self, section, changed)
        rules.check(self)

    @property
    def names(self) -> tuple[str, ...]:
        """Give the objectives' names, in order: the K columns of every reward."""
        return tuple(o.partition("=")[0] for o in self.objectives)

    @property
    def model_points(self) -> int:
        """Count the points a side of the lattice of w that have models; 0: one model reads w."""
        return spec_of(self).points(self)

    @property
    def settled(self) -> dict[tuple[str, str], Any]:
        """Give the options that the recipe leaves no choice of, so that config.json says them."""
        return spec_of(self).forced(self)


def to_dict(config: Config) -> dict[str, Any]:
    """Turn the configuration into nested plain values, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], base: Config | None = None) -> Config:
    """Put the nested `values` into `base` (default: all defaults).

    Raises ValueError for an unknown key, a wrong value, and one that the recipe leaves no choice
    of.
    """
    config: Config = replaced(base or Config(), values, choices_of)
    for (section, option), held in config.settled.items():
        asked = values.get(section, {}).get(option, held)
        remedy = f"recipe {config.recipe} makes it {held!r}; leave it out"
        require(asked == held, f"{section}.{option}", asked, remedy)
    return config


def choices_of(annotation: str) -> tuple[str, ...]:
    """Give the values that a field of this annotation allows; empty where it is no choice."""
    return tuple(RECIPES) if annotation == "RecipeName" else get_args(_CHOICES.get(annotation))


def load_toml(path: str | Path, base: Config) -> Config:
    """Put the options of a TOML file into `base`. Raises ValueError for a broken file."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"config={str(path)!r}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"config={str(path)!r}: not UTF-8 text ({error.reason})") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"config={str(path)!r}: not TOML ({error})") from error
    return from_dict(values, base)
