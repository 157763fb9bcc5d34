"""What an inner update and a meta-step of a run have to do, in rows and tokens. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from meal_fast.common import require

from .model_shape import RewardShape, reward_shape
from .recipes import LOSSES, spec_of
from .sections import AdamMode, Backend, Dtype, Tuning

if TYPE_CHECKING:
    from .config import Config


@dataclass(frozen=True)
class Work:
    """One inner update, all processes of a group together, and the meta-step around it."""

    prompts: int
    prefixes: int  # a prompt under a preference: prompts x preferences
    samples: int  # of a prefix
    kept: int  # of them that are learnt from
    prompt_tokens: float  # of a prefix
    response_tokens: float
    max_new_tokens: int
    tuning: Tuning
    dtype: Dtype
    rank: int
    passes: int  # over the reference, for an update of the policy: 0 or 1
    epochs: int
    recompute: bool
    micro_tokens: int  # 0: what the device has room for
    backend: Backend
    cache_bytes: int  # 0: what the device has room for
    tasks: int
    n_inner: int
    adam: AdamMode
    reptile: bool  # the tasks' deltas become one step
    models: int  # that are kept, a preference each; 0: one serves all
    objectives: int
    rewards: tuple[RewardShape, ...]
    unknown: tuple[str, ...] = ()  # objectives whose reward models' sizes are not known

    @property
    def rows(self) -> int:
        """Count the responses of an update."""
        return self.prefixes * self.samples

    @property
    def learnt_tokens(self) -> float:
        """Count the tokens that go through the policy to learn: prefixes once, kept responses."""
        return self.prefixes * (self.prompt_tokens + self.kept * self.response_tokens)

    @property
    def learnt_responses(self) -> float:
        """Count the sampled tokens that reach the head to learn."""
        return self.prefixes * self.kept * self.response_tokens


def work_of(
    config: Config, prompt_tokens: float | None = None, response_tokens: float | None = None
) -> Work:
    """Read a run's work from its options.

    Lengths are those given, in tokens. Without: prompts of half of prompts.max_tokens, responses of
    rollout.max_new_tokens, the most that they can have [R].

    Raises ValueError for lengths that cannot be.
    """
    spec, rollout, grpo, meta = spec_of(config), config.rollout, config.grpo, config.meta
    prompt_tokens = config.prompts.max_tokens / 2 if prompt_tokens is None else prompt_tokens
    most = rollout.max_new_tokens
    response_tokens = most if response_tokens is None else response_tokens
    good = math.isfinite(prompt_tokens) and prompt_tokens >= 1
    require(good, "prompt-tokens", prompt_tokens, "must be at least 1")
    remedy = f"must be 1 or more, and at most rollout.max_new_tokens={most}"
    require(1 <= response_tokens <= most, "response-tokens", response_tokens, remedy)
    sources = [(o.partition("=")[0], o.partition("=")[2]) for o in config.objectives]
    found = [(name, reward_shape(source)) for name, source in sources]
    keep = min(grpo.keep or rollout.samples, rollout.samples) if spec.loss == "grpo" else 0
    compares = spec.loss == "dpo" or (spec.loss == "grpo" and grpo.beta > 0)
    return Work(
        prompts=rollout.prompts,
        prefixes=rollout.prompts * config.preference.per_prompt,
        samples=rollout.samples,
        kept=keep or rollout.samples,
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        max_new_tokens=most,
        tuning=config.policy.tuning,
        dtype=config.policy.dtype,
        rank=config.policy.lora_rank,
        passes=int(compares and not LOSSES[spec.loss].guide),
        epochs=grpo.epochs,
        recompute=grpo.recompute,
        micro_tokens=grpo.micro_tokens,
        backend=rollout.backend,
        cache_bytes=rollout.max_cache_bytes,
        tasks=meta.tasks,
        n_inner=meta.n_inner,
        adam=meta.adam,
        reptile=spec.outer in ("reptile", "parallel-reptile"),
        models=meta.tasks if spec.models else 0,
        objectives=len(config.objectives),
        rewards=tuple(shape for _, shape in found if shape is not None),
        unknown=tuple(name for name, shape in found if shape is None),
    )
