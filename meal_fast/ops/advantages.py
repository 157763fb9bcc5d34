"""Vector rewards and preferences → scores and group-relative advantages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from meal_fast.common import require

from . import checks, dispatch, reference
from .registration import Given, registered


def _with_tensors(given: Given) -> Given:
    """A schema has no `Tensor | Sequence[float]`."""
    rewards, weights = given["rewards"], given["weights"]
    to = {"dtype": reference.compute_dtype(rewards, weights), "device": rewards.device}
    for name in ("utopia", "offset", "divisor"):
        if given[name] is not None:
            given[name] = torch.as_tensor(given[name], **to)
    return given


def _fake(given: Given) -> tuple[Tensor, Tensor]:
    rewards, weights = given["rewards"], given["weights"]
    dtype = reference.compute_dtype(rewards, weights)
    score = rewards.new_empty(rewards.shape[0], dtype=dtype)
    return score, torch.empty_like(score)


@registered("rewards", "weights", fake=_fake, prepare=_with_tensors)
def group_advantages(
    rewards: Tensor,
    weights: Tensor,
    group: Tensor | None = None,
    *,
    utopia: Tensor | Sequence[float] | None,
    mu: float = 0.1,
    scalarization: str = "smooth-tchebycheff",
    scale: str = "std",
    offset: Tensor | Sequence[float] | None = None,
    divisor: Tensor | Sequence[float] | None = None,
    keep: Tensor | None = None,
    offsets: Tensor | None = None,
    eps: float = 1e-4,
    check: bool | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Turn vector rewards and per-row preferences into scores and group-relative advantages.

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
        offsets: (G + 1,) int64, instead of `group`, for rows that lie group by group: group g is
            the rows offsets[g] to offsets[g + 1], so it begins with 0 and ends with R. In Triton
            the call is then one launch, and with `utopia`, `offset`, `divisor` on the device a CUDA
            graph can capture it.
        check: look at the values even if that waits for a GPU. On the CPU they always are.

    Returns:
        score (R,) and advantage (R,), differentiable in `rewards` and `weights`; once, in Triton.
        A row without a finite reward and a weight on the simplex has score NaN; when it is kept
        (possible on a GPU only) so has the advantage of its group. Rows that `offsets` leaves out
        (possible on a GPU only) hold anything.

    Raises:
        ValueError: a shape, option or (see `check`) value is bad; a value is named with its row.
    """
    checks.choice("scalarization", scalarization, ("linear", "tchebycheff", "smooth-tchebycheff"))
    checks.choice("scale", scale, ("std", "none"))
    checks.positive("mu", mu)
    require(eps >= 0, "eps", eps, "must not be negative")
    checks.floating("rewards", rewards)
    require(rewards.dim() == 2, "rewards.shape", tuple(rewards.shape), "must be (R, K)")
    r, k = rewards.shape
    require(k >= 1, "rewards.shape", tuple(rewards.shape), "needs an objective")
    checks.floating("weights", weights)
    checks.shape("weights", weights, (r, k), (k,))
    _check_groups(group, offsets, r)
    if utopia is None:
        require(scalarization == "linear", "utopia", None, f"{scalarization} needs one")
    if keep is not None:
        checks.shape("keep", keep, (r,))
        require(keep.dtype == torch.bool, "keep.dtype", keep.dtype, "must be bool")
    checks.same_device("rewards", rewards, weights=weights, group=group, offsets=offsets, keep=keep)
    chosen = dispatch.choose("group_advantages", impl, rewards, weights)
    dtype = reference.compute_dtype(rewards, weights)

    def vector(name: str, value: Tensor | Sequence[float] | None) -> Tensor | None:
        if value is None:
            return None
        out = torch.as_tensor(value, dtype=dtype, device=rewards.device)
        checks.shape(name, out, (k,))
        return out.detach().contiguous()

    z, shift, unit = (
        vector("utopia", utopia),
        vector("offset", offset),
        vector("divisor", divisor),
    )
    weights = weights.expand(r, k)
    if checks.values_are_checked(rewards, check):
        _check_rows(rewards.detach(), weights.detach().to(dtype), keep)
        for name, value in (("utopia", z), ("offset", shift), ("divisor", unit)):
            if value is not None:
                require(bool(value.isfinite().all()), name, value.tolist(), "must be finite")
        if unit is not None:
            require(bool((unit != 0).all()), "divisor", unit.tolist(), "must not be zero")
        if offsets is not None:
            _check_offsets(offsets, r)
    if chosen == "triton":
        from meal_fast.kernels import group_advantages as kernels

        order = None
        if offsets is None:
            assert group is not None
            offsets, order = _sorted_groups(group)
        plan = kernels.Plan(
            offsets.long().contiguous(),
            order,
            z,
            shift,
            unit,
            None if keep is None else keep.contiguous(),
            float(mu),
            scalarization,
            scale,
            float(eps),
        )
        return kernels.GroupAdvantages.apply(rewards, weights, plan)

    def filled(value: Tensor | None, default: float) -> Tensor:
        return rewards.new_full((k,), default, dtype=dtype) if value is None else value

    if group is None:
        assert offsets is not None
        group = torch.searchsorted(
            offsets.long(), torch.arange(r, device=rewards.device), right=True
        )
    return reference.group_advantages(
        rewards.to(dtype),
        weights.to(dtype),
        group.long(),
        filled(z, 0.0),
        filled(shift, 0.0),
        filled(unit, 1.0),
        rewards.new_ones(r, dtype=torch.bool) if keep is None else keep,
        mu=mu,
        scalarization=scalarization,
        scale=scale,
        eps=eps,
    )


def _sorted_groups(group: Tensor) -> tuple[Tensor, Tensor]:
    """Ids in any order → offsets (R + 1,) of the groups, and the order of rows that sorts them.

    How many groups there are is known on the device alone: the offsets hold R groups, of which the
    last are empty.
    """
    ordered, order = torch.sort(group, stable=True)
    rank = torch.zeros_like(order)
    rank[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    return torch.searchsorted(rank, torch.arange(len(rank) + 1, device=rank.device)), order


def _check_groups(group: Tensor | None, offsets: Tensor | None, r: int) -> None:
    if (group is None) == (offsets is None):
        raise ValueError("group: give either group or offsets, and not both")
    if group is not None:
        checks.shape("group", group, (r,))
        checks.integer("group", group)
    if offsets is not None:
        require(offsets.dim() == 1, "offsets.shape", tuple(offsets.shape), "must be (G + 1,)")
        require(len(offsets) >= 1, "offsets.shape", tuple(offsets.shape), "must be (G + 1,)")
        checks.integer("offsets", offsets)


def _check_offsets(offsets: Tensor, r: int) -> None:
    ends = (int(offsets[0]), int(offsets[-1]))
    require(ends == (0, r), "offsets", ends, f"the first must be 0 and the last R = {r}")
    sizes = offsets.diff()
    if bool((sizes < 0).any()):
        g = int((sizes < 0).nonzero()[0, 0])
        raise ValueError(f"offsets: group {g} ends at {int(offsets[g + 1])}, before it begins")


def _check_rows(rewards: Tensor, weights: Tensor, keep: Tensor | None) -> None:
    bad = ~rewards.isfinite().all(1)
    bad = bad if keep is None else bad & keep
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"rewards: row {row} is {rewards[row].tolist()}, not finite; drop it with keep"
        )
    bad = ~reference.on_simplex(weights)
    bad = bad if keep is None else bad & keep
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"weights: row {row} is {weights[row].tolist()}, not on the simplex; "
            "weights are non-negative and sum to 1"
        )
