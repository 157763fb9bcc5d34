"""Where an update's responses come from: sampled, scored and made ready for the learner."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from meal_fast import ops
from meal_fast.config.config import Config
from meal_fast.config.recipes import Score, spec_of
from meal_fast.data import preferences
from meal_fast.data.objectives import Objectives
from meal_fast.data.preferences import Preference
from meal_fast.data.reward_statistics import Scales, constant, restricted
from meal_fast.data_types import Rollout, Scored, rng_seed
from meal_fast.models.policy import Network, Policy
from meal_fast.models.shared_prefix import to_device
from meal_fast.rollout import Request, backend
from meal_fast.rollout.sequence import told_apart
from meal_fast.training.batch import Batch, RngKey, Task
from meal_fast.training.distributed import ALONE, Mesh
from meal_fast.training.net_update import NetUpdate
from meal_fast.training.parts import moved, positions, together
from meal_fast.training.sampled import sampled

T = TypeVar("T")


def collected(collector: Sampled, objectives: Objectives, tasks: Sequence[Task]) -> Batch:
    """Collect, and note in the batch's log how many rows reward models had to cut."""
    objectives.counts()  # of calibration and evaluation, which no update is told of
    collector.counts.clear()
    batch = collector.collect(tasks)
    return replace(batch, counts=dict(collector.counts)) if collector.counts else batch


class Sampled:
    """Sample every prompt under the task's preference, `rollout.samples` times; reject nothing."""

    standardizes: ClassVar[bool] = False  # whether it needs `Scales.standard`
    net: NetUpdate | None = None  # what Meal trains beside the policy

    def __init__(
        self,
        policy: Policy,
        objectives: Objectives,
        scales: Scales,
        config: Config,
        score: Score,
        mesh: Mesh = ALONE,
    ) -> None:
        self.policy, self.objectives, self.scales = policy, objectives, scales
        self.config, self.kind, self.mesh = config, score, mesh
        self.counts: dict[str, dict[str, int]] = {}  # of rows that were cut
        self.prepare()

    def prepare(self) -> None:
        """Make what a kind of collector has beside these."""

    @classmethod
    def check(cls, config: Config) -> None:
        """Raise ValueError for what it will not find; before anything expensive."""
        backend(config.rollout.backend)

    def collect(self, tasks: Sequence[Task]) -> Batch:
        """Sample and score; of several tasks in one rollout, each through its own adapter.

        Nothing is trained by it.
        """
        if len(tasks) == 1:
            (task,) = tasks
            return self._all_of(self.asked(task), task.rng_key)
        requests = [
            replace(request, task_id=lane, rng_key=task.rng_key)
            for lane, task in enumerate(tasks)
            for request in self.asked(task)
        ]
        return self._all_of(requests, ())

    def asked(
        self,
        task: Task,
        own: Sequence[Preference] | None = None,  # default: the task's
        joined: Sequence[bool] | None = None,  # default: all
    ) -> list[Request]:
        """Ask each prompt under its own preference and, where others join it, under m - 1 more.

        m is `preference.per_prompt`; advantages compare the samples of a prompt under one of them.
        """
        options, samples = self.config.preference, self.config.rollout.samples
        n = len(task.prompts)
        requests = []
        for i, (prompt, w, several) in enumerate(
            zip(task.prompts, own or [task.preference] * n, joined or [True] * n, strict=True)
        ):
            rng_key = (self.config.seed, *task.rng_key, i)
            mates = preferences.mates(w, options.per_prompt if several else 1, options, rng_key)
            requests += [Request(prompt, mate, samples * count) for mate, count in mates]
        return requests

    def state(self) -> dict[str, Any]:
        """Give what the next updates depend on, beside the policy."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""

    def save(self, folder: Path) -> None:
        """Write what a user of the policy needs beside it, or into it: it is saved after this."""

    def _all_of(
        self, requests: Sequence[Request], rng_key: RngKey, network: Network | None = None
    ) -> Batch:
        rolled, reward_RK = self.drawn(requests, rng_key, network)
        scored = self.score(reward_RK, rolled, partial=self.objectives.partial)
        return Batch(rolled, scored, reward_RK, sum(rolled.lengths))

    def drawn(
        self, requests: Sequence[Request], rng_key: RngKey, network: Network | None = None
    ) -> tuple[Rollout, Tensor]:
        """Sample and score: part by part, each process its own, and every process has it all.

        Gives the rollout and its raw rewards (R, K), where it is.
        """

        learnt = network is None and spec_of(self.config).loss == "grpo"

        def draw(own: Sequence[Request]) -> tuple[Rollout, Tensor]:
            rolled = sampled(self.policy, own, self.config, rng_key, network, learnt=learnt)
            texts = [rolled.prompts[g].text for g in rolled.groups]
            return rolled, self.objectives.rewards(texts, rolled.texts)

        places, parts = self.in_parts(requests, draw)
        rolled, order_R = together([part for part, _ in parts], places)
        rewards = [reward_RK for _, reward_RK in parts]
        return rolled, rewards[0] if len(rewards) == 1 else torch.cat(rewards)[order_R]

    def in_parts(
        self, requests: Sequence[Request], draw: Callable[[Sequence[Request]], T]
    ) -> tuple[list[list[int]], list[T]]:
        """Draw every part of an update's requests by itself, each process its own.

        Gives each part's places in `requests`, and what was drawn for it, on every process. What
        one process fails at, all fail at.
        """
        virtual, device = self.mesh.layout.virtual, self.policy.device
        apart = told_apart(requests) if virtual > 1 else requests
        places = positions(apart, virtual)

        def mine() -> tuple[list[T], dict[str, dict[str, int]], bool]:
            found = [draw([apart[i] for i in places[part]]) for part in self.mesh.shards]
            return found, self.objectives.counts(), self.objectives.partial

        if self.mesh.layout.parts == 1:
            found = [mine()]
        else:
            found = moved(self.mesh.in_group(lambda: moved(mine(), "cpu")), device)
        for _, counts, partial in found:
            self.objectives.partial |= partial
            for what, of_names in counts.items():
                held = self.counts.setdefault(what, {})
                for name, n in of_names.items():
                    held[name] = held.get(name, 0) + n
        return places, [part for parts, _, _ in found for part in parts]

    def score(self, reward_RK: Tensor, rolled: Rollout, *, partial: bool = False) -> Scored:
        """Give scores and group-relative advantages of a rollout's rewards, which it normalises.

        All where the rollout is, in one launch of a GPU, and nothing waits for it. A row to which
        an objective does not apply is scored under w restricted to those that do; `partial` says
        that there may be one.
        """
        normalizer, given, w_RK = self.scales.normalizer, reward_RK, rolled.condition_RK
        if partial:
            w_RK = restricted(w_RK, reward_RK)
        offset = divisor = None
        if normalizer.linear:
            offset, divisor = (constant(x, given) for x in (normalizer.offset, normalizer.divisor))
        else:
            given = normalizer.apply(reward_RK)
        if partial:  # whatever stands there has no weight
            given = torch.where(given.isnan(), 0.0 if offset is None else offset, given)
        rows_of = Counter(rolled.groups)  # which lie group by group
        ends = accumulate((rows_of[group] for group in range(len(rolled.prompts))), initial=0)
        (offsets,) = to_device([torch.tensor(list(ends))], reward_RK.device)
        score, advantage = ops.group_advantages(
            given,
            w_RK,
            offsets=offsets,
            utopia=constant(self.scales.utopia, reward_RK),
            mu=self.config.score.mu,
            scalarization=self.kind,
            offset=offset,
            divisor=divisor,
        )
        return Scored(reward_RK, score, advantage)


class BaseSamples(Sampled):
    """Sample the base model, for a guide: every prompt has a preference of its own.

    w ~ Dir(`parm.alpha`), on the whole simplex. The base model reads no preference: it decides
    which loss the guide is trained by, and nothing about the samples.
    """

    def collect(self, tasks: Sequence[Task]) -> Batch:
        (task,) = tasks
        drawn = preferences.draw(
            len(self.config.names),
            alpha=self.config.parm.alpha,
            points=0,
            seed=rng_seed(self.config.seed, "parm", *task.rng_key),
            step=0,
            count=len(task.prompts),
        )
        with self.policy.reference() as base:
            batch = self._all_of(self.asked(task, drawn), task.rng_key, base)
        return replace(
            batch, log={"w": batch.rolled.condition_RK.mean(0).tolist()}
        )  # not the task's
