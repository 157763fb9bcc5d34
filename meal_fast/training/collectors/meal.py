"""Meal: the preference-weight-net and the policy teach each other (Meta-Aligner [P]; form [R]).

For every prompt x of an update:

    w0      softmax(net(x)), or with probability rho a draw from Dir(alpha)
    y_1..N  sampled under w0; kept where the rejection rules let them pass
    w_hat   proportional to (z* - rewards)^(-1/tau), the preference that a response realises: with
            tau = 1 the one under which the Tchebycheff score likes it best
            (`rejection.realized=softmax`: softmax of the standardised rewards / tau)
    w*      proportional to w0^lam * w_hat^(1 - lam): the preference learns from the response
    policy  learns the kept y as answers under w* (`losses.sft`), or all of them by GRPO under w0
    net     every M policy updates: `training.net_update`, of which this file only asks w0

What the policy reads are preferences on the run's lattice (`preference.grid`), w0 and w* too: they
are written with two digits, and nearby ones as one text share one prefix.

`lam=1` keeps the preference that was asked for; with `rho=1` as well there is no net, which is the
static baseline.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from meal_fast.data import preferences
from meal_fast.data.preferences import Preference
from meal_fast.data.reward_statistics import constant
from meal_fast.data_types import Rollout, Weighted, rng_seed
from meal_fast.models.policy import Policy
from meal_fast.ops.reference import scalarize
from meal_fast.rollout import Request, Sampling, open_backend, rejection_sample
from meal_fast.rollout.rejection_rules import (
    accept,
    acceptance_uniform,
    ray_preference,
    realized_preference,
)
from meal_fast.rollout.rejection_sampler import Kept, together_log
from meal_fast.training.batch import Batch, Hindsight, RngKey, Task
from meal_fast.training.net_trainer import acceptance_weights, learned_preference
from meal_fast.training.net_update import NetUpdate
from meal_fast.training.parts import together

from .base import Sampled


class Meal(Sampled):
    """Sample an update's responses under the net's preferences, keep and relabel them."""

    standardizes: ClassVar[bool] = True

    def prepare(self) -> None:
        config = self.config
        if config.meal.rho < 1:  # else every preference is drawn: the static baseline has no net
            self.net = NetUpdate(self.policy, self.scales, config, self.kind, self.mesh)

    def collect(self, tasks: Sequence[Task]) -> Batch:
        (task,) = tasks
        requests = self.asked(task, *self._preferences(task))
        if self.config.meal.policy == "grpo":
            return self._all_rows(requests, task.rng_key)
        return self._kept_rows(requests, task.rng_key)

    def state(self) -> dict[str, Any]:
        return {} if self.net is None else self.net.state()

    def load_state(self, state: dict[str, Any]) -> None:
        if self.net is not None:
            self.net.load_state(state)

    def save(self, folder: Path) -> None:
        if self.net is not None:
            self.net.save(folder)

    def _preferences(self, task: Task) -> tuple[list[Preference], list[bool]]:
        """Choose w0 of each prompt, and say whether it was drawn, so that others may join it.

        Under Reptile a drawn one is the task's, else the prompt's own. One that the net chose is
        alone: it is the net's answer to which preference suits the prompt.
        """
        options, k, prompts = self.config.meal, len(self.config.names), task.prompts
        seed = rng_seed(self.config.seed, "meal", *task.rng_key)
        drawn = [task.preference] * len(prompts)
        if options.outer == "net":
            drawn = preferences.draw(
                k,
                alpha=self.config.preference.alpha,
                points=self.config.preference.grid,
                seed=seed,
                step=0,
                count=len(prompts),
            )
        if self.net is None:
            return drawn, [True] * len(prompts)
        uniform = np.random.Generator(np.random.Philox(key=seed)).random(len(prompts))
        if self.net.looks_ahead:  # half of the prompts to learn from, half to measure it by
            uniform = np.where(np.arange(len(prompts)) < len(prompts) // 2, 1.0, -1.0)
        own = preferences.snapped(self.net.predict(prompts).numpy(), self.config.preference.grid)
        free = [bool(u < options.rho) for u in uniform]
        return [d if f else o for f, d, o in zip(free, drawn, own, strict=True)], free

    def _kept_rows(self, requests: Sequence[Request], rng_key: RngKey) -> Batch:
        options = self.config.rollout
        sampling = Sampling(options.max_new_tokens, options.temperature, self.config.seed, rng_key)

        def draw(own: Sequence[Request]) -> Kept:
            with open_backend(
                options.backend,
                self.policy,
                max_cache_bytes=options.max_cache_bytes,
                join=True,
                needs=("rejection",),
            ) as sampler:
                return rejection_sample(
                    sampler,
                    own,
                    sampling,
                    self.config.rejection,
                    self.objectives.rewards,
                    self._judge,
                )

        kept = kept_together(*self.in_parts(requests, draw))
        rolled, w_hat_RK = kept.rollout, kept.w_hat_RK
        assert w_hat_RK is not None
        log: dict[str, Any] = {"w": rolled.condition_RK.mean(0).tolist()} | kept.log
        w_star_RK = self._w_star(rolled, w_hat_RK)
        w_R = preferences.snapped(w_star_RK.cpu().numpy(), self.config.preference.grid)
        learnt, order_R = relabelled(self.policy, rolled, w_R)
        log["learnt"] = learnt.condition_RK.mean(0).tolist()
        asked_R, reward_RK = rolled.group_R[order_R], kept.reward_RK[order_R]
        score_R = kept.score_R[order_R]
        weight_R = torch.ones_like(score_R)
        if self.config.meal.update == "hypergradient":
            a_R = acceptance_weights(score_R, asked_R, self.config.rejection.tau_a)
            weight_R = a_R * torch.bincount(asked_R)[asked_R]  # 1 on average, as without
        scored = Weighted(reward_RK, score_R, weight_R)
        ended_RK, tokens = kept.ended_RK.to(reward_RK.device), int(log["sampled_tokens"])
        seen = Hindsight(rolled.prompts, w_star_RK, rolled.group_R, asked_R)
        w0_RK = rolled.condition_RK[order_R]
        return Batch(learnt, scored, ended_RK, tokens, log, seen, w0_RK)

    def _all_rows(self, requests: Sequence[Request], rng_key: RngKey) -> Batch:
        """Give every row under w0 to GRPO; the rejection rules choose for the net alone."""
        batch = self._all_of(requests, rng_key)
        rolled = batch.rolled
        # What is kept is decided on the host, as in `rejection_sample`.
        w_RK = rolled.condition_RK.cpu()
        score_R, w_hat_RK = self._judge(batch.reward_RK.cpu(), w_RK)
        passed_R, rejected = accept(
            self.config.rejection,
            score_R,
            rolled.group_R.cpu(),
            w_hat_RK=w_hat_RK,
            w_RK=w_RK,
            uniform_R=acceptance_uniform(
                self.config.seed,
                torch.tensor([rng_seed(*rng_key, "accepted", r) for r in range(len(score_R))]),
            ),
            last=True,
        )
        passed = rolled.of_rows(passed_R.nonzero()[:, 0])
        w_star_RK = self._w_star(passed, w_hat_RK[passed_R].to(self.policy.device))
        seen = Hindsight(passed.prompts, w_star_RK, passed.group_R, rolled.group_R)
        rows = len(passed_R)
        log: dict[str, Any] = {"w": rolled.condition_RK.mean(0).tolist()}
        log |= {"acceptance": float(passed_R.float().mean())}
        log |= {f"rejected/{gate}": n / rows for gate, n in rejected.items()}
        return dataclasses.replace(batch, log=log, hindsight=seen)

    def _judge(self, reward_RK: Tensor, w_RK: Tensor) -> tuple[Tensor, Tensor]:
        """Give scores S(r, w0) and realised preferences, where both are."""
        options, utopia_K = self.config.rejection, constant(self.scales.utopia, reward_RK)
        normalized_RK = self.scales.normalizer.apply(reward_RK)
        score_R = scalarize(normalized_RK, w_RK, utopia_K, self.config.score.mu, self.kind)
        if options.realized == "ray":
            return score_R, ray_preference(normalized_RK, utopia_K, options.tau)
        assert self.scales.standard is not None
        return score_R, realized_preference(self.scales.standard.apply(reward_RK), options.tau)

    def _w_star(self, rolled: Rollout, w_hat_RK: Tensor) -> Tensor:
        """Give w* (R, K), the preferences that rows are to be learnt under."""
        options = self.config.meal
        return learned_preference(rolled.condition_RK, w_hat_RK, options.lam, options.mode)


def kept_together(places: Sequence[Sequence[int]], parts: Sequence[Kept]) -> Kept:
    """Make one of what was kept of an update's parts."""
    if len(parts) == 1:
        return parts[0]
    rolled, order_R = together([part.rollout for part in parts], places)

    def of_rows(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])[order_R]

    return Kept(
        rollout=rolled,
        reward_RK=of_rows("reward_RK"),
        score_R=of_rows("score_R"),
        w_hat_RK=None if parts[0].w_hat_RK is None else of_rows("w_hat_RK"),
        ended_RK=torch.cat([part.ended_RK for part in parts]),
        log=together_log([part.log for part in parts]),
    )


def relabelled(
    policy: Policy, rollout: Rollout, w_R: Sequence[Preference]
) -> tuple[Rollout, Tensor]:
    """Give responses as answers under other preferences, one a row; and the rows' new order.

    Rows of a prompt that are given the same preference are one group; logp_RT stays the sampler's.
    """
    of = rollout.group_R.tolist()
    order = sorted(range(len(w_R)), key=lambda r: (of[r], w_R[r]))
    groups = list(dict.fromkeys((of[r], w_R[r]) for r in order))
    number = {group: g for g, group in enumerate(groups)}
    device, k = rollout.group_R.device, rollout.condition_RK.shape[1]
    order_R = torch.tensor(order, dtype=torch.int64, device=device)
    group = [number[of[r], w_R[r]] for r in order]
    new = dataclasses.replace(
        rollout.of_rows(order_R),
        prompts=tuple(rollout.prompts[b] for b, _ in groups),
        prefix=tuple(sum(policy.encode(rollout.prompts[b].text, w), ()) for b, w in groups),
        group_R=torch.tensor(group, dtype=torch.int64, device=device),
        condition_RK=torch.tensor([w_R[r] for r in order], device=device).view(-1, k),
    )
    return new, order_R
