"""The runs that have a name: `python -m meal_fast.train NAME`. Imports no torch, as config.py."""

from __future__ import annotations

import dataclasses

from .config import (
    Config,
    EvaluationConfig,
    GRPOConfig,
    MetaConfig,
    PolicyConfig,
    PreferenceConfig,
    PromptConfig,
    RolloutConfig,
    ScoreConfig,
)

# steering: the quickstart's longer form; it has steered two seeds of three, see the README.
_STEERING = Config(
    prompts=PromptConfig(train="packaged:safety"),
    preference=PreferenceConfig(alpha=0.2, rotate=True),
    rollout=RolloutConfig(prompts=4, samples=8, max_new_tokens=24),
    score=ScoreConfig(calibration=96),
    grpo=GRPOConfig(lr=1e-3, beta=0.05, micro_tokens=1024),
    meta=MetaConfig(steps=60, tasks=2, n_inner=2, epsilon=1.5),
    evaluation=EvaluationConfig(prompts=48, samples=2),
    checkpoint_every=5,
)

# quickstart: what `make train` runs: the start of that.
_QUICKSTART = dataclasses.replace(
    _STEERING,
    score=ScoreConfig(calibration=32),
    meta=MetaConfig(steps=9, tasks=2, n_inner=2, epsilon=1.5),
    evaluation=EvaluationConfig(prompts=8),
    checkpoint_every=1,
)

# BPS's own experiment [P]; n_inner, samples, utopia and the response length are not published [R].
_HH_QWEN2 = Config(
    objectives=(
        "helpful=Ray2333/gpt2-large-helpful-reward_model",
        "harmless=Ray2333/gpt2-large-harmless-reward_model",
    ),
    policy=PolicyConfig(path="Qwen/Qwen2-0.5B-Instruct", tuning="full", preference_text="numbers"),
    prompts=PromptConfig(
        train="HuggingFaceH4/ultrafeedback_binarized", evaluation="PKU-Alignment/BeaverTails"
    ),
    rollout=RolloutConfig(prompts=2, samples=8, max_new_tokens=128, temperature=0.9),
    grpo=GRPOConfig(lr=1e-6, beta=0.1, micro_tokens=8192),
    meta=MetaConfig(steps=400, tasks=2, n_inner=2, epsilon=1.5),
    evaluation=EvaluationConfig(prompts=64, grid=28),
    checkpoint_every=20,
)

_EXACT = ("first=meal_fast.worlds:first", "second=meal_fast.worlds:second")

# tiny: a random model of two layers, for tests and for reading the code with a debugger.
_TINY = Config(
    objectives=_EXACT,
    policy=PolicyConfig(
        path="world:tiny", lora_rank=4, lora_alpha=8, preference_text="numbers", device="cpu"
    ),
    prompts=PromptConfig(train="world:tiny"),
    rollout=RolloutConfig(prompts=2, samples=8, max_new_tokens=6, temperature=1.0),
    score=ScoreConfig(normalization="none", utopia=(1.1, 1.1), calibration=16),
    grpo=GRPOConfig(lr=5e-3, beta=0.02),
    meta=MetaConfig(steps=4, tasks=2, n_inner=2, epsilon=1.5),
    evaluation=EvaluationConfig(prompts=4, samples=2, grid=5),
    checkpoint_every=2,
)

# concave-front: a known front, see meal_fast.worlds; trains in about a minute.
_CONCAVE_FRONT = Config(
    recipe="weighted-grpo",
    objectives=_EXACT,
    policy=PolicyConfig(
        path="world:concave-front", tuning="full", preference_text="numbers", device="cpu"
    ),
    prompts=PromptConfig(train="world:concave-front"),
    rollout=RolloutConfig(prompts=1, samples=32, max_new_tokens=6, temperature=1.0),
    score=ScoreConfig(normalization="none", mu=0.02, utopia=(1.1, 1.1)),
    grpo=GRPOConfig(lr=2e-3, beta=0.02),
    meta=MetaConfig(steps=300, tasks=2, n_inner=2, epsilon=1.5),
    evaluation=EvaluationConfig(prompts=1, samples=64, grid=11),
    checkpoint_every=100,
)

PRESETS: dict[str, Config] = {
    "quickstart": _QUICKSTART,
    "steering": _STEERING,
    "tiny": _TINY,
    "concave-front": _CONCAVE_FRONT,
    "hh-qwen2": _HH_QWEN2,
}


def preset(name: str) -> Config:
    """The preset called `name`: see `PRESETS`. Raises ValueError for another name."""
    if name not in PRESETS:
        raise ValueError(f"preset={name!r}: unknown; choose from {', '.join(PRESETS)}")
    return PRESETS[name]
