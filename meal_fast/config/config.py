"""Every option of a run, as frozen dataclasses.

Importing this file imports no torch: `--help` and every check below answer at once. A check that
fails raises `ValueError` naming the option, the value and the remedy.

Tags: [P] stated in "Barriers to Pareto Steerability" (BPS) or "Meta-Aligner"; [R] our reading of
what the papers leave open.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from meal_fast.common import require

from . import rules
from .algorithms import CHOICES, MealConfig, ParmConfig, RejectionConfig, RicConfig
from .recipes import RECIPES, spec_of
from .schema import check_device, opt, replaced

RecipeName = str  # of RECIPES
Tuning = Literal["lora", "full", "bilinear"]
Dtype = Literal["auto", "float32", "tfloat32", "bfloat16"]
Normalization = Literal["max", "standard", "tanh", "none"]
KLEstimator = Literal["k1", "k2", "k3", "exact"]
Reduce = Literal["grpo", "dapo", "dr_grpo"]
AdamMode = Literal["persist_v", "reset", "per_preference"]
PreferenceText = Literal["bar", "numbers", "scores", "none"]
Logger = Literal["none", "tensorboard", "wandb"]
Backend = Literal["engine", "generate", "vllm"]
_CHOICES = CHOICES | {
    "Tuning": Tuning,
    "Dtype": Dtype,
    "Normalization": Normalization,
    "KLEstimator": KLEstimator,
    "Reduce": Reduce,
    "AdamMode": AdamMode,
    "PreferenceText": PreferenceText,
    "Logger": Logger,
    "Backend": Backend,
}


@dataclass(frozen=True)
class PolicyConfig:
    path: str = opt("packaged:smollm2-135m", "packaged:NAME, a local folder or a hub name")
    tuning: Tuning = opt("lora", "train LoRA adapters, or every parameter; parm: bilinear adapters")
    lora_rank: int = opt(16, "rank of the LoRA factors; bilinear: of each of the two terms")
    lora_alpha: int = opt(32, "LoRA scale: the update is alpha/rank * B A")
    dtype: Dtype = opt(
        "auto",
        "of frozen weights and products; what is trained is float32. tfloat32: float32, in a GPU's "
        "products 10 bits; auto: float32 on a CPU, on a GPU bfloat16, and tfloat32 for tuning=full",
    )
    preference_text: PreferenceText = opt(
        "bar", "how it reads w, see meal_fast.preference; none: not; scores: recipe ric's"
    )
    device: str = opt("auto", "cpu, cuda, cuda:N, or auto (cuda when there is one)")

    def __post_init__(self) -> None:
        check_device("policy.device", self.device)
        require(self.lora_rank >= 1, "policy.lora_rank", self.lora_rank, "must be at least 1")
        require(self.lora_alpha > 0, "policy.lora_alpha", self.lora_alpha, "must be positive")
        full_bf16 = self.tuning == "full" and self.dtype == "bfloat16"
        require(
            not full_bf16,
            "policy.dtype",
            self.dtype,
            "full-parameter training needs float32: a bf16 step at |weight| 0.02 is 1.2e-4 and "
            "loses updates of 1e-6; use auto, float32, or tfloat32 on a GPU",
        )


@dataclass(frozen=True)
class PromptConfig:
    train: str = opt("packaged:mixed", "packaged:NAME, a .jsonl or .txt file, or a hub data set")
    evaluation: str = opt(
        "", "the held-out prompts, same forms; empty: the held-out split of `train`"
    )
    max_tokens: int = opt(256, "longer prompts are left out")

    def __post_init__(self) -> None:
        require(bool(self.train), "prompts.train", self.train, "name a prompt set")
        require(self.max_tokens >= 1, "prompts.max_tokens", self.max_tokens, "must be positive")


@dataclass(frozen=True)
class PreferenceConfig:
    alpha: float = opt(1.0, "concentration of Dir(alpha) that draws the training preferences [P]")
    grid: int = opt(11, "points a side of the simplex lattice [P]; 0: continuous preferences")
    rotate: bool = opt(False, "a meta-step's tasks are rotations of one draw, (w, 1 - w) [R]")
    models: int = opt(3, "morlhf: points a side of the lattice of w, each with a model of its own")

    def __post_init__(self) -> None:
        require(self.alpha > 0, "preference.alpha", self.alpha, "must be positive")
        require(
            self.grid == 0 or self.grid >= 2,
            "preference.grid",
            self.grid,
            "must be 0 (continuous) or at least 2 points",
        )
        require(self.models >= 2, "preference.models", self.models, "must be at least 2 points")


@dataclass(frozen=True)
class RolloutConfig:
    prompts: int = opt(4, "prompts of an inner update")
    samples: int = opt(8, "responses per prompt: the group G of GRPO")
    max_new_tokens: int = opt(48, "length limit of a response")
    temperature: float = opt(0.9, "of the sampler, and of every log-probability [P]")
    max_cache_bytes: int = opt(
        0, "of keys and values; 0: 2 GiB on a CPU, half of what is free on a GPU"
    )
    backend: Backend = opt("engine", "what samples; see meal_fast.rollout.backends")

    def __post_init__(self) -> None:
        require(self.prompts >= 1, "rollout.prompts", self.prompts, "must be at least 1")
        require(
            self.samples >= 2,
            "rollout.samples",
            self.samples,
            "must be at least 2: a group-relative advantage compares the samples of a prompt",
        )
        require(self.max_new_tokens >= 1, "rollout.max_new_tokens", self.max_new_tokens, "≥ 1")
        require(self.temperature > 0, "rollout.temperature", self.temperature, "must be positive")
        require(
            self.max_cache_bytes >= 0,
            "rollout.max_cache_bytes",
            self.max_cache_bytes,
            "must be 0 (automatic) or positive",
        )


@dataclass(frozen=True)
class ScoreConfig:
    normalization: Normalization = opt("max", "of the rewards, before scalarisation [P]")
    mu: float = opt(0.1, "smoothing of the Tchebycheff score [P]")
    utopia: tuple[float, ...] = opt(
        (), "z*, one number per objective, in normalised units; empty: from the calibration sample"
    )
    calibration: int = opt(64, "responses of the base model that fix the statistics and z* [R]")
    statistics: str = opt(
        "", "another run's statistics.json, to share its statistics and z*; empty: calibrate"
    )

    def __post_init__(self) -> None:
        require(self.mu > 0, "score.mu", self.mu, "must be positive")
        require(
            all(math.isfinite(z) for z in self.utopia), "score.utopia", self.utopia, "not finite"
        )
        require(self.calibration >= 2, "score.calibration", self.calibration, "must be at least 2")


@dataclass(frozen=True)
class GRPOConfig:
    lr: float = opt(1e-6, "AdamW's learning rate; cosine over the run's updates [P]")
    weight_decay: float = opt(0.0, "AdamW's weight decay")
    beta: float = opt(0.1, "coefficient of the KL term to the frozen base model [P]")
    kl: KLEstimator = opt("k3", "estimator of that KL")
    clip_low: float = opt(0.2, "lower clip of the importance ratio")
    clip_high: float = opt(0.2, "upper clip of the importance ratio")
    reduce: Reduce = opt("grpo", "mean per sequence, over tokens, or by a constant")
    max_grad_norm: float = opt(1.0, "gradient clipping; 0: none")
    keep: int = opt(0, "GRPO: rows of a group to learn from, largest |advantage| first; 0: all [R]")
    epochs: int = opt(1, "updates per rollout")
    micro_tokens: int = opt(
        0,
        "tokens of a forward and backward pass; smaller: less memory; 0: 1024 on a CPU, what "
        "memory has room for on a GPU",
    )
    recompute: bool = opt(False, "keep no activations but each layer's input: less memory still")

    def __post_init__(self) -> None:
        for name in ("lr",):
            require(getattr(self, name) > 0, f"grpo.{name}", getattr(self, name), "positive")
        for name in ("weight_decay", "beta", "clip_low", "clip_high", "max_grad_norm", "keep"):
            value = getattr(self, name)
            require(value >= 0, f"grpo.{name}", value, "must not be negative")
        require(self.clip_low < 1, "grpo.clip_low", self.clip_low, "must be below 1")
        require(self.epochs >= 1, "grpo.epochs", self.epochs, "must be at least 1")
        n = self.micro_tokens
        require(n >= 0, "grpo.micro_tokens", n, "must be 0 (automatic) or positive")


@dataclass(frozen=True)
class MetaConfig:
    steps: int = opt(400, "meta-steps T [P]")
    tasks: int = opt(2, "preferences of a meta-step, B_w [P]; of several models, all")
    n_inner: int = opt(2, "inner updates per preference [R]")
    epsilon: float = opt(1.5, "Reptile's step; falls linearly to zero over the run [P]")
    max_delta: float = opt(0.0, "clip of the norm of the meta-update; 0: none")
    adam: AdamMode = opt("persist_v", "what a task inherits of Adam's state")
    parallel: bool = opt(False, "a meta-step's tasks in one batch: LoRA, the engine, Reptile [R]")
    tokens: int = opt(0, "ends the run after so many generated tokens; 0: meta.steps does")

    def __post_init__(self) -> None:
        require(self.steps >= 1, "meta.steps", self.steps, "must be at least 1")
        require(self.tasks >= 1, "meta.tasks", self.tasks, "must be at least 1")
        require(self.n_inner >= 1, "meta.n_inner", self.n_inner, "must be at least 1")
        require(self.epsilon > 0, "meta.epsilon", self.epsilon, "must be positive")
        require(self.max_delta >= 0, "meta.max_delta", self.max_delta, "must not be negative")
        require(self.tokens >= 0, "meta.tokens", self.tokens, "must be 0 (meta.steps) or positive")

    def progress(self, updates: int, tokens: int) -> float:
        """The share of the run that is done after so many inner updates and generated tokens."""
        if self.tokens:
            return min(tokens / self.tokens, 1.0)
        return updates / (self.steps * self.tasks * self.n_inner)


@dataclass(frozen=True)
class EvaluationConfig:
    prompts: int = opt(16, "held-out prompts of a sweep")
    samples: int = opt(1, "sampled responses per prompt and weight, beside the greedy one")
    grid: int = opt(
        11,
        "weights a side of the simplex lattice; 28 with K=2: BPS's Table 1; 13 with K=3: RiC's [P]",
    )
    ask: str = opt("", "one more prompt, answered at four weights; empty: none")
    statistics: str = opt(
        "", "another run's statistics.json, to be measured by its statistics; empty: the run's own"
    )

    def __post_init__(self) -> None:
        require(self.prompts >= 1, "evaluation.prompts", self.prompts, "must be at least 1")
        require(self.samples >= 1, "evaluation.samples", self.samples, "must be at least 1")
        require(self.grid >= 2, "evaluation.grid", self.grid, "must be at least 2")


@dataclass(frozen=True)
class Config:
    recipe: RecipeName = opt("weighted-meta-grpo", "the method")
    seed: int = opt(0, "the one key of all randomness")
    objectives: tuple[str, ...] = opt(
        ("helpful=packaged:complied", "harmless=packaged:harmless"),
        "NAME=SOURCE, two or more; see meal_fast.data.objectives for the forms of SOURCE",
    )
    objectives_device: str = opt(
        "auto", "of the reward models: cpu, cuda, cuda:N, or auto (the policy's device)"
    )
    checkpoint_every: int = opt(5, "meta-steps between checkpoints")
    logger: Logger = opt("none", "beside metrics.jsonl")
    threads: int = opt(0, "of the CPU, saved with the run; 0: as many as this machine has cores")
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    prompts: PromptConfig = field(default_factory=PromptConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)
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
        """The objectives' names, in order: the K columns of every reward."""
        return tuple(o.partition("=")[0] for o in self.objectives)

    @property
    def model_points(self) -> int:
        """Points a side of the lattice of preferences with a model each; 0: one model reads w."""
        return spec_of(self).points(self)

    @property
    def settled(self) -> dict[tuple[str, str], Any]:
        """Options that the recipe leaves no choice of, so that config.json says them."""
        return spec_of(self).forced(self)


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested plain values, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], base: Config | None = None) -> Config:
    """`base` (default: all defaults) with the nested `values` put in; unknown keys are refused."""
    config: Config = replaced(base or Config(), values, choices_of)
    for (section, option), held in config.settled.items():
        asked = values.get(section, {}).get(option, held)
        remedy = f"recipe {config.recipe} makes it {held!r}; leave it out"
        require(asked == held, f"{section}.{option}", asked, remedy)
    return config


def choices_of(annotation: str) -> tuple[str, ...]:
    """The values that a field of this annotation allows; empty where it is no choice."""
    return tuple(RECIPES) if annotation == "RecipeName" else get_args(_CHOICES.get(annotation))


def load_toml(path: str | Path, base: Config) -> Config:
    """`base` with the options of a TOML file put in. Raises ValueError for a broken file."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"config={str(path)!r}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"config={str(path)!r}: not UTF-8 text ({error.reason})") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"config={str(path)!r}: not TOML ({error})") from error
    return from_dict(values, base)
