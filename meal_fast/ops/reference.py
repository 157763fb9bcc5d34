"""Group advantages and the policy loss in plain torch: the specification kernels are held to.

    R  rows (responses)    K  objectives    N  tokens

Every function takes tensors that `meal_fast.ops` has checked. Where a value may be NaN and must not
count, it is selected out (`torch.where`), never multiplied by zero: 0 * NaN is NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from meal_fast.common import require

from . import checks

# exp(20) = 4.9e8: far outside any clip range, and its square is still a finite float32.
LOG_RATIO_LIMIT = 20.0
SIMPLEX_TOLERANCE = 1e-3  # of the sum of a row of weights: they may have been through bfloat16


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Give float64 when any input is float64, else float32."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def dense_ids(ids: Tensor) -> Tensor:
    """Turn (N,) ids of any value and order into (N,) ids counted from 0, in order of value.

    Through a sort rather than `torch.unique`, whose output size would have to be read back from a
    GPU. Fewer than N ids are in use; buffers over them are given N entries.
    """
    ordered, place = torch.sort(ids, stable=True)
    rank = torch.zeros_like(ordered)
    rank[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    return torch.empty_like(rank).scatter_(0, place, rank)


def segment_sum(values: Tensor, index: Tensor) -> Tensor:
    """Sum `values` (N,) over equal `index` (N,), with one entry for each of N possible ids."""
    return values.new_zeros(values.shape[0]).index_add(0, index, values)


def on_simplex(weights: Tensor) -> Tensor:
    """Say of each row of (R, K) whether it is on the simplex: (R,) bool; a NaN is not."""
    return (weights >= 0).all(1) & ((weights.sum(1) - 1).abs() <= SIMPLEX_TOLERANCE)


# --- scores and advantages ---------------------------------------------------------------------


def scalarize(normalized: Tensor, weights: Tensor, utopia: Tensor, mu: float, how: str) -> Tensor:
    """Score (R, K) rewards and weights: (R,), higher is better. Formulas: `group_advantages`."""
    if how == "linear":
        return (weights * normalized).sum(1)
    shortfall = weights * (utopia - normalized)
    if how == "tchebycheff":
        return -shortfall.amax(1)
    # The maximum is a constant of the derivative: it is added and taken away again.
    top = shortfall.detach().amax(1, keepdim=True)
    return -(top.squeeze(1) + mu * ((shortfall - top) / mu).exp().sum(1).log())


def group_advantages(
    rewards: Tensor,  # (R, K)
    weights: Tensor,  # (R, K)
    group: Tensor,  # (R,) int64, any order
    utopia: Tensor,  # (K,)
    offset: Tensor,  # (K,)
    divisor: Tensor,  # (K,)
    keep: Tensor,  # (R,) bool
    *,
    mu: float,
    scalarization: str,
    scale: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Give (score, advantage), both (R,)."""
    # A row may hold anything: what cannot be scored is replaced before the arithmetic, so that its
    # derivative is zero rather than NaN, and its score is NaN.
    scorable = (rewards.isfinite().all(1) & on_simplex(weights))[:, None]
    normalized = (torch.where(scorable, rewards, 0) - offset) / divisor
    weights = torch.where(scorable, weights, 1 / weights.shape[1])
    score = scalarize(normalized, weights, utopia, mu, scalarization)
    score = torch.where(scorable.squeeze(1), score, torch.nan)

    index = dense_ids(group)
    kept = torch.where(keep, score, 0)
    count = segment_sum(keep.to(score.dtype), index)
    mean = segment_sum(kept, index) / count.clamp(min=1)
    deviation = torch.where(keep, score - mean[index], 0)
    # Equal scores have a mean that rounding moves off them: the spread, not the deviation, tells.
    lowest = torch.full_like(score, torch.inf).scatter_reduce(
        0, index, torch.where(keep, score, torch.inf).detach(), "amin"
    )
    highest = torch.full_like(score, -torch.inf).scatter_reduce(
        0, index, torch.where(keep, score, -torch.inf).detach(), "amax"
    )
    flat = ((lowest == highest) | (count < 2))[index]
    # A kept row that has no score leaves its whole group without a mean: NaN, not a quiet 0.
    zero = ~keep | (flat & ~deviation.isnan())
    if scale == "std":
        variance = segment_sum(deviation.square(), index) / (count - 1).clamp(min=1)
        # sqrt has no derivative at 0: flat groups take its value at 1, and are selected out below.
        deviation = deviation / (torch.where(flat, 1, variance[index]).sqrt() + eps)
    return score, torch.where(zero, 0, deviation)


# --- the loss ----------------------------------------------------------------------------------


# The metrics besides the count of tokens, in the order in which the fused forms keep them.
FIGURES = ("policy_loss", "ratio", "clip_fraction", "kl", "entropy")


@dataclass(frozen=True)
class LossOptions:
    """Say what the loss is; see `meal_fast.ops.policy_loss_from_logp`.

    Raises:
        ValueError: an option is bad.
    """

    beta: float
    kl: str
    clip: tuple[float, float]
    level: str
    reduce: str
    normalizer: float | Tensor | None

    def __post_init__(self) -> None:
        checks.choice("kl", self.kl, ("k1", "k2", "k3", "exact"))
        checks.choice("level", self.level, ("token", "sequence"))
        checks.choice("reduce", self.reduce, ("grpo", "dapo", "dr_grpo"))
        finite = math.isfinite(self.beta) and self.beta >= 0
        require(finite, "beta", self.beta, "must not be negative")
        low, high = self.clip
        inside = 0 <= low <= 1 and high >= 0
        require(inside, "clip", self.clip, "(low, high), low in [0, 1], high ≥ 0")
        if isinstance(self.normalizer, Tensor):
            shape = tuple(self.normalizer.shape)
            require(shape == (), "normalizer.shape", shape, "one number")
        elif self.normalizer is not None:
            checks.positive("normalizer", self.normalizer)


@dataclass(frozen=True)
class Tokens:
    """Hold what the loss knows of each of N tokens besides its log-probability: constants."""

    advantage: Tensor
    coefficient: Tensor  # of the token's term in the loss
    active: Tensor  # bool: the token's term can be other than zero
    old_logp: Tensor | None
    ref_logp: Tensor | None
    importance_weight: Tensor | None
    sequence: Tensor | None  # dense ids

    def take(self, rows: Tensor | slice) -> Tokens:
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v[rows] for k, v in given.items() if v is not None})

    def with_reference(self, ref_logp: Tensor | None) -> Tokens:
        return self if ref_logp is None else replace(self, ref_logp=ref_logp)


def make_tokens(
    live: Tensor,  # (N,) bool
    advantage: Tensor,
    sequence: Tensor | None,
    options: LossOptions,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    importance_weight: Tensor | None,
    dtype: torch.dtype,
) -> Tokens:
    """Make the tokens' constants, with `options.reduce` turned into one coefficient per token."""
    one = live.to(dtype)
    index = None if sequence is None else dense_ids(sequence)
    normalizer = options.normalizer
    if options.reduce == "grpo":
        assert index is not None
        length = segment_sum(one, index)
        total = (length > 0).sum() if normalizer is None else normalizer
        coefficient = one / length.clamp(min=1)[index]
    else:
        total = live.sum() if normalizer is None else normalizer
        coefficient = one
    total = torch.as_tensor(total, dtype=dtype, device=live.device).detach()
    if normalizer is None:
        total = total.clamp(min=1)

    advantage = torch.where(live, advantage.detach().to(dtype), 0)
    active = live
    if options.beta == 0:
        active = live & (advantage != 0)
        if options.level == "sequence":  # the sequence's ratio needs all of its tokens, or none
            assert index is not None
            active = live & (segment_sum(active.to(dtype), index) > 0)[index]

    def constant(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(dtype)

    return Tokens(
        advantage,
        coefficient / total,
        active,
        constant(old_logp),
        constant(ref_logp),
        constant(importance_weight),
        index,
    )


@dataclass(frozen=True)
class Terms:
    """Hold, per token, the parts of the loss before coefficients. Only active tokens count."""

    policy: Tensor
    kl: Tensor | None
    ratio: Tensor
    clipped: Tensor  # bool


def loss_terms(logp: Tensor, token_kl: Tensor | None, t: Tokens, options: LossOptions) -> Terms:
    """Define the loss; formulas in `meal_fast.ops.policy_loss_from_logp`."""
    lowest = torch.finfo(logp.dtype).min / 4  # keeps -inf minus -inf from becoming NaN

    def finite(values: Tensor) -> Tensor:
        return torch.where(t.active, values, 0).clamp(min=lowest)

    logp = finite(logp)
    old = logp.detach() if t.old_logp is None else finite(t.old_logp)
    log_ratio = logp - old
    if options.level == "sequence":
        assert t.sequence is not None
        length = segment_sum(t.active.to(logp.dtype), t.sequence).clamp(min=1)
        log_ratio = (segment_sum(log_ratio, t.sequence) / length)[t.sequence]
    ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    low, high = 1 - options.clip[0], 1 + options.clip[1]
    policy = -torch.minimum(ratio * t.advantage, ratio.clamp(low, high) * t.advantage)
    if t.importance_weight is not None:
        policy = policy * torch.where(t.active, t.importance_weight, 0)
    clipped = ((ratio < low) & (t.advantage < 0)) | ((ratio > high) & (t.advantage > 0))

    kl = None
    if token_kl is not None:
        kl = torch.where(t.active, token_kl, 0)
    elif t.ref_logp is not None:
        gap = finite(t.ref_logp) - logp
        if options.kl == "k1":
            kl = -gap
        elif options.kl == "k2":
            kl = gap.square() / 2
        else:
            gap = gap.clamp(max=LOG_RATIO_LIMIT)
            kl = gap.expm1() - gap
    return Terms(policy, kl, ratio, clipped)


def weighted_loss(terms: Terms, t: Tokens, options: LossOptions) -> Tensor:
    """Sum coefficient · (policy + beta · kl) over the active tokens."""
    term = terms.policy
    if options.beta != 0 and terms.kl is not None:
        term = term + options.beta * terms.kl
    return torch.where(t.active, t.coefficient * term, 0).sum()


def loss_and_metrics(
    logp: Tensor,
    token_kl: Tensor | None,
    entropy: Tensor | None,
    t: Tokens,
    options: LossOptions,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Give the loss and its metrics: detached, on the device, means over the active tokens."""
    terms = loss_terms(logp, token_kl, t, options)
    count = t.active.sum()

    def mean(values: Tensor) -> Tensor:
        values = torch.where(t.active, values.detach(), 0)
        return values.sum(dtype=logp.dtype) / count.clamp(min=1)

    metrics = {
        "tokens": count,
        "policy_loss": torch.where(t.active, t.coefficient * terms.policy.detach(), 0).sum(),
        "ratio": mean(terms.ratio),
        "clip_fraction": mean(terms.clipped.to(logp.dtype)),
    }
    if terms.kl is not None:
        metrics["kl"] = mean(terms.kl)
    if entropy is not None:
        metrics["entropy"] = mean(entropy)
    return weighted_loss(terms, t, options), metrics
