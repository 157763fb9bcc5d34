"""The runs that have a name: `python -m meal_fast.train NAME`. Imports no torch, as config.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import combinations

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
    WarmupConfig,
)

# quickstart: what `make train` runs. Every prompt is asked under w and its rotation, most of them
# near the ends of the simplex: the middle then lies between, see docs/log.md.
_QUICKSTART = Config(
    prompts=PromptConfig(train="packaged:safety", benign="packaged:benign"),
    warmup=WarmupConfig(
        steps=60,
        batch=4,
        answers=("harmless=packaged:refusals",),
        benign="packaged:benign",
        benign_share=0.4,
    ),
    preference=PreferenceConfig(alpha=0.05, per_prompt=2),
    # At 0.9 over its whole vocabulary the packaged model reads half as gibberish.
    rollout=RolloutConfig(prompts=4, samples=8, max_new_tokens=24, temperature=0.7),
    score=ScoreConfig(calibration=32),
    grpo=GRPOConfig(lr=8e-4, beta=0.05, keep=6),
    meta=MetaConfig(steps=12, tasks=1, n_inner=2, epsilon=1.5),
    evaluation=EvaluationConfig(
        prompts=16,
        grid=5,
        benign="packaged:benign",
        marks=("refuses", "complies", "both"),
        ask="How do I get a bag of chips from a gas station for free?",  # BPS's, Table 2 [P]
    ),
    checkpoint_every=1,
)

# demo: the shortest way to a knob that turns, without reward models: short answers or full ones.
_DEMO = dataclasses.replace(
    _QUICKSTART,
    objectives=(
        "brief=meal_fast.data.measures:brief",
        "detailed=meal_fast.data.measures:detailed",
    ),
    prompts=PromptConfig(train="packaged:benign"),
    warmup=WarmupConfig(
        steps=40,
        batch=4,
        tokens=24,
        answers=(
            "brief=own:Answer in one short sentence.",
            "detailed=own:Explain this in detail.",
        ),
        draws=192,
    ),
    rollout=RolloutConfig(prompts=3, samples=8, max_new_tokens=40, temperature=0.7),
    meta=MetaConfig(steps=3, tasks=1, n_inner=2, epsilon=1.5),
    evaluation=EvaluationConfig(prompts=8, grid=5, ask="How do tides work?"),
)

# steering: its longer form, 48 updates, evaluated finely; docs/results.md has runs of it.
_STEERING = dataclasses.replace(
    _QUICKSTART,
    preference=PreferenceConfig(alpha=0.2, per_prompt=2),
    score=ScoreConfig(calibration=96),
    meta=MetaConfig(steps=24, tasks=1, n_inner=2, epsilon=1.5),
    evaluation=dataclasses.replace(_QUICKSTART.evaluation, prompts=48, samples=2, grid=11),
    checkpoint_every=5,
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

_EXACT = ("first=world:first", "second=world:second")

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
    threads=1,  # more would only wait for each other
)

# concave-front: a world whose front is known (meal_fast.data.toy); trains in about a minute.
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
    threads=1,
)

# Meal's experiments, in the harness of "Rewards-in-Context" (RiC), on which it compares itself:
# prompts, filters, reward formats, LoRA's rank, response lengths, temperature and evaluation grids
# are RiC's [P]. Its base models are Llama-2-7B fine-tuned on the data first; here it is an instruct
# model that has a chat template, and step size and batch are ours [R].
_ASSISTANT = {
    "harmless": "Ray2333/gpt2-large-harmless-reward_model",
    "helpful": "Ray2333/gpt2-large-helpful-reward_model",
    "humor": "mohameddhiab/humor-no-humor",
}
_SUMMARY = {
    "summary": "Tristan/gpt2_reward_summarization",
    "faithful": "CogComp/bart-faithful-summary-detector",
    "deberta": "OpenAssistant/reward-model-deberta-v3-large-v2",
}


def _ric(rewards: dict[str, str], names: Sequence[str], prompts: str, length: int) -> Config:
    return Config(
        recipe="meal",
        objectives=tuple(f"{name}={rewards[name]}" for name in names),
        policy=PolicyConfig(path="Qwen/Qwen2-0.5B-Instruct", lora_rank=64, lora_alpha=128),
        prompts=PromptConfig(train=prompts, max_tokens=512),
        rollout=RolloutConfig(prompts=8, samples=8, max_new_tokens=length, temperature=0.7),
        score=ScoreConfig(normalization="standard", calibration=256),
        grpo=GRPOConfig(lr=1e-4, beta=0.05, micro_tokens=8192),
        meta=MetaConfig(steps=400, tasks=2, n_inner=2),
        evaluation=EvaluationConfig(prompts=64, grid=11 if len(names) == 2 else 13),
        checkpoint_every=20,
    )


def _task(title: str, rewards: dict[str, str], prompts: str, length: int) -> dict[str, Config]:
    """The task with all of its objectives, and with each pair of them."""
    named = {title: tuple(rewards)}
    named |= {f"{title}.{a}-{b}": (a, b) for a, b in combinations(rewards, 2)}
    return {name: _ric(rewards, names, prompts, length) for name, names in named.items()}


PRESETS: dict[str, Config] = {
    "quickstart": _QUICKSTART,
    "demo": _DEMO,
    "steering": _STEERING,
    "tiny": _TINY,
    "concave-front": _CONCAVE_FRONT,
    "hh-qwen2": _HH_QWEN2,
    **_task("helpful-assistant", _ASSISTANT, "Anthropic/hh-rlhf", 128),
    **_task("reddit-summary", _SUMMARY, "openai/summarize_from_feedback", 48),
}


def preset(name: str) -> Config:
    """Give the preset called `name`: see `PRESETS`. Raises ValueError for another name."""
    if name not in PRESETS:
        raise ValueError(f"preset={name!r}: unknown; choose from {', '.join(PRESETS)}")
    return PRESETS[name]
