"""Meal's outer level: the preference net asks for a prompt's preference, and learns from answers.

Every `meal.every` policy updates (M) the net learns, in one of two ways: `alternating` fits the
mean w* of the prompts in its buffer; `hypergradient` lowers the loss that the policy would have
after one step on the kept responses, each weighted by softmax(S(r, w0)/tau_a), on responses kept
under drawn preferences.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meal_fast.config.config import Config
from meal_fast.config.recipes import Score
from meal_fast.config.run_dir import PREFERENCE_NET
from meal_fast.data.reward_statistics import Scales
from meal_fast.data_types import Prompt
from meal_fast.models.policy import Policy

from .batch import Batch, Hindsight
from .hypergradient import NotFinite, coefficients, hypergradient
from .losses.sequences import ALONE, Shared
from .net_trainer import NetTrainer
from .preference_net import Features, PreferenceNet


class NetUpdate:
    """Hold the net, what it reads prompts by, and the number of the next policy update."""

    def __init__(
        self,
        policy: Policy,
        scales: Scales,
        config: Config,
        score: Score,
        shared: Shared = ALONE,
    ) -> None:
        self.policy, self.scales, self.config, self.kind = policy, scales, config, score
        self.shared = shared  # who takes which part of the hypergradient's passes
        options = config.meal
        self.features = Features(policy, room=options.buffer)
        width = policy.network.weight.shape[1]
        net = PreferenceNet(config.names, width, options.hidden, seed=config.seed)
        self.trainer = NetTrainer(
            net.to(policy.device),
            lr=options.net_lr,
            gamma=options.gamma,
            buffer=options.buffer,
            net_steps=options.net_steps,
        )
        self._update = 0

    @property
    def looks_ahead(self) -> bool:
        """Say whether the next update's batch is one for the hypergradient."""
        return self._due and self.config.meal.update == "hypergradient"

    @property
    def _due(self) -> bool:
        return (self._update + 1) % self.config.meal.every == 0

    @torch.no_grad()
    def predict(self, prompts: Sequence[Prompt]) -> Tensor:
        """Give w0 (B, K) of prompts, on the CPU."""
        return self.trainer.net(self.features(prompts)).cpu()

    def update(self, batch: Batch) -> dict[str, float]:
        """Take up what a batch realised, and learn where it is time; give metrics.

        The policy has not learnt from the batch yet: the hypergradient looks ahead from there.
        """
        assert batch.hindsight is not None
        seen, due, looks_ahead = batch.hindsight, self._due, self.looks_ahead
        self.trainer.add(seen.prompts, self.features(seen.prompts), seen.w_star_RK, seen.group_R)
        self._update += 1
        if looks_ahead:
            return self._look_ahead(batch, seen)
        return self.trainer.step() if due and self.config.meal.update == "alternating" else {}

    def _look_ahead(self, batch: Batch, seen: Hindsight) -> dict[str, float]:
        """Take the net's step along the hypergradient; means over tokens, prompts, held-out rows.

        The first half of the prompts were asked under the net's w0.
        """
        rolled, asked_R = batch.rolled, seen.asked_R
        inner_R = asked_R < len(seen.prompts) // 2
        if not bool(inner_R.any()) or bool(inner_R.all()):
            return {}
        w0_RK = self.trainer.net(self.features(seen.prompts))[asked_R[inner_R]]
        inner, held_out = (rolled.of_rows(where.nonzero()[:, 0]) for where in (inner_R, ~inner_R))
        normalized_RK = self.scales.normalizer.apply(batch.scored.reward_RK)
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
        try:
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
                shared=self.shared,
            )
        except NotFinite as error:
            warnings.warn(f"preference net: {error}; its step is skipped", stacklevel=2)
            return {"net_skipped": 1.0}
        return metrics | self.trainer.descend((share_R * slope_R).sum())

    def state(self) -> dict[str, Any]:
        """Give everything that the next updates depend on, copied."""
        features = self.features.state()
        return {"update": self._update, "net": self.trainer.state(), "features": features}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        self._update = state["update"]
        self.trainer.load_state(state["net"])
        self.features.load_state(state["features"])

    def save(self, folder: Path) -> None:
        """Write the net beside the policy."""
        self.trainer.net.save(folder / PREFERENCE_NET)
