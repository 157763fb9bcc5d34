"""What teaches the preference-weight-net: hindsight preferences, its loss and its Adam [R].

    B  prompts    R  rows: kept responses    K  objectives    D  hidden width of the base model

`net_update` says when; what the formulas are a reading of stands at the head of `preference_net`.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from meal_fast.common import require
from meal_fast.data_types import Prompt
from meal_fast.ops import checks
from meal_fast.rollout.rejection_rules import floored

from .preference_net import PreferenceNet, shorten


def learned_preference(
    w0_RK: Tensor,
    w_hat_RK: Tensor,
    lam: float,
    mode: str = "closed",
    *,
    steps: int = 32,
    lr: float = 0.5,
) -> Tensor:
    """Give w* = argmin_w λ KL(w‖w⁰) + (1−λ) KL(w‖ŵ) ∝ (w⁰)^λ ŵ^{1−λ}, w⁰ and ŵ floored to 1e-4 [R].

    λ = 1 keeps what was asked for (with drawn w⁰ alone, the static-preference baseline), λ = 0
    takes what was realised: pure hindsight.

    mode:
        closed: the product, taken in logarithms.
        gradient: `steps` steps of natural-gradient (mirror) descent from w⁰ on logits z of
            w = softmax(z): z ← z − lr [λ (log w − log w⁰) + (1−λ) (log w − log ŵ)]. Each step takes
            the distance to log w* down by 1 − lr, wherever on the simplex w is, from at most
            log 1e4 = 9.2: 32 steps of 0.5 end within rounding of the closed form, 20 within 1e-5.

    Returns:
        (R, K) on the simplex.

    Raises:
        ValueError: λ outside [0, 1], an unknown mode, no steps, lr outside (0, 1], shapes that
            differ, K below 2, a value that is not finite.
    """
    require(0.0 <= lam <= 1.0, "lam", lam, "must be in [0, 1]")
    checks.choice("mode", mode, ("closed", "gradient"))
    require(steps >= 1, "steps", steps, "must be at least 1")
    require(0.0 < lr <= 1.0, "lr", lr, "must be in (0, 1]")
    shape = tuple(w0_RK.shape)
    require(len(shape) == 2 and shape[1] >= 2, "w0_RK.shape", shape, "must be (R, K), K ≥ 2")
    checks.shape("w_hat_RK", w_hat_RK, tuple(w0_RK.shape))
    for name, value in (("w0_RK", w0_RK), ("w_hat_RK", w_hat_RK)):
        require(bool(value.isfinite().all()), name, value.tolist(), "must be finite")
    asked, realized = floored(w0_RK).log(), floored(w_hat_RK).log()
    if mode == "closed":
        return torch.softmax(lam * asked + (1.0 - lam) * realized, -1)
    z = asked
    for _ in range(steps):
        log_w = torch.log_softmax(z, -1)
        z = z - lr * (lam * (log_w - asked) + (1.0 - lam) * (log_w - realized))
    return torch.softmax(z, -1)


def acceptance_weights(score_R: Tensor, group_R: Tensor, tau_a: float) -> Tensor:
    """Give a_i = exp(S_i/τ_a) / Σ_j exp(S_j/τ_a), j over the rows of i's group: the kept ones [R].

    They sum to 1 in each group. Differentiable in S, and through S in the w⁰ that it was taken at.

    score_R: floating. group_R: int64, any numbers in any order. Raises ValueError for shapes that
    differ and τ_a not positive.
    """
    checks.floating("score_R", score_R)
    require(score_R.dim() == 1, "score_R.shape", tuple(score_R.shape), "must be (R,)")
    checks.shape("group_R", group_R, tuple(score_R.shape))
    checks.integer("group_R", group_R)
    checks.positive("tau_a", tau_a)
    known, index_R = torch.unique(group_R, return_inverse=True)
    z_R = score_R / tau_a
    # The maximum is a constant of the derivative: it cancels.
    top_B = z_R.detach().new_full((len(known),), -torch.inf)
    top_B = top_B.scatter_reduce(0, index_R, z_R.detach(), "amax")
    power_R = torch.exp(z_R - top_B[index_R])
    sum_B = power_R.new_zeros(len(known)).index_add(0, index_R, power_R)
    return power_R / sum_B[index_R]


def divergence(target_BK: Tensor, w_BK: Tensor) -> Tensor:
    """Give KL(target ‖ w) = Σ_k target_k (log target_k − log w_k), (B,); 0 log 0 is 0."""
    log_w = w_BK.clamp(min=torch.finfo(w_BK.dtype).tiny).log()
    return (torch.xlogy(target_BK, target_BK) - target_BK * log_w).sum(-1)


def entropy(w_BK: Tensor) -> Tensor:
    """Give H(w) = −Σ_k w_k log w_k in nats, (B,)."""
    return -(w_BK * w_BK.clamp(min=torch.finfo(w_BK.dtype).tiny).log()).sum(-1)


def net_loss(w_phi_BK: Tensor, target_BK: Tensor, gamma: float) -> Tensor:
    """Give mean_B [KL(stopgrad target ‖ w_φ) − γ H(w_φ)], a scalar [R].

    w_phi_BK: the net's output (B, K). target_BK: w̄*(x), the mean w* of each prompt's rows. Raises
    ValueError for shapes that differ, no prompt and γ negative.
    """
    require(len(w_phi_BK) >= 1, "w_phi_BK.shape", tuple(w_phi_BK.shape), "no prompt")
    checks.shape("target_BK", target_BK, tuple(w_phi_BK.shape))
    require(gamma >= 0, "gamma", gamma, "must not be negative")
    return (divergence(target_BK.detach(), w_phi_BK) - gamma * entropy(w_phi_BK)).mean()


class NetTrainer:
    """Train the net: Adam, and a buffer of the prompts seen last [R].

    The caller counts policy updates and calls, every M of them, `step` (`alternating`) or `descend`
    (`hypergradient`). While the buffer is empty nothing moves, Adam's state included, and there are
    no metrics. What would leave a net that is not finite is undone, Adam's state included; its
    metrics are `net_skipped` alone.

    Args:
        buffer: prompts; a prompt that comes again takes its old place's values away.
        net_steps: Adam steps over the whole buffer in a `step`.
    """

    def __init__(
        self,
        net: PreferenceNet,
        *,
        lr: float = 1e-3,
        gamma: float = 0.01,
        buffer: int = 256,
        net_steps: int = 8,
    ) -> None:
        checks.positive("lr", lr)
        require(gamma >= 0, "gamma", gamma, "must not be negative")
        require(buffer >= 1, "buffer", buffer, "must be at least 1")
        require(net_steps >= 1, "net_steps", net_steps, "must be at least 1")
        self.net, self.gamma, self.buffer, self.net_steps = net, gamma, buffer, net_steps
        self.optimizer = torch.optim.Adam(net.parameters(), lr=lr)
        self.device = net.inner.weight.device
        self._held: dict[str, tuple[Tensor, Tensor]] = {}  # (D,), (K,); the oldest first

    def __len__(self) -> int:
        return len(self._held)

    def add(
        self, prompts: Sequence[Prompt], h_BD: Tensor, w_star_RK: Tensor, group_R: Tensor
    ) -> None:
        """Put in each prompt's features and the mean of w* over its rows, which `group_R` gives.

        A prompt without rows is passed over. One that is there twice, under two preferences, is
        one prompt: the mean is over all its rows.
        """
        checks.shape("h_BD", h_BD, (len(prompts), self.net.width))
        checks.shape("w_star_RK", w_star_RK, (len(group_R), len(self.net.names)))
        rows: dict[str, list[int]] = {}
        for row, group in enumerate(group_R.tolist()):
            rows.setdefault(prompts[group].id, []).append(row)
        place = {prompt.id: b for b, prompt in enumerate(prompts)}
        for name, mine in rows.items():
            self._held.pop(name, None)
            mean = w_star_RK[mine].detach().mean(0)
            self._held[name] = (h_BD[place[name]].to(self.device, copy=True), mean.to(self.device))
        shorten(self._held, self.buffer)

    def step(self) -> dict[str, float]:
        """Take `net_steps` Adam steps on `net_loss` over the buffer; give loss, entropy, KLs."""
        if not self._held:
            return {}
        h_BD, target_BK = self._batch()
        with torch.no_grad():
            before = float(divergence(target_BK, self.net(h_BD)).mean())
        kept = self._moving()
        for _ in range(self.net_steps):
            self.optimizer.zero_grad(set_to_none=True)
            net_loss(self.net(h_BD), target_BK, self.gamma).backward()
            self.optimizer.step()
        return self._measured(before, kept)

    def descend(self, surrogate: Tensor) -> dict[str, float]:
        """Take one Adam step on `surrogate` − γ mean H(w_φ), H over the buffer; as `step`.

        `surrogate` is a scalar whose gradient is the one wanted, such as Σ_i a_i stopgrad(g_i).
        Where it does not depend on the net, nothing moves either.
        """
        if not self._held or not surrogate.requires_grad:
            return {}
        h_BD, target_BK = self._batch()
        w_BK = self.net(h_BD)
        before = float(divergence(target_BK, w_BK.detach()).mean())
        kept = self._moving()
        self.optimizer.zero_grad(set_to_none=True)
        (surrogate - self.gamma * entropy(w_BK).mean()).backward()
        self.optimizer.step()
        return self._measured(before, kept)

    def state(self) -> dict[str, Any]:
        """Give everything that the next step depends on, copied."""
        h, target = zip(*self._held.values(), strict=True) if self._held else ((), ())
        return {
            **self._moving(),
            "ids": list(self._held),
            "h": [x.clone() for x in h],
            "target": [x.clone() for x in target],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        self._move_back(state)
        values = zip(state["ids"], state["h"], state["target"], strict=True)
        self._held = {i: (h.to(self.device), w.to(self.device)) for i, h, w in values}

    def _batch(self) -> tuple[Tensor, Tensor]:
        h, target = zip(*self._held.values(), strict=True)
        return torch.stack(h), torch.stack(target)

    def _moving(self) -> dict[str, Any]:
        """Copy what a step moves."""
        return {
            "net": {name: value.clone() for name, value in self.net.state_dict().items()},
            "adam": copy.deepcopy(self.optimizer.state_dict()),
        }

    def _move_back(self, kept: dict[str, Any]) -> None:
        self.net.load_state_dict(kept["net"])
        self.optimizer.load_state_dict(copy.deepcopy(kept["adam"]))

    @torch.no_grad()
    def _measured(self, before: float, kept: dict[str, Any]) -> dict[str, float]:
        """Measure what the steps made of the net; undo them where it is not finite."""
        h_BD, target_BK = self._batch()
        w_BK = self.net(h_BD)
        states = self.optimizer.state.values()
        moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
        moved = [m.isfinite().all() for m in (*moments, *self.net.parameters())]
        measured = [
            net_loss(w_BK, target_BK, self.gamma),
            entropy(w_BK).mean(),
            divergence(target_BK, w_BK).mean(),
        ]
        values = torch.stack([*measured, torch.stack(moved).all()]).tolist()  # one copy
        if all(map(math.isfinite, (before, *values))) and values[-1]:
            names = ("net_loss", "net_entropy", "net_kl_after")
            return {"net_kl_before": before, **dict(zip(names, values[:-1], strict=True))}
        self._move_back(kept)
        warnings.warn("preference net: its step is not finite; it is skipped", stacklevel=4)
        return {"net_skipped": 1.0}
