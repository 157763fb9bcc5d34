"""The hypergradient of Meal's outer loop: how the net's weights move the policy's next step.

The weights w⁰ of the net act on the policy's loss through the coefficients a_i alone, for the text
that conditions a response is rounded and carries no gradient. One step of plain SGD is looked
ahead, whatever the training optimizer is [R]:

    θ′ = θ − η ∇_θ Σ_i a_i ℓ_i(θ)             ℓ_i = −log π_θ(y_i | x, w*_i), the inner rows
    L_meta(θ′) = −mean_j c_j log π_θ′(y_j)     the held-out rows, at drawn preferences

    ∂L_meta/∂a_i = −η ∇L_meta(θ′) · ∇ℓ_i(θ) ≈ −η [ℓ_i(θ + εv) − ℓ_i(θ − εv)] / 2ε

with v = ∇L_meta, taken at θ′ (taken at θ it belongs to another point: 8 % off at η = 0.1), and
ε = 0.01/‖v‖. That is two passes forward and back and two forward: no second derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from meal_fast import ops
from meal_fast.common import require
from meal_fast.data_types import Rollout
from meal_fast.models.policy import Policy
from meal_fast.ops import checks

from .losses import sequences
from .net_trainer import acceptance_weights

# ‖εv‖: how far from θ the difference is taken. Its error on the models of the tests is 3e-5 in
# float64 and 1e-4 in float32; at 0.1 it is 4e-3 in both (curvature). On SmolLM2-135M in float32 it
# is 1e-3 to 3e-3; at 0.003, 8e-3 (rounding).
_REACH = 0.01


class NotFinite(ValueError):
    """The look-ahead leads to where the gradient is not finite."""


def coefficients(
    normalized_RK: Tensor,
    w0_RK: Tensor,
    predicted_R: Tensor,
    group_R: Tensor,
    *,
    utopia: Tensor | Sequence[float] | None,
    tau_a: float,
    mu: float = 0.1,
    scalarization: str = "smooth-tchebycheff",
) -> Tensor:
    """Give a_i = softmax over the kept rows of i's group of S(r̃_i, w⁰)/τ_a, (R,), graph included.

    Args:
        normalized_RK: r̃ of the kept rows. w0_RK: the preference each was sampled under, rows of
            the net's output or drawn. predicted_R (bool): it is the net's; a drawn one's row gives
            no gradient, whatever graph w0_RK has there.
        group_R: int64, which rows compete: those of one prompt and one w⁰.
        utopia, mu, scalarization: of the score, see `ops.group_advantages`.

    Raises:
        ValueError: what `ops.group_advantages` and `acceptance_weights` refuse.
    """
    checks.shape("predicted_R", predicted_R, (len(w0_RK),))
    require(predicted_R.dtype == torch.bool, "predicted_R.dtype", predicted_R.dtype, "must be bool")
    w_RK = torch.where(predicted_R[:, None], w0_RK, w0_RK.detach())
    score_R, _ = ops.group_advantages(
        normalized_RK,
        w_RK,
        group_R,
        utopia=utopia,
        mu=mu,
        scalarization=scalarization,
        scale="none",
    )
    return acceptance_weights(score_R, group_R, tau_a)


def hypergradient(
    policy: Policy,
    inner: Rollout,
    a_R: Tensor,
    held_out: Rollout,
    *,
    eta: float,
    temperature: float,
    micro_tokens: int,
    held_out_R: Tensor | None = None,
    recompute: bool = False,
    shared: sequences.Shared = sequences.ALONE,
) -> tuple[Tensor, dict[str, float]]:
    """Give ∂L_meta/∂a_i (R,), and metrics. `(a_R * it).sum()` is then a surrogate for `NetTrainer`.

    ℓ_i is the negative log-likelihood of the whole response, the *sum* over its tokens, at
    `temperature`. For a mean over tokens, or over rows, hand over the a_i so divided: only products
    a_i ℓ_i are ever taken. Memory: three copies of what is trained, beside one gradient.

    Args:
        inner: kept rows, behind the prefixes that they are trained under (w*). a_R: their
            coefficients; their graph is the caller's, here they are constants.
        held_out: kept rows at drawn preferences, of which nothing is in `inner`.
        eta: η, of the look-ahead; a step that the policy would really make.
        held_out_R: c_j, by default 1.
        shared: which parts of the passes this process takes, where there are several.

    The policy's parameters are moved meanwhile, and are the same bits afterwards, also when
    something raises; their `.grad` is left alone.

    Raises:
        ValueError: no rows, shapes that differ, η not positive; its kind `NotFinite` for a gradient
            at θ′ that is not finite.
    """
    checks.positive("eta", eta)
    if policy.in_parts:
        raise ValueError(
            "policy.tuning='full' with mesh.shard: the hypergradient moves parameters that are "
            "whole; use policy.tuning=lora, or mesh.shard=1"
        )
    rows = len(inner.group_R)
    require(rows >= 1, "inner", "no rows", "nothing to look ahead along")
    require(len(held_out.group_R) >= 1, "held_out", "no rows", "nothing to measure it by")
    checks.shape("a_R", a_R, (rows,))
    device = inner.tokens_RT.device
    if held_out_R is None:
        held_out_R = torch.ones(len(held_out.group_R), device=device)
    checks.shape("held_out_R", held_out_R, (len(held_out.group_R),))
    out_R = torch.zeros(rows, dtype=a_R.dtype, device=device)
    passes: Any = {"micro_tokens": micro_tokens, "shared": shared}
    parameters: list[Tensor] = list(policy.trainable)
    theta = [p.detach().clone() for p in parameters]
    try:
        _, ascent = sequences.gradient(
            policy, inner, a_R, temperature, recompute=recompute, **passes
        )
        _place(parameters, theta, ascent, eta)
        del ascent
        share_R = -held_out_R / len(held_out_R)
        loss, v = sequences.gradient(
            policy, held_out, share_R, temperature, recompute=recompute, **passes
        )
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(v))))
        if not norm < float("inf"):
            raise NotFinite(f"eta={eta!r}: ‖∇L_meta‖ at θ′ is {norm}; look ahead less far")
        if norm > 0:
            ends = []
            for epsilon in (_REACH / norm, -_REACH / norm):
                _place(parameters, theta, v, epsilon)
                ends.append(sequences.logp(policy.network, inner, temperature, **passes))
            # ℓ = −log π takes the sign away.
            out_R += eta * (ends[0] - ends[1]) * (norm / (2 * _REACH))
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, theta)
    return out_R.to(a_R.device), {"meta_loss": float(loss), "meta_gradient_norm": norm}


@torch.no_grad()
def _place(parameters: list[Tensor], start: list[Tensor], along: list[Tensor], step: float) -> None:
    """Set the parameters to start + step · along."""
    torch._foreach_copy_(parameters, start)
    torch._foreach_add_(parameters, along, alpha=step)
