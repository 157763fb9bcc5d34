"""Where an update's responses come from: sampled, scored and made ready for the learner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from meal_fast import ops
from meal_fast.config.config import Config
from meal_fast.config.recipes import Score
from meal_fast.data import preferences
from meal_fast.data.objectives import Objectives
from meal_fast.data.preferences import Preference
from meal_fast.data.reward_statistics import Scales, constant
from meal_fast.data_types import Prompt, Rollout, Scored, rng_seed
from meal_fast.models.policy import Network, Policy
from meal_fast.models.shared_prefix import to_device
from meal_fast.rollout import Request, Sampling, open_backend

RngKey = tuple[int | str, ...]


@dataclass(frozen=True)
class Experience:
    """What one policy update learns from."""

    rolled: Rollout  # what the learner sees; it may hold no row
    scored: Scored
    reward_RK: Tensor  # raw, of all responses that were sampled, kept or not
    tokens: int  # generated, for all of them
    log: dict[str, Any] = field(default_factory=dict)

    def parts(self) -> list[Experience]:
        """What each task learns from, where it holds that of several."""
        if not self.rolled.task_id:
            return [self]
        parts = []
        for rows in self.rolled.tasks:
            rolled, of = self.rolled.of_task(rows), self.scored
            scored = Scored(of.reward_RK[rows], of.score_R[rows], of.advantage_R[rows])
            tokens = sum(rolled.lengths)
            parts.append(Experience(rolled, scored, self.reward_RK[rows], tokens, self.log))
        return parts


class Sampled:
    """Every prompt under the task's preference, `rollout.samples` times; nothing is rejected."""

    standardizes: ClassVar[bool] = False  # whether it needs `Scales.standard`

    def __init__(
        self, policy: Policy, objectives: Objectives, scales: Scales, config: Config, score: Score
    ) -> None:
        self.policy, self.objectives, self.scales = policy, objectives, scales
        self.config, self.kind = config, score

    @classmethod
    def check(cls, config: Config) -> None:
        """Raises ValueError for what it will not find; before anything expensive."""

    def collect(self, prompts: Sequence[Prompt], w: Preference, rng_key: RngKey) -> Experience:
        """Samples and scores; `rng_key` keys the randomness, with the prompt, w and the sample."""
        return self._all_of([Request(p, w, self.config.rollout.samples) for p in prompts], rng_key)

    def collect_tasks(
        self, tasks: Sequence[tuple[Sequence[Prompt], Preference, RngKey]]
    ) -> Experience:
        """`collect`; of several tasks in one rollout of the stacked policy, each by its adapter."""
        if len(tasks) == 1:
            return self.collect(*tasks[0])
        requests = [
            Request(p, w, self.config.rollout.samples, task_id, rng_key)
            for task_id, (prompts, w, rng_key) in enumerate(tasks)
            for p in prompts
        ]
        return self._all_of(requests, ())

    def learned(self, update: int) -> dict[str, float]:
        """Called after each policy update, which is number `update`; returns metrics."""
        return {}

    def state(self) -> dict[str, Any]:
        """What the next updates depend on, beside the policy."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass

    def save(self, folder: Path) -> None:
        """What a user of the finished policy needs beside it; or in it: it is saved after this."""

    def _all_of(
        self, requests: Sequence[Request], rng_key: RngKey, network: Network | None = None
    ) -> Experience:
        rolled = self._sampled(requests, rng_key, network)
        scored = self.score(self._rewards(rolled), rolled)
        return Experience(rolled, scored, scored.reward_RK, sum(rolled.lengths))

    def _sampled(
        self, requests: Sequence[Request], rng_key: RngKey, network: Network | None = None
    ) -> Rollout:
        """The policy's responses, or another network's."""
        options = self.config.rollout
        sampling = Sampling(options.max_new_tokens, options.temperature, self.config.seed, rng_key)
        with open_backend(
            options.backend,
            self.policy,
            network=network,
            max_cache_bytes=options.max_cache_bytes,
            join=True,
        ) as sampler:
            return sampler.generate(requests, sampling)

    def _rewards(self, rolled: Rollout) -> Tensor:
        """Raw rewards (R, K), where the rollout is."""
        texts = [rolled.prompts[g].text for g in rolled.groups]
        return self.objectives.rewards(texts, rolled.texts)

    def score(self, reward_RK: Tensor, rolled: Rollout) -> Scored:
        """Scores and group-relative advantages of a rollout's rewards, which it normalises.

        All where the rollout is, in one launch of a GPU, and nothing waits for it.
        """
        normalizer, given = self.scales.normalizer, reward_RK
        offset = divisor = None
        if normalizer.linear:
            offset, divisor = (constant(x, given) for x in (normalizer.offset, normalizer.divisor))
        else:
            given = normalizer.apply(reward_RK)
        rows_of = Counter(rolled.groups)  # which lie group by group
        ends = accumulate((rows_of[group] for group in range(len(rolled.prompts))), initial=0)
        (offsets,) = to_device([torch.tensor(list(ends))], reward_RK.device)
        score, advantage = ops.group_advantages(
            given,
            rolled.w_RK,
            offsets=offsets,
            utopia=constant(self.scales.utopia, reward_RK),
            mu=self.config.score.mu,
            scalarization=self.kind,
            offset=offset,
            divisor=divisor,
        )
        return Scored(reward_RK, score, advantage)


class BaseSamples(Sampled):
    """Samples of the base model, for a guide: every prompt has a preference of its own.

    w ~ Dir(`parm.alpha`), on the whole simplex. The base model reads no preference: it decides
    which loss the guide is trained by, and nothing about the samples.
    """

    def collect(self, prompts: Sequence[Prompt], w: Preference, rng_key: RngKey) -> Experience:
        drawn = preferences.draw(
            len(self.config.names),
            alpha=self.config.parm.alpha,
            points=0,
            seed=rng_seed(self.config.seed, "parm", *rng_key),
            step=0,
            count=len(prompts),
        )
        samples = self.config.rollout.samples
        requests = [Request(p, own, samples) for p, own in zip(prompts, drawn, strict=True)]
        with self.policy.reference() as base:
            batch = self._all_of(requests, rng_key, base)
        return replace(batch, log={"w": batch.rolled.w_RK.mean(0).tolist()})  # not the task's
