"""The sections of a run's options that every recipe reads, as frozen dataclasses; no torch.

Part of `config.Config`; those of single recipes are in `algorithms`. Tags as there: [P] stated in a
paper, [R] our reading of what it leaves open.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from meal_fast.common import require

from .schema import check_device, opt

Tuning = Literal["lora", "full", "bilinear"]
Dtype = Literal["auto", "float32", "tfloat32", "bfloat16"]
Normalization = Literal["max", "standard", "tanh", "none"]
KLEstimator = Literal["k1", "k2", "k3", "exact"]
Reduce = Literal["grpo", "dapo", "dr_grpo"]
AdamMode = Literal["persist_v", "reset", "per_preference"]
PreferenceText = Literal["bar", "numbers", "scores", "none"]
Logger = Literal["none", "tensorboard", "wandb", "trackio"]
Mates = Literal["rotations", "draws"]
Mark = Literal["refuses", "complies", "both"]  # of meal_fast.data.markers
Backend = Literal["engine", "generate", "vllm"]
CHOICES: dict[str, Any] = {
    "Tuning": Tuning,
    "Dtype": Dtype,
    "Normalization": Normalization,
    "KLEstimator": KLEstimator,
    "Reduce": Reduce,
    "AdamMode": AdamMode,
    "PreferenceText": PreferenceText,
    "Logger": Logger,
    "Mates": Mates,
    "Mark": Mark,
    "Backend": Backend,
}


@dataclass(frozen=True)
class PolicyConfig:
    """The model that is trained, and how it reads a preference."""

    path: str = opt(
        "packaged:smollm2-135m",
        "The model to train: packaged:NAME, world:NAME, a local folder or a hub name.",
    )
    tuning: Tuning = opt(
        "lora",
        "What is trained: LoRA adapters, or every parameter; recipe parm trains bilinear adapters.",
    )
    lora_rank: int = opt(
        16, "Rank of the LoRA factors; of bilinear adapters, the rank of each of the two terms."
    )
    lora_alpha: int = opt(32, "Scale of LoRA: the update of a weight is alpha/rank * B A.")
    dtype: Dtype = opt(
        "auto",
        "Type of frozen weights and of products; what is trained is float32. tfloat32 "
        "is float32 with products of 10 bits on a GPU. auto means float32 on a CPU; on "
        "a GPU bfloat16, and tfloat32 where tuning is full.",
    )
    preference_text: PreferenceText = opt(
        "bar",
        "How the policy reads w: as numbers with a bar of marks, or as numbers alone. "
        "Recipes choose none (no text) and scores (rewards) by themselves.",
    )
    template_kwargs: tuple[str, ...] = opt(
        (),
        "Switches of the model's chat template, as name=value, the value JSON or else a text: "
        "enable_thinking=false, say. They are part of the saved template.",
    )
    system: str = opt(
        "",
        "The text of a system turn that is put before every conversation without one, in training "
        "and in the saved chat template; empty puts none.",
    )
    device: str = opt(
        "auto", "Where the policy is: cpu, cuda, cuda:N, or auto, which is cuda where there is one."
    )

    def __post_init__(self) -> None:
        check_device("policy.device", self.device)
        for entry in self.template_kwargs:
            good = entry.partition("=")[0].isidentifier() and "=" in entry
            require(good, "policy.template_kwargs", entry, "must be name=value")
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
    """The prompts, of training and held out."""

    train: str = opt(
        "packaged:mixed",
        "The training prompts: packaged:NAME, a .jsonl or .txt file, or a hub data set.",
    )
    benign: str = opt(
        "",
        "Ordinary prompts that take turns with those of `train`, so that what is learnt on these "
        "does not spread to them; empty adds none [R].",
    )
    benign_share: float = opt(0.25, "Share of an update's prompts that are ordinary ones.")
    evaluation: str = opt(
        "", "The held-out prompts, in the same forms; empty takes the held-out split of `train`."
    )
    max_tokens: int = opt(256, "Prompts with more tokens than this are left out.")

    def __post_init__(self) -> None:
        require(bool(self.train), "prompts.train", self.train, "name a prompt set")
        require(self.max_tokens >= 1, "prompts.max_tokens", self.max_tokens, "must be positive")
        share = self.benign_share
        require(0 <= share < 1, "prompts.benign_share", share, "a share, at least 0 and below 1")


@dataclass(frozen=True)
class PreferenceConfig:
    """Which preferences w are trained."""

    alpha: float = opt(
        1.0, "Concentration of the Dir(alpha) that training preferences are drawn from [P]."
    )
    grid: int = opt(
        11,
        "Points a side of the simplex lattice that draws are mapped onto [P]; 0 keeps "
        "them as drawn.",
    )
    per_prompt: int = opt(
        1,
        "Preferences m that each prompt of an update is asked under, all in one gradient step; "
        "1 is the papers' [R].",
    )
    mates: Mates = opt(
        "rotations",
        "Which preferences join an update's own where there are several: its rotations, such as "
        "(w, 1 - w), or further draws [R].",
    )
    rotate: bool = opt(
        False, "Whether a meta-step's tasks are rotations of one draw, such as (w, 1 - w) [R]."
    )
    models: int = opt(
        3, "Recipe morlhf: points a side of the lattice of preferences that have a model each."
    )

    def __post_init__(self) -> None:
        require(self.alpha > 0, "preference.alpha", self.alpha, "must be positive")
        require(
            self.grid == 0 or self.grid >= 2,
            "preference.grid",
            self.grid,
            "must be 0 (continuous) or at least 2 points",
        )
        require(self.models >= 2, "preference.models", self.models, "must be at least 2 points")
        m = self.per_prompt
        require(m >= 1, "preference.per_prompt", m, "must be at least 1: the update's own")
        known = get_args(Mates)
        remedy = f"choose from {', '.join(known)}"
        require(self.mates in known, "preference.mates", self.mates, remedy)


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are sampled."""

    prompts: int = opt(4, "Prompts of an inner update.")
    samples: int = opt(8, "Responses to each prompt: the group size G of GRPO.")
    max_new_tokens: int = opt(48, "The most tokens that a response may have.")
    temperature: float = opt(0.9, "Temperature of the sampler, and of every log-probability [P].")
    max_cache_bytes: int = opt(
        0, "Bytes for keys and values; 0 takes 2 GiB on a CPU, half of what is free on a GPU."
    )
    backend: Backend = opt(
        "engine", "What samples: this package's engine, transformers' generate, or vLLM."
    )

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
    """How K rewards and w become one score."""

    normalization: Normalization = opt(
        "max", "How rewards are normalised before they are made one score [P]."
    )
    mu: float = opt(0.1, "Smoothing of the Tchebycheff score [P].")
    utopia: tuple[float, ...] = opt(
        (),
        "The utopia point z*, one number for each objective in normalised units; empty "
        "takes it from the calibration sample.",
    )
    calibration: int = opt(
        64, "Responses of the base model that fix the reward statistics and z* [R]."
    )
    statistics: str = opt(
        "",
        "Another run's statistics.json, whose statistics and z* are shared; empty calibrates anew.",
    )

    def __post_init__(self) -> None:
        require(self.mu > 0, "score.mu", self.mu, "must be positive")
        require(
            all(math.isfinite(z) for z in self.utopia), "score.utopia", self.utopia, "not finite"
        )
        require(self.calibration >= 2, "score.calibration", self.calibration, "must be at least 2")


@dataclass(frozen=True)
class GRPOConfig:
    """An inner update: its optimiser, its loss, and the memory that it takes."""

    lr: float = opt(1e-6, "Learning rate of AdamW; it follows a cosine over the run's updates [P].")
    weight_decay: float = opt(0.0, "Weight decay of AdamW.")
    beta: float = opt(0.1, "Coefficient of the KL term to the frozen base model [P].")
    kl: KLEstimator = opt("k3", "Estimator of that KL.")
    clip_low: float = opt(0.2, "The importance ratio is clipped below at 1 minus this.")
    clip_high: float = opt(0.2, "The importance ratio is clipped above at 1 plus this.")
    reduce: Reduce = opt(
        "grpo",
        "How token losses are reduced: a mean of each sequence's mean (grpo), a mean "
        "over tokens (dapo), or a sum over a constant (dr_grpo).",
    )
    max_grad_norm: float = opt(1.0, "Gradients are clipped to this norm; 0 does not clip.")
    skip_limit: int = opt(
        5, "Updates in a row whose loss or gradient is not finite before the run saves and stops."
    )
    keep: int = opt(
        0,
        "Rows of a group that GRPO learns from, those of the largest |advantage|; 0 keeps all [R].",
    )
    epochs: int = opt(1, "Updates made from each rollout.")
    importance_cap: float = opt(
        2.0, "Cap of the importance weights of rows that vLLM sampled; 0 weighs none [R]."
    )
    micro_tokens: int = opt(
        0,
        "Tokens of one forward and backward pass: fewer need less memory. 0 takes 1024 "
        "on a CPU, and on a GPU what memory has room for.",
    )
    recompute: bool = opt(
        False,
        "Whether only each layer's input is kept for the gradient, which needs less memory still.",
    )

    def __post_init__(self) -> None:
        require(self.lr > 0, "grpo.lr", self.lr, "positive")
        for name in ("weight_decay", "beta", "clip_low", "clip_high", "max_grad_norm", "keep"):
            value = getattr(self, name)
            require(value >= 0, f"grpo.{name}", value, "must not be negative")
        require(self.clip_low < 1, "grpo.clip_low", self.clip_low, "must be below 1")
        cap = self.importance_cap
        require(cap == 0 or 1 <= cap < math.inf, "grpo.importance_cap", cap, "0, or at least 1")
        for name in ("epochs", "skip_limit"):
            value = getattr(self, name)
            require(value >= 1, f"grpo.{name}", value, "must be at least 1")
        n = self.micro_tokens
        require(n >= 0, "grpo.micro_tokens", n, "must be 0 (automatic) or positive")


@dataclass(frozen=True)
class MetaConfig:
    """The outer loop: how many meta-steps, of what, and when the run ends."""

    steps: int = opt(400, "Number T of meta-steps [P].")
    tasks: int = opt(
        2, "Preferences of a meta-step, B_w [P]; recipes with several models train all of them."
    )
    n_inner: int = opt(2, "Inner updates for each preference [R].")
    epsilon: float = opt(1.5, "Step size of Reptile; it falls linearly to zero over the run [P].")
    max_delta: float = opt(0.0, "The meta-update is clipped to this norm; 0 does not clip.")
    adam: AdamMode = opt("persist_v", "What a task inherits of Adam's state.")
    parallel: bool = opt(
        False,
        "Whether a meta-step's tasks go in one batch; needs LoRA, the engine and Reptile [R].",
    )
    tokens: int = opt(
        0, "The run ends after this many generated tokens; 0 leaves that to meta.steps."
    )

    def __post_init__(self) -> None:
        require(self.steps >= 1, "meta.steps", self.steps, "must be at least 1")
        require(self.tasks >= 1, "meta.tasks", self.tasks, "must be at least 1")
        require(self.n_inner >= 1, "meta.n_inner", self.n_inner, "must be at least 1")
        require(self.epsilon > 0, "meta.epsilon", self.epsilon, "must be positive")
        require(self.max_delta >= 0, "meta.max_delta", self.max_delta, "must not be negative")
        require(self.tokens >= 0, "meta.tokens", self.tokens, "must be 0 (meta.steps) or positive")

    def progress(self, updates: int, tokens: int) -> float:
        """Give the share of the run that is done after so many updates and generated tokens."""
        if self.tokens:
            return min(tokens / self.tokens, 1.0)
        return updates / (self.steps * self.tasks * self.n_inner)


@dataclass(frozen=True)
class WarmupConfig:
    """A short supervised start before the first update: meal_fast.training.warmup [R]."""

    steps: int = opt(0, "Supervised steps before the first update; 0 starts from the base model.")
    prompts: str = opt(
        "", "The prompts that are answered for them; empty takes those of prompts.train."
    )
    answers: tuple[str, ...] = opt(
        (),
        "Where the answers that each objective likes come from, NAME=SOURCE: own, which is the "
        "base model's best one by that objective; own:INSTRUCTION, the same of answers that the "
        "base model is told how to give; packaged:refusals; or a .jsonl file with the keys "
        "response and, where it answers one prompt alone, prompt. The default is own.",
    )
    draws: int = opt(384, "Answers of the base model that the own ones are chosen from.")
    batch: int = opt(
        3, "Prompts of a step; each is learnt under every objective's preference at once."
    )
    tokens: int = opt(6, "First tokens of an answer that are learnt: what it will be lies there.")
    peaks: tuple[float, ...] = opt(
        (1.0, 1.0, 0.9),
        "Values that the favoured objective's preference has in turn; the others share the rest.",
    )
    benign: str = opt(
        "",
        "Ordinary prompts, to which the base model's own best answer is learnt under every "
        "preference; empty adds none.",
    )
    benign_share: float = opt(0.25, "Share of the steps' prompts that are ordinary ones.")
    lr: float = opt(2e-3, "Learning rate of AdamW, which falls linearly to zero.")

    def __post_init__(self) -> None:
        require(self.steps >= 0, "warmup.steps", self.steps, "must not be negative")
        for name in ("draws", "batch", "tokens"):
            value = getattr(self, name)
            require(value >= 1, f"warmup.{name}", value, "must be at least 1")
        good = bool(self.peaks) and all(0.5 < p <= 1 for p in self.peaks)
        require(good, "warmup.peaks", self.peaks, "one or more numbers above 0.5, at most 1")
        share = self.benign_share
        require(0 <= share < 1, "warmup.benign_share", share, "a share, at least 0 and below 1")
        require(0 < self.lr < math.inf, "warmup.lr", self.lr, "must be positive")


@dataclass(frozen=True)
class EvaluationConfig:
    """The sweep over preferences when training has ended."""

    prompts: int = opt(16, "Held-out prompts of a sweep.")
    samples: int = opt(1, "Sampled responses for each prompt and weight, beside the greedy one.")
    grid: int = opt(
        11,
        "Weights a side of the simplex lattice that is swept; 28 with K=2 is BPS's "
        "Table 1, 13 with K=3 is RiC's [P].",
    )
    benign: str = opt(
        "",
        "Ordinary prompts whose held-out part is asked as well, to count the marks in their "
        "answers: a policy must not refuse these; empty asks none [R].",
    )
    ask: str = opt("", "One more prompt, which is answered at four weights; empty asks none.")
    marks: tuple[str, ...] = opt(
        (),
        "Marks that are counted in answers by rule, of refuses, complies and both, beside the "
        "rewards; they are never a reward [R].",
    )
    statistics: str = opt(
        "",
        "Another run's statistics.json, by which results are measured; empty takes the run's own.",
    )

    def __post_init__(self) -> None:
        require(self.prompts >= 1, "evaluation.prompts", self.prompts, "must be at least 1")
        require(self.samples >= 1, "evaluation.samples", self.samples, "must be at least 1")
        require(self.grid >= 2, "evaluation.grid", self.grid, "must be at least 2")
        known = set(self.marks) <= set(get_args(Mark)) and len(set(self.marks)) == len(self.marks)
        remedy = f"choose from {', '.join(get_args(Mark))}, each once"
        require(known, "evaluation.marks", self.marks, remedy)
