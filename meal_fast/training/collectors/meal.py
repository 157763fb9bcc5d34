"""Meal: the preference-weight-net and the policy teach each other (Meta-Aligner [P]; form [R]).

For every prompt x of an update:

    w0      softmax(net(x)), or with probability rho a draw from Dir(alpha)
    y_1..N  sampled under w0; kept where the rejection rules let them pass
    w_hat   proportional to (z* - rewards)^(-1/tau), the preference that a response realises: with
            tau = 1 the one under which the Tchebycheff score likes it best
            (`rejection.realized=softmax`: softmax of the standardised rewards / tau)
    w*      proportional to w0^lam * w_hat^(1 - lam): the preference learns from the response
    policy  learns the kept y as answers under w* (`learners.sft`), or all of them by GRPO under w0
    net     every M policy updates: see `_Net` below

What the policy reads are preferences on the run's lattice (`preference.grid`), w0 and w* too: they
are written with two digits, and nearby ones as one text share one prefix.

`lam=1` keeps the preference that was asked for; with `rho=1` as well there is no net, which is the
static baseline. The net learns in one of two ways: `alternating` fits the mean w* of the prompts in
its buffer; `hypergradient` lowers the loss that the policy would have after one step on the kept
responses, each weighted by softmax(S(r, w0)/tau_a), on responses kept under drawn preferences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from meal_fast.config.config import Config
from meal_fast.config.recipes import Score
from meal_fast.data import preferences
from meal_fast.data.objectives import Objectives
from meal_fast.data.preferences import Preference
from meal_fast.data.reward_statistics import Scales, constant
from meal_fast.data_types import Prompt, Rollout, Scored, rng_seed
from meal_fast.models.policy import Policy
from meal_fast.ops.reference import scalarize
from meal_fast.rollout import Request, Sampling, open_backend, rejection_sample
from meal_fast.rollout.rejection_rules import (
    accept,
    acceptance_uniform,
    ray_preference,
    realized_preference,
)
from meal_fast.training.hypergradient import coefficients, hypergradient
from meal_fast.training.preference_net import (
    Features,
    NetTrainer,
    PreferenceNet,
    acceptance_weights,
    learned_preference,
)

from .base import Experience, RngKey, Sampled


class Meal(Sampled):
    """An update's responses, sampled under the net's preferences, kept and relabelled."""

    standardizes: ClassVar[bool] = True

    def __init__(
        self, policy: Policy, objectives: Objectives, scales: Scales, config: Config, score: Score
    ) -> None:
        super().__init__(policy, objectives, scales, config, score)
        options = config.meal
        self._update = 0  # the next one's number
        self.features = Features(policy, room=options.buffer)
        self.net: NetTrainer | None = None
        if options.rho < 1:  # else every preference is drawn: the static baseline needs no net
            width = policy.network.weight.shape[1]
            net = PreferenceNet(config.names, width, options.hidden, seed=config.seed)
            self.net = NetTrainer(
                net.to(policy.device),
                lr=options.net_lr,
                gamma=options.gamma,
                buffer=options.buffer,
                net_steps=options.net_steps,
            )

    def collect(self, prompts: Sequence[Prompt], w: Preference, rng_key: RngKey) -> Experience:
        asked = self._asked(prompts, w, rng_key)
        requests = [
            Request(p, own, self.config.rollout.samples)
            for p, own in zip(prompts, asked, strict=True)
        ]
        if self.config.meal.policy == "grpo":
            return self._all_rows(requests, rng_key)
        return self._kept_rows(requests, rng_key)

    def learned(self, update: int) -> dict[str, float]:
        due, self._update = self._due, update + 1
        if self.net is None or not due or self.config.meal.update != "alternating":
            return {}
        return self.net.step()

    @property
    def _due(self) -> bool:
        """Whether the net learns in the next update."""
        return self.net is not None and (self._update + 1) % self.config.meal.every == 0

    @property
    def _looks_ahead(self) -> bool:
        return self._due and self.config.meal.update == "hypergradient"

    def state(self) -> dict[str, Any]:
        if self.net is None:
            return {"update": self._update}
        features = self.features.state()
        return {"update": self._update, "net": self.net.state(), "features": features}

    def load_state(self, state: dict[str, Any]) -> None:
        self._update = state["update"]
        if self.net is not None:
            self.net.load_state(state["net"])
            self.features.load_state(state["features"])

    def save(self, folder: Path) -> None:
        if self.net is not None:
            self.net.net.save(folder / "preference_net.safetensors")

    def _asked(self, prompts: Sequence[Prompt], w: Preference, rng_key: RngKey) -> list[Preference]:
        """w0 of each prompt. Under Reptile a drawn one is the task's, elsewhere one of its own."""
        options, k = self.config.meal, len(self.config.names)
        seed = rng_seed(self.config.seed, "meal", *rng_key)
        drawn = [w] * len(prompts)
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
            return drawn
        uniform = np.random.Generator(np.random.Philox(key=seed)).random(len(prompts))
        if self._looks_ahead:  # half of the prompts to learn from, half to measure it by
            uniform = np.where(np.arange(len(prompts)) < len(prompts) // 2, 1.0, -1.0)
        with torch.no_grad():
            predicted = self.net.net(self.features(prompts)).cpu()
        own = preferences.snapped(predicted.numpy(), self.config.preference.grid)
        return [d if u < options.rho else o for u, d, o in zip(uniform, drawn, own, strict=True)]

    def _kept_rows(self, requests: Sequence[Request], rng_key: RngKey) -> Experience:
        options = self.config.rollout
        sampling = Sampling(options.max_new_tokens, options.temperature, self.config.seed, rng_key)
        with open_backend(
            options.backend,
            self.policy,
            max_cache_bytes=options.max_cache_bytes,
            join=True,
            needs=("rejection",),
        ) as sampler:
            kept = rejection_sample(
                sampler,
                requests,
                sampling,
                self.config.rejection,
                self.objectives.rewards,
                self._judge,
            )
        rolled, w_hat_RK = kept.rollout, kept.w_hat_RK
        assert w_hat_RK is not None
        log: dict[str, Any] = {"w": rolled.w_RK.mean(0).tolist()} | kept.log
        w_star_RK = self._learn_preferences(rolled, w_hat_RK).cpu().numpy()
        w_R = preferences.snapped(w_star_RK, self.config.preference.grid)
        rolled, order_R = relabelled(self.policy, rolled, w_R)
        log["learnt"] = rolled.w_RK.mean(0).tolist()
        asked_R, reward_RK = kept.rollout.group_R[order_R], kept.reward_RK[order_R]
        score_R = kept.score_R[order_R]
        weight_R = torch.ones_like(score_R)
        if self.config.meal.update == "hypergradient":
            a_R = acceptance_weights(score_R, asked_R, self.config.rejection.tau_a)
            weight_R = a_R * torch.bincount(asked_R)[asked_R]  # 1 on average, as without
            if self._looks_ahead:
                normalized_RK = self.scales.normalizer.apply(reward_RK)
                log |= self._look_ahead(requests, rolled, asked_R, normalized_RK)
        scored = Scored(reward_RK, score_R, weight_R)
        ended_RK = kept.ended_RK.to(reward_RK.device)
        return Experience(rolled, scored, ended_RK, int(log["sampled_tokens"]), log)

    def _look_ahead(
        self, requests: Sequence[Request], rolled: Rollout, asked_R: Tensor, normalized_RK: Tensor
    ) -> dict[str, float]:
        """The net's step along the hypergradient; means over tokens, prompts and held-out rows.

        `asked_R`: which request a row answers. The first half were asked under the net's w0.
        """
        assert self.net is not None
        inner_R = asked_R < len(requests) // 2
        if not bool(inner_R.any()) or bool(inner_R.all()):
            return {}
        h_BD = self.features([request.prompt for request in requests])
        w0_RK = self.net.net(h_BD)[asked_R[inner_R]]
        inner, held_out = (rolled.of_rows(where.nonzero()[:, 0]) for where in (inner_R, ~inner_R))
        a_R = coefficients(
            normalized_RK[inner_R],
            w0_RK,
            torch.ones_like(asked_R[inner_R], dtype=torch.bool),
            asked_R[inner_R],
            utopia=self.scales.utopia,
            tau_a=self.config.rejection.tau_a,
            mu=self.config.score.mu,
            scalarization=self.kind,
        )
        share_R = a_R / inner.mask_RT.sum(1) / len(asked_R[inner_R].unique())
        slope_R, metrics = hypergradient(
            self.policy,
            inner,
            share_R.detach(),
            held_out,
            eta=self.config.meal.eta,
            temperature=self.config.rollout.temperature,
            micro_tokens=self.config.grpo.micro_tokens,
            held_out_R=1.0 / held_out.mask_RT.sum(1),
            recompute=self.config.grpo.recompute,
        )
        return metrics | self.net.descend((share_R * slope_R).sum())

    def _all_rows(self, requests: Sequence[Request], rng_key: RngKey) -> Experience:
        """GRPO learns from every row under w0; the rejection rules choose for the net alone."""
        batch = self._all_of(requests, rng_key)
        rolled = batch.rolled
        # What is kept is decided on the host, as in `rejection_sample`.
        w_RK = rolled.w_RK.cpu()
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
        self._learn_preferences(passed, w_hat_RK[passed_R].to(self.policy.device))
        rows = len(passed_R)
        log: dict[str, Any] = {"w": rolled.w_RK.mean(0).tolist()}
        log |= {"acceptance": float(passed_R.float().mean())}
        log |= {f"rejected/{gate}": n / rows for gate, n in rejected.items()}
        return dataclasses.replace(batch, log=log)

    def _judge(self, reward_RK: Tensor, w_RK: Tensor) -> tuple[Tensor, Tensor]:
        """Scores S(r, w0) and realised preferences, where both are."""
        options, utopia_K = self.config.rejection, constant(self.scales.utopia, reward_RK)
        normalized_RK = self.scales.normalizer.apply(reward_RK)
        score_R = scalarize(normalized_RK, w_RK, utopia_K, self.config.score.mu, self.kind)
        if options.realized == "ray":
            return score_R, ray_preference(normalized_RK, utopia_K, options.tau)
        assert self.scales.standard is not None
        return score_R, realized_preference(self.scales.standard.apply(reward_RK), options.tau)

    def _learn_preferences(self, rolled: Rollout, w_hat_RK: Tensor) -> Tensor:
        """w* (R, K) of the rows; the net's buffer gets their mean for each prompt."""
        options = self.config.meal
        w_star_RK = learned_preference(rolled.w_RK, w_hat_RK, options.lam, options.mode)
        if self.net is not None:
            self.net.add(rolled.prompts, self.features(rolled.prompts), w_star_RK, rolled.group_R)
        return w_star_RK


def relabelled(
    policy: Policy, rollout: Rollout, w_R: Sequence[Preference]
) -> tuple[Rollout, Tensor]:
    """The same responses as answers under other preferences, one a row; and the rows' new order.

    Rows of a prompt that are given the same preference are one group; logp_RT stays the sampler's.
    """
    of = rollout.group_R.tolist()
    order = sorted(range(len(w_R)), key=lambda r: (of[r], w_R[r]))
    groups = list(dict.fromkeys((of[r], w_R[r]) for r in order))
    number = {group: g for g, group in enumerate(groups)}
    device, k = rollout.group_R.device, rollout.w_RK.shape[1]
    order_R = torch.tensor(order, dtype=torch.int64, device=device)
    group = [number[of[r], w_R[r]] for r in order]
    new = dataclasses.replace(
        rollout.of_rows(order_R),
        prompts=tuple(rollout.prompts[b] for b, _ in groups),
        prefix=tuple(
            policy.encode_prompt(rollout.prompts[b].text) + policy.encode_suffix(w)
            for b, w in groups
        ),
        group_R=torch.tensor(group, dtype=torch.int64, device=device),
        w_RK=torch.tensor([w_R[r] for r in order], device=device).view(-1, k),
    )
    return new, order_R
