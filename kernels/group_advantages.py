"""`meal_fast.ops.group_advantages` in Triton: one launch from rewards and weights to advantages.

    R  rows    K  objectives    G  groups    r̃ = (r - offset) / divisor    z*  utopia
    S  score: Σ w r̃, or -max w (z* - r̃), or its smooth form    A = (S - mean) / (std + eps)

One program takes one group, named by its offsets: the rows order[offsets[g] : offsets[g + 1]]
(`order` None: the rows themselves). It walks them a block at a time, once for the mean and the
spread, once for the variance (two passes: E[S²] - E[S]² cancels), once to write. Scores are made
again on every walk: K numbers from the cache cost less than a barrier after storing them. The
gradient is one launch of the same shape. Sums are float32, in an order that is fixed by the shapes.

Nothing is read back to the host, so a call can be captured in a CUDA graph. The code has run in
Triton's interpreter and compiles for sm_90; it has never run on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from meal_fast.ops import reference

from .cases import Case

SIMPLEX_TOLERANCE = tl.constexpr(reference.SIMPLEX_TOLERANCE)
TILE = 2048  # of rows times objectives: 16 float32 a thread, a handful of them alive at once


@triton.jit
def _score(row, inside, source, K: tl.constexpr, K_TILE: tl.constexpr, HOW: tl.constexpr):
    """Per row: S, whether it has one (NaN if not), dS/dr̃ and dS/dw."""
    (
        rewards_ptr, weights_ptr, utopia_ptr, offset_ptr, divisor_ptr, mu,
        reward_row, reward_column, weight_row, weight_column,
    ) = source  # fmt: skip
    k = tl.arange(0, K_TILE).to(tl.int64)
    there = inside[:, None] & (k < K)[None, :]
    r = tl.load(
        rewards_ptr + row[:, None] * reward_row + k[None, :] * reward_column, mask=there, other=0.0
    ).to(tl.float32)
    w = tl.load(
        weights_ptr + row[:, None] * weight_row + k[None, :] * weight_column, mask=there, other=0.0
    ).to(tl.float32)
    usable = (tl.abs(r) < float("inf")) & (w >= 0)
    usable = tl.sum(usable.to(tl.int32), axis=1) == K_TILE
    scorable = usable & (tl.abs(tl.sum(w, axis=1) - 1) <= SIMPLEX_TOLERANCE)
    # As the reference: what cannot be scored is replaced before the arithmetic.
    r = tl.where(scorable[:, None], r, 0.0)
    w = tl.where(scorable[:, None] | (k >= K)[None, :], w, 1.0 / K)
    if offset_ptr is not None:
        r -= tl.load(offset_ptr + k, mask=k < K, other=0.0)[None, :]
    if divisor_ptr is not None:
        r /= tl.load(divisor_ptr + k, mask=k < K, other=1.0)[None, :]
    if HOW == "linear":
        score = tl.sum(w * r, axis=1)
        by_reward = w
        by_weight = r
    else:
        gap = tl.load(utopia_ptr + k, mask=k < K, other=0.0)[None, :] - r
        shortfall = tl.where((k < K)[None, :], w * gap, float("-inf"))
        top = tl.max(shortfall, axis=1)
        if HOW == "tchebycheff":
            score = -top
            share = (shortfall == top[:, None]).to(tl.float32)  # ties share, as in torch's amax
            share /= tl.sum(share, axis=1)[:, None]
        else:
            share = tl.exp((shortfall - top[:, None]) / mu)
            total = tl.sum(share, axis=1)
            score = -(top + mu * tl.log(total))
            share /= total[:, None]
        by_reward = w * share
        by_weight = -gap * share
    if divisor_ptr is not None:
        by_reward /= tl.load(divisor_ptr + k, mask=k < K, other=1.0)[None, :]
    return tl.where(scorable, score, float("nan")), scorable, by_reward, by_weight


@triton.jit
def _members(at, end, order_ptr, keep_ptr, BLOCK: tl.constexpr):
    """The next rows of a group: their numbers, which places are inside it, which rows are kept."""
    place = at + tl.arange(0, BLOCK)
    inside = place < end
    row = place
    if order_ptr is not None:
        row = tl.load(order_ptr + place, mask=inside, other=0)
    kept = inside
    if keep_ptr is not None:
        kept = inside & (tl.load(keep_ptr + row, mask=inside, other=0) != 0)
    return row, inside, kept


@triton.jit
def _extent(offsets_ptr, rows):
    """Where the program's group begins and ends, inside the rows whatever the offsets hold."""
    group = tl.program_id(0).to(tl.int64)
    begin = tl.maximum(tl.load(offsets_ptr + group), 0)
    return begin, tl.minimum(tl.load(offsets_ptr + group + 1), rows)


@triton.jit
def _statistics(
    begin,
    end,
    order_ptr,
    keep_ptr,
    source,
    K: tl.constexpr,
    K_TILE: tl.constexpr,
    HOW: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_STD: tl.constexpr,
):
    """Of the kept rows: how many, their mean, the unbiased std (1 unless WITH_STD), all equal?"""
    count = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    low = tl.full((BLOCK,), float("inf"), tl.float32)
    high = tl.full((BLOCK,), float("-inf"), tl.float32)
    at = begin
    while at < end:
        row, inside, kept = _members(at, end, order_ptr, keep_ptr, BLOCK)
        score = _score(row, inside, source, K, K_TILE, HOW)[0]
        count += kept.to(tl.int32)
        total += tl.where(kept, score, 0.0)
        low = tl.where(kept & (score < low), score, low)
        high = tl.where(kept & (score > high), score, high)
        at += BLOCK
    n = tl.sum(count, axis=0)
    mean = tl.sum(total, axis=0) / tl.maximum(n, 1).to(tl.float32)
    # Equal scores have a mean that rounding moves off them: the spread, not the deviation, tells.
    # A kept row without a score makes the mean NaN, and its group NaN rather than flat.
    flat = ((n < 2) | (tl.min(low, axis=0) == tl.max(high, axis=0))) & (mean == mean)
    std = 1.0
    if WITH_STD:
        square = tl.zeros((BLOCK,), tl.float32)
        at = begin
        while at < end:
            row, inside, kept = _members(at, end, order_ptr, keep_ptr, BLOCK)
            score = _score(row, inside, source, K, K_TILE, HOW)[0]
            deviation = tl.where(kept, score - mean, 0.0)
            square += deviation * deviation
            at += BLOCK
        std = tl.sqrt_rn(tl.sum(square, axis=0) / tl.maximum(n - 1, 1).to(tl.float32))
    return n, mean, std, flat


@triton.jit
def forward_kernel(
    score_ptr,
    advantage_ptr,
    rewards_ptr,
    weights_ptr,
    utopia_ptr,
    offset_ptr,
    divisor_ptr,
    offsets_ptr,
    order_ptr,
    keep_ptr,
    rows,
    mu,
    eps,
    reward_row,
    reward_column,
    weight_row,
    weight_column,
    K: tl.constexpr,
    K_TILE: tl.constexpr,
    HOW: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_STD: tl.constexpr,
):
    source = (
        rewards_ptr, weights_ptr, utopia_ptr, offset_ptr, divisor_ptr, mu,
        reward_row, reward_column, weight_row, weight_column,
    )  # fmt: skip
    begin, end = _extent(offsets_ptr, rows)
    _n, mean, std, flat = _statistics(
        begin, end, order_ptr, keep_ptr, source, K, K_TILE, HOW, BLOCK, WITH_STD
    )
    at = begin
    while at < end:
        row, inside, kept = _members(at, end, order_ptr, keep_ptr, BLOCK)
        score = _score(row, inside, source, K, K_TILE, HOW)[0]
        advantage = score - mean
        if WITH_STD:
            advantage /= std + eps
        tl.store(score_ptr + row, score, mask=inside)
        tl.store(advantage_ptr + row, tl.where(kept & (flat == 0), advantage, 0.0), mask=inside)
        at += BLOCK


@triton.jit
def backward_kernel(
    grad_rewards_ptr,
    grad_weights_ptr,
    grad_score_ptr,
    grad_advantage_ptr,
    rewards_ptr,
    weights_ptr,
    utopia_ptr,
    offset_ptr,
    divisor_ptr,
    offsets_ptr,
    order_ptr,
    keep_ptr,
    rows,
    mu,
    eps,
    reward_row,
    reward_column,
    weight_row,
    weight_column,
    K: tl.constexpr,
    K_TILE: tl.constexpr,
    HOW: tl.constexpr,
    BLOCK: tl.constexpr,
    WITH_STD: tl.constexpr,
):
    """dA_i/dS_j = [(δ_ij - 1/n) - d_i d_j / ((n - 1) std (std + eps))] / (std + eps), d = S - mean.

    (Without the division by the std, the bracket's first term alone.)
    """
    source = (
        rewards_ptr, weights_ptr, utopia_ptr, offset_ptr, divisor_ptr, mu,
        reward_row, reward_column, weight_row, weight_column,
    )  # fmt: skip
    begin, end = _extent(offsets_ptr, rows)
    n, mean, std, flat = _statistics(
        begin, end, order_ptr, keep_ptr, source, K, K_TILE, HOW, BLOCK, WITH_STD
    )
    sum_u = tl.zeros((BLOCK,), tl.float32)
    sum_ud = tl.zeros((BLOCK,), tl.float32)
    if grad_advantage_ptr is not None:
        at = begin
        while at < end:
            row, inside, kept = _members(at, end, order_ptr, keep_ptr, BLOCK)
            score = _score(row, inside, source, K, K_TILE, HOW)[0]
            u = tl.load(grad_advantage_ptr + row, mask=kept, other=0.0).to(tl.float32)
            sum_u += u
            sum_ud += tl.where(kept, u * (score - mean), 0.0)
            at += BLOCK
    mean_u = tl.sum(sum_u, axis=0) / tl.maximum(n, 1).to(tl.float32)
    unit = 1.0
    slope = 0.0
    if WITH_STD:
        unit = std + eps
        slope = tl.sum(sum_ud, axis=0) / (tl.maximum(n - 1, 1).to(tl.float32) * std * unit)
    k = tl.arange(0, K_TILE).to(tl.int64)
    at = begin
    while at < end:
        row, inside, kept = _members(at, end, order_ptr, keep_ptr, BLOCK)
        score, scorable, by_reward, by_weight = _score(row, inside, source, K, K_TILE, HOW)
        g = tl.zeros((BLOCK,), tl.float32)
        if grad_score_ptr is not None:
            g += tl.load(grad_score_ptr + row, mask=inside, other=0.0).to(tl.float32)
        if grad_advantage_ptr is not None:
            u = tl.load(grad_advantage_ptr + row, mask=kept, other=0.0).to(tl.float32)
            through = (u - mean_u - slope * (score - mean)) / unit
            g += tl.where(kept & (flat == 0), through, 0.0)
        place = row[:, None] * K + k[None, :]
        there = inside[:, None] & (k < K)[None, :]
        if grad_rewards_ptr is not None:
            by_reward = tl.where(scorable[:, None], g[:, None] * by_reward, 0.0)
            tl.store(grad_rewards_ptr + place, by_reward, mask=there)
        if grad_weights_ptr is not None:
            by_weight = tl.where(scorable[:, None], g[:, None] * by_weight, 0.0)
            tl.store(grad_weights_ptr + place, by_weight, mask=there)
        at += BLOCK


@dataclass(frozen=True)
class Plan:
    """The constant arguments; tensors are contiguous and on the rewards' device."""

    offsets: Tensor  # (G + 1,) int64
    order: Tensor | None  # (R,) int64
    utopia: Tensor | None  # (K,) float32, like the next two; None is 0, 0 and 1
    offset: Tensor | None
    divisor: Tensor | None
    keep: Tensor | None  # (R,) bool
    mu: float
    scalarization: str
    scale: str
    eps: float


def configuration(rows: int, k: int, groups: int) -> dict[str, int]:
    """Tile and warps. The sizes of the groups are on the device: their mean has to do."""
    k_tile = triton.next_power_of_2(k)
    typical = triton.next_power_of_2(max(1, rows // max(1, groups)))
    block = max(1, min(max(32, typical), 1024, TILE // k_tile))
    return {"K_TILE": k_tile, "BLOCK": block, "num_warps": max(1, min(4, block * k_tile // 128))}


def launch(
    kernel: Any, out: tuple[Tensor | None, ...], rewards: Tensor, weights: Tensor, plan: Plan
) -> None:
    (r, k), groups = rewards.shape, plan.offsets.shape[0] - 1
    if r == 0 or groups == 0:
        return
    with torch.cuda.device_of(rewards):  # Triton launches on the current device
        kernel[(groups,)](
            *out,
            rewards,
            weights,
            plan.utopia,
            plan.offset,
            plan.divisor,
            plan.offsets,
            plan.order,
            plan.keep,
            r,
            plan.mu,
            plan.eps,
            *rewards.stride(),
            *weights.stride(),
            K=k,
            HOW=plan.scalarization,
            WITH_STD=plan.scale == "std",
            **configuration(r, k, groups),
        )


class GroupAdvantages(torch.autograd.Function):
    """(rewards (R, K), weights (R, K)) → (score, advantage), both (R,) float32."""

    @staticmethod
    def forward(rewards: Tensor, weights: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        score = rewards.new_empty(rewards.shape[0], dtype=torch.float32)
        advantage = torch.empty_like(score)
        launch(forward_kernel, (score, advantage), rewards, weights, plan)
        return score, advantage

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Plan], output: Any) -> None:
        rewards, weights, plan = inputs
        ctx.save_for_backward(rewards, weights)
        ctx.plan = plan
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, g_score: Tensor | None, g_advantage: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        rewards, weights = ctx.saved_tensors
        g_rewards, g_weights = (
            torch.empty(x.shape, dtype=x.dtype, device=x.device) if needed else None
            for x, needed in zip((rewards, weights), ctx.needs_input_grad, strict=False)
        )
        upstream = (None if g is None else g.contiguous() for g in (g_score, g_advantage))
        launch(backward_kernel, (g_rewards, g_weights, *upstream), rewards, weights, ctx.plan)
        return g_rewards, g_weights, None


def compile_cases(capability: int = 90) -> list[Case]:
    """Two objectives in groups of 8, and sixteen in groups of 1,024; every option given."""
    cases = []
    groups = 1000
    for how, k, size in (
        ("linear", 2, 8), ("tchebycheff", 2, 8), ("smooth", 2, 8), ("smooth", 16, 1024)
    ):  # fmt: skip
        tuned = configuration(size * groups, k, groups)
        warps = tuned.pop("num_warps")
        for fn, numbers_a_row in ((forward_kernel, 2 * k + 2), (backward_kernel, 4 * k + 2)):
            signature = {name: "*fp32" for name in fn.arg_names if name.endswith("_ptr")}
            signature |= {"offsets_ptr": "*i64", "order_ptr": "*i64", "keep_ptr": "*i1"}
            signature |= {"rows": "i32", "mu": "fp32", "eps": "fp32"}
            signature |= {"reward_row": "i32", "weight_row": "i32"}
            fixed = {"reward_column": 1, "weight_column": 1, "K": k, "HOW": how, "WITH_STD": True}
            cases.append(
                Case(
                    f"{fn.__name__} {how} K={k} groups of {size}",
                    fn,
                    signature,
                    fixed | tuned,
                    flops=0.0,
                    bytes=size * groups * (4.0 * numbers_a_row + 9),  # and the order, and keep
                    num_warps=warps,
                )
            )
    return cases
