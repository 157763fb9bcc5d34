"""Rewards-in-Context (RiC [P: its own paper]; as a stream of updates [R]).

The policy reads what rewards its answer is to have, `<rm1_score> 0.3 <rm2_score> -1.2`: K rewards,
standardised by the calibration sample, to one decimal. It learns that by imitation alone, every
response as the answer to the rewards that it has itself:

    offline   responses of the base model, which is asked for nothing, or those of a data set
              (`ric.data`), as far as rollout.max_new_tokens goes; all are learnt
    online    goals g are drawn, the policy answers under them, and what has any reward at or above
              that reward's 0.7-quantile among the update's responses is learnt, with its own
              rewards in the prompt, not g; a share of the offline responses again beside them, so
              that low rewards keep their meaning

    g_k       drawn from the offline responses' r_k, each k by itself; then the smallest g_k is
              replaced by hi_k: near the best that was seen, and no two alike

At evaluation a preference is asked for by its `preference.Goals`, between lo_k and hi_k, the least
and the greatest r_k that the policy was taught. It learns through `losses.sft` with a_i = 1, and
the paper's form has no KL term: that is `grpo.beta=0`. An update's drawn preference has no part.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from meal_fast.config.config import Config
from meal_fast.data.preferences import Goals, Preference
from meal_fast.data.prompts import in_turn, read_answers
from meal_fast.data_types import Prompt, Rollout, Weighted, rng_seed
from meal_fast.models.policy import Policy
from meal_fast.rollout import Request
from meal_fast.rollout.fitting import context_room
from meal_fast.rollout.sequence import Drawn, as_drawn, gathered
from meal_fast.training.batch import Batch, Task

from .base import Sampled


@dataclass(frozen=True)
class Answer:
    """A response and what it is worth."""

    prompt: Prompt
    drawn: Drawn
    reward: tuple[float, ...]  # (K,), raw


class RiC(Sampled):
    """Give the base model's responses, later the policy's, under their own rewards."""

    standardizes: ClassVar[bool] = True

    def prepare(self) -> None:
        policy, scales, config = self.policy, self.scales, self.config
        if scales.standard is None:
            raise ValueError(
                "RiC statistics missing: statistics.json has no 'standard', by which rewards are "
                "written into prompts; calibrate the run anew"
            )
        self.standard = scales.standard
        self.offline: list[Answer] = []  # the last `ric.buffer` of them
        k = len(config.names)
        self.lo, self.hi = torch.full((k,), torch.inf), torch.full((k,), -torch.inf)
        self.data: list[tuple[Prompt, Drawn]] = []
        if config.ric.data:
            rows = read_answers(Path(config.ric.data))
            limit = min(config.prompts.max_tokens, context_room(policy, config))
            fit = [row for row in rows if len(policy.encode_prompt(row[0].text)) <= limit]
            if not fit:
                limited = limit == config.prompts.max_tokens
                remedy = "raise prompts.max_tokens" if limited else "the context has no more room"
                raise ValueError(
                    f"ric.data={config.ric.data!r}: no prompt has at most {limit} tokens; {remedy}"
                )
            length = config.rollout.max_new_tokens
            self.data = [(prompt, as_drawn(policy, text, length)) for prompt, text in fit]

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        if config.ric.data:
            read_answers(Path(config.ric.data))

    def collect(self, tasks: Sequence[Task]) -> Batch:
        (task,) = tasks
        online = task.progress >= self.config.ric.offline
        return (self._online if online else self._offline)(task)

    def state(self) -> dict[str, Any]:
        rows = [
            (a.prompt.id, a.prompt.text, a.drawn.tokens, a.drawn.logp, a.drawn.finish, a.reward)
            for a in self.offline
        ]
        return {"offline": rows, "lo": self.lo.clone(), "hi": self.hi.clone()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.offline = [
            Answer(Prompt(name, text), Drawn(tokens, logp, finish), reward)
            for name, text, tokens, logp, finish, reward in state["offline"]
        ]
        self.lo, self.hi = state["lo"], state["hi"]

    def save(self, folder: Path) -> None:
        """Put the goals into the policy: whoever serves it needs no run folder."""
        self.policy.goals = Goals(tuple(self.lo.tolist()), tuple(self.hi.tolist()))

    def _offline(self, task: Task) -> Batch:
        if self.data:
            rolled = self._given(task.update)
            texts = [rolled.prompts[g].text for g in rolled.groups]
            reward_RK = self.objectives.rewards(texts, rolled.texts)
        else:
            requests = [Request(p, None, self.config.rollout.samples) for p in task.prompts]
            with self.policy.reference() as base:
                rolled, reward_RK = self.drawn(requests, task.rng_key, base)
        answers = answers_of(rolled, reward_RK)
        self.offline = (self.offline + answers)[-self.config.ric.buffer :]
        batch = self._taught(answers, rolled, reward_RK, {"online": False})
        return dataclasses.replace(batch, tokens=0) if self.data else batch

    def _given(self, update: int) -> Rollout:
        """Read as many of the data set's responses as an update has; generate nothing."""
        options, started = self.config.rollout, time.perf_counter()
        count = options.prompts * options.samples
        rows = in_turn(self.data, update * count, count, self.config.seed, "ric.data")
        return gathered(
            self.policy,
            [Request(prompt, None) for prompt, _ in rows],
            [drawn for _, drawn in rows],
            started=started,
            prefill_tokens=0,
            on_policy=False,
        )

    def _online(self, task: Task) -> Batch:
        options, samples = self.config.ric, self.config.rollout.samples
        random = np.random.Generator(
            np.random.Philox(key=rng_seed(self.config.seed, "ric", *task.rng_key))
        )
        seen_MK = self.standardized(self.offline)
        goals = drawn_goals(seen_MK, self.hi, len(task.prompts) * samples, random)
        requests = [
            Request(p, g, count)
            for i, p in enumerate(task.prompts)
            # Equal goals are one request: two would be asked with the same key, and answer alike.
            for g, count in Counter(goals[i * samples : (i + 1) * samples]).items()
        ]
        rolled, reward_RK = self.drawn(requests, task.rng_key)
        answers = answers_of(rolled, reward_RK)
        kept_R = above(self.standardized(answers), options.quantile).tolist()
        kept = [a for a, keep in zip(answers, kept_R, strict=True) if keep]
        count = min(round(options.replay * len(kept)), len(self.offline))
        again = random.permutation(len(self.offline))[:count].tolist()
        log = {
            "online": True,
            "asked": np.mean(goals, 0).tolist(),
            "acceptance": len(kept) / len(answers),
            "replayed": count,
        }
        return self._taught(kept + [self.offline[i] for i in again], rolled, reward_RK, log)

    def _taught(
        self, answers: Sequence[Answer], sampled: Rollout, reward_RK: Tensor, log: dict[str, Any]
    ) -> Batch:
        """Give what the learner gets of the chosen responses; `sampled`: of all."""
        standard_RK = self.standardized(answers)
        self.lo = torch.minimum(self.lo, standard_RK.amin(0))
        self.hi = torch.maximum(self.hi, standard_RK.amax(0))
        rolled, order = under_own_rewards(self.policy, answers, standard_RK)
        rolled = dataclasses.replace(
            rolled, prefill_tokens=sampled.prefill_tokens, seconds=sampled.seconds
        )
        raw_RK = torch.tensor([answers[i].reward for i in order], device=rolled.mask_RT.device)
        score_R = self.scales.normalizer.apply(raw_RK).mean(1)  # for the log: unweighted
        ones_R = torch.ones(len(order), device=rolled.mask_RT.device)
        scored = Weighted(raw_RK, score_R, ones_R)
        log |= {"goal_lo": self.lo.tolist(), "goal_hi": self.hi.tolist()}
        return Batch(rolled, scored, reward_RK, int(sampled.mask_RT.sum()), log)

    def standardized(self, answers: Sequence[Answer]) -> Tensor:
        """Give (R, K) float32: by the calibration sample's mean and standard deviation."""
        return self.standard.apply(torch.tensor([a.reward for a in answers]))


def answers_of(rolled: Rollout, reward_RK: Tensor) -> list[Answer]:
    """Give the rows of a rollout, each by itself."""
    rows = zip(
        rolled.group_R.tolist(),
        rolled.tokens_RT.tolist(),
        rolled.logp_RT.tolist(),
        rolled.mask_RT.sum(1).tolist(),
        rolled.finish,
        reward_RK.tolist(),
        strict=True,
    )
    return [
        Answer(rolled.prompts[g], Drawn(tokens[:n], logp[:n], finish), tuple(reward))
        for g, tokens, logp, n, finish, reward in rows
    ]


def written(reward_RK: Tensor) -> list[Preference]:
    """Write rewards as the policy reads them, to one decimal: equal ones are one prefix."""
    return [tuple(round(x, 1) + 0.0 for x in row) for row in reward_RK.tolist()]


def drawn_goals(
    seen_MK: Tensor, hi_K: Tensor, count: int, random: np.random.Generator
) -> list[Preference]:
    """Draw goals: of each reward one of those seen; the smallest gives way to its hi_k."""
    m, k = seen_MK.shape
    at_RK = torch.from_numpy(random.integers(m, size=(count, k)))
    goal_RK = seen_MK.gather(0, at_RK)
    least_R1 = goal_RK.argmin(1, keepdim=True)
    return written(goal_RK.scatter(1, least_R1, hi_K.expand(count, k).gather(1, least_R1)))


def above(reward_RK: Tensor, quantile: float) -> Tensor:
    """Say which rows (R,) have any reward at or above that reward's quantile over the rows.

    The quantile is between two of the rows' values where it falls there (linear interpolation).
    """
    return (reward_RK >= torch.quantile(reward_RK, quantile, 0)).any(1)


def under_own_rewards(
    policy: Policy, answers: Sequence[Answer], standard_RK: Tensor
) -> tuple[Rollout, list[int]]:
    """Give the answers as a rollout, their own rewards in their prompts; and the order of its rows.

    Equal prompts with equal rewards are one group. The tokens are as they were drawn, under what
    was asked for then, and so are their log-probabilities: no longer on-policy.
    """
    groups: dict[tuple[Prompt, Preference], list[int]] = {}
    for i, goal in enumerate(written(standard_RK)):
        groups.setdefault((answers[i].prompt, goal), []).append(i)
    requests = [Request(prompt, goal, len(rows)) for (prompt, goal), rows in groups.items()]
    order = [i for rows in groups.values() for i in rows]
    rolled = gathered(
        policy,
        requests,
        [answers[i].drawn for i in order],
        started=time.perf_counter(),
        prefill_tokens=0,
        on_policy=False,
    )
    return rolled, order
