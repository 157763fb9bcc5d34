"""The preference-weight-net of Meal: weights for each prompt, and what teaches it them.

    B  prompts    R  rows: kept responses    K  objectives    D  hidden width of the base model

The net reads a prompt through the frozen base model and gives the preference w⁰ that the policy is
asked for. What the responses realise is ŵ (`rollout.rejection.ray_preference`); w*, between
the two, is what a response is trained under, and what the net is then drawn towards:

    prompt -> features -> PreferenceNet -> w⁰ -> rollout, rewards -> ŵ -> learned_preference -> w*

That a net maps prompts to weights, that these are updated as learnable parameters from the policy's
responses, and that the two levels are coupled is what Meta-Aligner states [P]; all formulas here
are our reading of it [R].
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from meal_fast.common import require, write_atomic
from meal_fast.data_types import Prompt
from meal_fast.models import shared_prefix
from meal_fast.models.policy import Policy
from meal_fast.ops import checks
from meal_fast.rollout.rejection_rules import floored

_METADATA = ("K", "names", "D", "hidden")


class PreferenceNet(nn.Module):
    """w⁰ = softmax(V tanh(U h + a) + b): one hidden layer, float32 [R].

    h is brought to mean 0 and variance 1 over its D entries first: hidden states differ in size
    from model to model by orders of magnitude, and the learning rate should not. The hidden layer
    is drawn from `seed` alone; constant, its units would stay equal for ever. The output layer is
    zero: w⁰ starts uniform for every prompt.

    Args:
        names: of the K objectives, two or more. width: D. hidden: units of the hidden layer.

    Raises:
        ValueError: fewer than two names, a size below 1.
    """

    def __init__(
        self, names: Sequence[str], width: int, hidden: int = 256, *, seed: int = 0
    ) -> None:
        super().__init__()
        require(len(names) >= 2, "names", tuple(names), "two objectives or more are needed")
        require(width >= 1, "width", width, "must be at least 1")
        require(hidden >= 1, "hidden", hidden, "must be at least 1")
        self.names, self.width, self.hidden = tuple(names), width, hidden
        # skip_init: nn.Linear would draw its values from the global generator.
        self.inner = skip_init(nn.Linear, width, hidden, dtype=torch.float32)
        self.outer = skip_init(nn.Linear, hidden, len(names), dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.inner.weight.normal_(0.0, width**-0.5, generator=generator)
            for parameter in (self.inner.bias, self.outer.weight, self.outer.bias):
                parameter.zero_()

    def forward(self, h_BD: Tensor) -> Tensor:
        """h (B, D), a constant -> w⁰ (B, K) on the simplex, not floored."""
        checks.shape("h_BD", h_BD, (len(h_BD), self.width))
        h_BD = F.layer_norm(h_BD.detach().to(self.inner.weight.dtype), (self.width,))
        return torch.softmax(self.outer(torch.tanh(self.inner(h_BD))), -1)

    def save(self, path: Path) -> None:
        """Writes one safetensors file, whole or not at all; K, names, D and hidden with it."""
        values = (len(self.names), self.names, self.width, self.hidden)
        metadata = {n: json.dumps(v) for n, v in zip(_METADATA, values, strict=True)}
        state = {name: value.cpu().contiguous() for name, value in self.state_dict().items()}
        write_atomic(path, save(state, metadata))

    @staticmethod
    def load(path: Path, names: Sequence[str]) -> PreferenceNet:
        """The net of `path`, on the CPU, for the objectives `names`.

        Raises ValueError for a file that is none, or of another number, order or names of
        objectives.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"preference net {str(path)!r}: cannot be read ({error})") from None
        if set(_METADATA) - set(metadata):
            raise ValueError(f"preference net {str(path)!r}: is no file of PreferenceNet.save")
        k, held, width, hidden = (json.loads(metadata[name]) for name in _METADATA)
        if tuple(held) != tuple(names):
            raise ValueError(
                f"preference net {str(path)!r}: is for K={k} objectives {', '.join(held)}; "
                f"given K={len(names)}, {', '.join(names)}; use the objectives of its run"
            )
        net = PreferenceNet(held, width, hidden)
        net.load_state_dict(state)
        return net


@torch.no_grad()
def features(policy: Policy, prompts: Sequence[Prompt], micro_tokens: int = 4096) -> Tensor:
    """h (B, D) float32: the frozen base model's last hidden states, their mean over the prompt.

    What is read is `policy.encode_prompt(text)`: template, system line and the user's text, without
    any preference. The mean is over the user's tokens [R]: those before them have the same states
    for every prompt, and would drown the rest (cosine between prompts of SmolLM2-135M: 0.97 with
    them, 0.79 without). Prompts of like length go through the model together, by `micro_tokens`.

    Raises ValueError when there are no prompts.
    """
    require(len(prompts) >= 1, "prompts", prompts, "nothing to read")
    rows = [policy.encode_prompt(prompt.text) for prompt in prompts]
    starts = [_start(row, policy.encode_prompt("")) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    out: dict[int, Tensor] = {}
    with policy.reference() as base:
        while order:
            # As many as fit when padded to the longest; by length, so that these are the first.
            fits = [n * len(rows[i]) <= micro_tokens for n, i in enumerate(order, 1)]
            at, order = order[: max(1, sum(fits))], order[max(1, sum(fits)) :]
            none = torch.zeros(0, 1, dtype=torch.int64, device=policy.device)
            batch = shared_prefix.pack([rows[i] for i in at], (), (), none)
            hidden_ND = shared_prefix.forward(base.body, batch).float()
            start_B = torch.tensor([starts[i] for i in at], device=policy.device)
            read_N = batch.positions_1N[0] >= start_B[batch.group_N]
            length_B1 = torch.tensor([[len(rows[i]) - starts[i]] for i in at], device=policy.device)
            b, p, _, _ = batch.shape_BPRS
            hidden_XD = hidden_ND.new_zeros(b * p, hidden_ND.shape[1]).index_copy_(
                0, batch.place_N, torch.where(read_N[:, None], hidden_ND, 0.0)
            )
            mean_BD = hidden_XD.view(b, p, -1).sum(1) / length_B1
            out |= zip(at, mean_BD, strict=True)
    return torch.stack([out[i] for i in range(len(rows))])


def _start(row: Sequence[int], template: Sequence[int]) -> int:
    """How many tokens of a prompt are the template's; 0 where it holds nothing else."""
    same = [a == b for a, b in zip(row, template, strict=False)]
    start = (*same, False).index(False)
    return start if start < len(row) else 0


class Features:
    """`features`, kept by prompt id, since the base model is frozen: of the `room` last in use.

    It belongs to a run's checkpoint: read again beside other prompts, a row's last bits may differ.
    """

    def __init__(self, policy: Policy, room: int = 4096) -> None:
        require(room >= 1, "room", room, "must be at least 1")
        self.policy, self.room = policy, room
        self._kept: dict[str, Tensor] = {}  # the longest out of use first

    def __call__(self, prompts: Sequence[Prompt]) -> Tensor:
        """(B, D) float32 on the policy's device."""
        require(len(prompts) >= 1, "prompts", prompts, "nothing to read")
        new = list({p.id: p for p in prompts if p.id not in self._kept}.values())
        if new:
            read = features(self.policy, new)
            self._kept |= {p.id: h.clone() for p, h in zip(new, read, strict=True)}
        for prompt in prompts:
            self._kept[prompt.id] = self._kept.pop(prompt.id)
        out = torch.stack([self._kept[prompt.id] for prompt in prompts])
        _shorten(self._kept, self.room)
        return out

    def state(self) -> dict[str, Any]:
        return {"ids": list(self._kept), "h": [h.clone() for h in self._kept.values()]}

    def load_state(self, state: dict[str, Any]) -> None:
        device = self.policy.device
        self._kept = {i: h.to(device) for i, h in zip(state["ids"], state["h"], strict=True)}


def _shorten(kept: dict[str, Any], room: int) -> None:
    for name in list(kept)[: max(0, len(kept) - room)]:
        del kept[name]


def learned_preference(
    w0_RK: Tensor,
    w_hat_RK: Tensor,
    lam: float,
    mode: str = "closed",
    *,
    steps: int = 32,
    lr: float = 0.5,
) -> Tensor:
    """w* = argmin_w λ KL(w‖w⁰) + (1−λ) KL(w‖ŵ) ∝ (w⁰)^λ ŵ^{1−λ}, w⁰ and ŵ floored to 1e-4 [R].

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
    """a_i = exp(S_i/τ_a) / Σ_j exp(S_j/τ_a), j over the rows of i's group: the kept ones [R].

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
    """KL(target ‖ w) = Σ_k target_k (log target_k − log w_k), (B,); 0 log 0 is 0."""
    log_w = w_BK.clamp(min=torch.finfo(w_BK.dtype).tiny).log()
    return (torch.xlogy(target_BK, target_BK) - target_BK * log_w).sum(-1)


def entropy(w_BK: Tensor) -> Tensor:
    """H(w) = −Σ_k w_k log w_k in nats, (B,)."""
    return -(w_BK * w_BK.clamp(min=torch.finfo(w_BK.dtype).tiny).log()).sum(-1)


def net_loss(w_phi_BK: Tensor, target_BK: Tensor, gamma: float) -> Tensor:
    """mean_B [KL(stopgrad target ‖ w_φ) − γ H(w_φ)], a scalar [R].

    w_phi_BK: the net's output (B, K). target_BK: w̄*(x), the mean w* of each prompt's rows. Raises
    ValueError for shapes that differ, no prompt and γ negative.
    """
    require(len(w_phi_BK) >= 1, "w_phi_BK.shape", tuple(w_phi_BK.shape), "no prompt")
    checks.shape("target_BK", target_BK, tuple(w_phi_BK.shape))
    require(gamma >= 0, "gamma", gamma, "must not be negative")
    return (divergence(target_BK.detach(), w_phi_BK) - gamma * entropy(w_phi_BK)).mean()


class NetTrainer:
    """The outer update of the net: Adam, and a buffer of the prompts seen last [R].

    The caller counts policy updates and calls, every M of them, `step` (`alternating`) or `descend`
    (`hypergradient`). While the buffer is empty nothing moves, Adam's state included, and there are
    no metrics.

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
        """Each prompt's features and the mean of w* over its rows; `group_R` points into `prompts`.

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
        _shorten(self._held, self.buffer)

    def step(self) -> dict[str, float]:
        """`net_steps` Adam steps on `net_loss` over the buffer; loss, entropy, KL before, after."""
        if not self._held:
            return {}
        h_BD, target_BK = self._batch()
        with torch.no_grad():
            before = float(divergence(target_BK, self.net(h_BD)).mean())
        for _ in range(self.net_steps):
            self.optimizer.zero_grad(set_to_none=True)
            net_loss(self.net(h_BD), target_BK, self.gamma).backward()
            self.optimizer.step()
        return self._measured(before)

    def descend(self, surrogate: Tensor) -> dict[str, float]:
        """One Adam step on `surrogate` − γ mean H(w_φ), the entropy over the buffer; as `step`.

        `surrogate` is a scalar whose gradient is the one wanted, such as Σ_i a_i stopgrad(g_i).
        Where it does not depend on the net, nothing moves either.
        """
        if not self._held or not surrogate.requires_grad:
            return {}
        h_BD, target_BK = self._batch()
        w_BK = self.net(h_BD)
        before = float(divergence(target_BK, w_BK.detach()).mean())
        self.optimizer.zero_grad(set_to_none=True)
        (surrogate - self.gamma * entropy(w_BK).mean()).backward()
        self.optimizer.step()
        return self._measured(before)

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, copied."""
        h, target = zip(*self._held.values(), strict=True) if self._held else ((), ())
        return {
            "net": {name: value.clone() for name, value in self.net.state_dict().items()},
            "adam": copy.deepcopy(self.optimizer.state_dict()),
            "ids": list(self._held),
            "h": [x.clone() for x in h],
            "target": [x.clone() for x in target],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(copy.deepcopy(state["adam"]))
        values = zip(state["ids"], state["h"], state["target"], strict=True)
        self._held = {i: (h.to(self.device), w.to(self.device)) for i, h, w in values}

    def _batch(self) -> tuple[Tensor, Tensor]:
        h, target = zip(*self._held.values(), strict=True)
        return torch.stack(h), torch.stack(target)

    @torch.no_grad()
    def _measured(self, before: float) -> dict[str, float]:
        h_BD, target_BK = self._batch()
        w_BK = self.net(h_BD)
        return {
            "net_loss": float(net_loss(w_BK, target_BK, self.gamma)),
            "net_entropy": float(entropy(w_BK).mean()),
            "net_kl_before": before,
            "net_kl_after": float(divergence(target_BK, w_BK).mean()),
        }
