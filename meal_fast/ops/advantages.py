"""Vector rewards and preferences → scores and group-relative advantages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import checks, reference
from .checks import require


def group_advantages(
    rewards: Tensor,
    weights: Tensor,
    group: Tensor,
    *,
    utopia: Tensor | Sequence[float] | None,
    mu: float = 0.1,
    scalarization: str = "smooth-tchebycheff",
    scale: str = "std",
    offset: Tensor | Sequence[float] | None = None,
    divisor: Tensor | Sequence[float] | None = None,
    keep: Tensor | None = None,
    eps: float = 1e-4,
    check: bool | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Vector rewards and per-row preferences → scalar score and group-relative advantage.

    With r̃ = (rewards - offset) / divisor, `scalarization` is one of

    - ``linear``: S = Σ_k w_k r̃_k
    - ``tchebycheff``: S = -max_k w_k (z*_k - r̃_k)
    - ``smooth-tchebycheff``: S = -μ log Σ_k exp(w_k (z*_k - r̃_k) / μ) [P]

    and A = (S - mean) / (std + eps) over the kept rows of the group, std the unbiased one [P];
    ``scale="none"`` leaves the division out. A is 0 for dropped rows, for a group of one kept row,
    and throughout a group whose scores are all equal.

    Args:
        rewards: (R, K), raw.
        weights: (R, K) or (K,), on the simplex.
        group: (R,) int64, any ids, uneven, in any order.
        utopia: (K,), z*, in units of r̃; may be None when `scalarization="linear"`.
        mu: smoothing, positive.
        offset, divisor: (K,), the reward normalisation; 0 and 1 by default.
        keep: (R,) bool; False drops a row (all its values may be NaN).
        check: look at the values even if that waits for a GPU. On the CPU they always are.

    Returns:
        score (R,) and advantage (R,), differentiable in `rewards` and `weights`. A row without a
        finite reward and a weight on the simplex has score NaN; when it is kept (possible on a GPU
        only) so has the advantage of its group.

    Raises:
        ValueError: a shape, option or (see `check`) value is bad; a value is named with its row.
    """
    checks.implementation("group_advantages", impl)
    checks.choice("scalarization", scalarization, ("linear", "tchebycheff", "smooth-tchebycheff"))
    checks.choice("scale", scale, ("std", "none"))
    checks.positive("mu", mu)
    require(eps >= 0, "eps", eps, "must not be negative")
    checks.floating("rewards", rewards)
    require(rewards.dim() == 2, "rewards.shape", tuple(rewards.shape), "must be (R, K)")
    r, k = rewards.shape
    checks.floating("weights", weights)
    checks.shape("weights", weights, (r, k), (k,))
    checks.shape("group", group, (r,))
    checks.integer("group", group)
    if utopia is None:
        require(scalarization == "linear", "utopia", None, f"{scalarization} needs one")
        utopia = [0.0] * k
    dtype = reference.compute_dtype(rewards, weights)

    def vector(name: str, value: Tensor | Sequence[float] | None, default: float) -> Tensor:
        value = [default] * k if value is None else value
        out = torch.as_tensor(value, dtype=dtype, device=rewards.device)
        checks.shape(name, out, (k,))
        return out.detach()

    z, shift, unit = (
        vector("utopia", utopia, 0.0),
        vector("offset", offset, 0.0),
        vector("divisor", divisor, 1.0),
    )
    kept = torch.ones(r, dtype=torch.bool, device=rewards.device) if keep is None else keep
    checks.shape("keep", kept, (r,))
    require(kept.dtype == torch.bool, "keep.dtype", kept.dtype, "must be bool")
    checks.same_device("rewards", rewards, weights=weights, group=group, keep=kept)
    rewards, weights = rewards.to(dtype), weights.to(dtype).expand(r, k)
    if checks.values_are_checked(rewards, check):
        _check_rows(rewards.detach(), weights.detach(), kept)
        for name, value in (("utopia", z), ("offset", shift), ("divisor", unit)):
            require(bool(value.isfinite().all()), name, value.tolist(), "must be finite")
        require(bool((unit != 0).all()), "divisor", unit.tolist(), "must not be zero")
    return reference.group_advantages(
        rewards,
        weights,
        group.long(),
        z,
        shift,
        unit,
        kept,
        mu=mu,
        scalarization=scalarization,
        scale=scale,
        eps=eps,
    )


def _check_rows(rewards: Tensor, weights: Tensor, keep: Tensor) -> None:
    bad = keep & ~rewards.isfinite().all(1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"rewards: row {row} is {rewards[row].tolist()}, not finite; drop it with keep"
        )
    bad = keep & ~reference.on_simplex(weights)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"weights: row {row} is {weights[row].tolist()}, not on the simplex; "
            "weights are non-negative and sum to 1"
        )
