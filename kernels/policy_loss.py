"""`meal_fast.ops.policy_loss_from_logp` in Triton: loss, metrics and gradients in one pass.

    N  tokens    A  advantage    ρ = exp(logp - old_logp)    c  the token's coefficient

    loss = Σ c (-min(ρ A, clip(ρ) A) · importance_weight + beta · KL) / total

`token_terms` is the definition of `meal_fast.ops.reference.loss_terms`, clamps included, and its
derivatives by hand. One program takes a block of tokens and leaves its sums in a column of its own;
a second launch adds the columns in their order (two runs give the same bits) and divides by the
total, which may be the count of live tokens: so the stored gradients are those of the undivided
sum, and the backward pass scales them. Every value is loaded under the mask of active tokens: what
stands elsewhere may be NaN. The ratio of a sequence is not here: `level="sequence"` runs in torch.

Nothing is read back to the host. The code has run in Triton's interpreter and compiles for sm_90;
it has never run on a GPU.
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

LOG_RATIO_LIMIT = tl.constexpr(reference.LOG_RATIO_LIMIT)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min / 4)
BLOCK = 1024
# Rows of the sums that programs leave.
SUMS = ("live", "active", "loss", "policy", "ratio", "clipped", "kl", "entropy")


@triton.jit
def exp_beyond(x):
    """exp(x) - 1 and exp(x) - 1 - x, also where they are small: there x²/2 + x³/6 + …"""
    series = 1.0 / 40320 + x * (1.0 / 362880)
    series = 1.0 / 720 + x * (1.0 / 5040 + x * series)
    series = x * x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * series))))
    small = tl.abs(x) < 0.5
    first = tl.where(small, x + series, tl.exp(x) - 1)
    return first, tl.where(small, series, first - x)


@triton.jit
def token_terms(
    logp,
    old_logp,
    ref_logp,
    token_kl,
    advantage,
    importance_weight,
    low,
    high,
    KL: tl.constexpr,
):
    """Per token: policy, kl, ratio, clipped, d policy / d logp, d kl / d logp (token_kl held).

    old_logp, ref_logp, token_kl and importance_weight may be None; without ref_logp and token_kl
    the kl is 0. Values of tokens that do not count must have been replaced by finite ones.
    `low` and `high` bound the ratio.
    """
    # Comparisons, not tl.maximum: a NaN stays one, as in torch's clamp.
    logp_moves = logp >= LOWEST
    logp = tl.where(logp < LOWEST, LOWEST, logp)
    log_ratio = logp - logp
    if old_logp is not None:
        log_ratio = logp - tl.where(old_logp < LOWEST, LOWEST, old_logp)
    ratio_moves = (log_ratio >= -LOG_RATIO_LIMIT) & (log_ratio <= LOG_RATIO_LIMIT)
    log_ratio = tl.where(log_ratio < -LOG_RATIO_LIMIT, -LOG_RATIO_LIMIT, log_ratio)
    ratio = tl.exp(tl.where(log_ratio > LOG_RATIO_LIMIT, LOG_RATIO_LIMIT, log_ratio))
    free = ratio * advantage
    bound = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio)) * advantage
    policy = -tl.where(bound < free, bound, free)
    # Where the two are equal torch's minimum gives each half of the gradient.
    inside = ((ratio >= low) & (ratio <= high)).to(tl.float32)
    share = tl.where(free < bound, 1.0, tl.where(free > bound, inside, (1 + inside) / 2))
    d_policy = tl.where(ratio_moves & logp_moves, -share * free, 0.0)
    if importance_weight is not None:
        policy *= importance_weight
        d_policy *= importance_weight
    clipped = ((ratio < low) & (advantage < 0)) | ((ratio > high) & (advantage > 0))
    kl = tl.zeros_like(logp)
    d_kl = tl.zeros_like(logp)
    if token_kl is not None:
        kl = token_kl
    elif ref_logp is not None:
        gap = tl.where(ref_logp < LOWEST, LOWEST, ref_logp) - logp
        if KL == "k1":
            kl = -gap
            d_kl += 1
        elif KL == "k2":
            kl = gap * gap / 2
            d_kl = -gap
        else:
            gap_moves = gap <= LOG_RATIO_LIMIT
            gap = tl.where(gap > LOG_RATIO_LIMIT, LOG_RATIO_LIMIT, gap)
            slope, kl = exp_beyond(gap)
            d_kl = tl.where(gap_moves, -slope, 0.0)
        d_kl = tl.where(logp_moves, d_kl, 0.0)
    return policy, kl, ratio, clipped, d_policy, d_kl


@triton.jit
def loss_kernel(
    sums_ptr,
    grad_logp_ptr,
    grad_kl_ptr,
    logp_ptr,
    advantage_ptr,
    old_logp_ptr,
    ref_logp_ptr,
    token_kl_ptr,
    entropy_ptr,
    importance_ptr,
    mask_ptr,
    coefficient_ptr,
    tokens,
    per_advantage,
    beta,
    low,
    high,
    KL: tl.constexpr,
    WITH_KL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    i = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < tokens
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + i, mask=live, other=0) != 0)
    advantage = tl.load(advantage_ptr + i // per_advantage, mask=live, other=0.0).to(tl.float32)
    active = live
    if not WITH_KL:
        active = live & (advantage != 0)
    logp = tl.load(logp_ptr + i, mask=active, other=0.0).to(tl.float32)
    old_logp = None
    if old_logp_ptr is not None:
        old_logp = tl.load(old_logp_ptr + i, mask=active, other=0.0).to(tl.float32)
    ref_logp = None
    if ref_logp_ptr is not None:
        ref_logp = tl.load(ref_logp_ptr + i, mask=active, other=0.0).to(tl.float32)
    token_kl = None
    if token_kl_ptr is not None:
        token_kl = tl.load(token_kl_ptr + i, mask=active, other=0.0).to(tl.float32)
    importance = None
    if importance_ptr is not None:
        importance = tl.load(importance_ptr + i, mask=active, other=0.0).to(tl.float32)
    policy, kl, ratio, clipped, d_policy, d_kl = token_terms(
        logp, old_logp, ref_logp, token_kl, advantage, importance, low, high, KL
    )
    coefficient = active.to(tl.float32)
    if coefficient_ptr is not None:
        coefficient = tl.load(coefficient_ptr + i, mask=active, other=0.0)
    term = policy
    d_term = d_policy
    if WITH_KL:
        term += beta * kl
        d_term += beta * d_kl
    if grad_logp_ptr is not None:
        tl.store(grad_logp_ptr + i, tl.where(active, coefficient * d_term, 0.0), mask=i < tokens)
    if grad_kl_ptr is not None:
        tl.store(grad_kl_ptr + i, coefficient * beta, mask=i < tokens)

    column = sums_ptr + program
    width = tl.num_programs(0)
    tl.store(column, tl.sum(live.to(tl.float32), axis=0))
    tl.store(column + width, tl.sum(active.to(tl.float32), axis=0))
    tl.store(column + 2 * width, tl.sum(tl.where(active, coefficient * term, 0.0), axis=0))
    tl.store(column + 3 * width, tl.sum(tl.where(active, coefficient * policy, 0.0), axis=0))
    tl.store(column + 4 * width, tl.sum(tl.where(active, ratio, 0.0), axis=0))
    tl.store(column + 5 * width, tl.sum((active & clipped).to(tl.float32), axis=0))
    tl.store(column + 6 * width, tl.sum(tl.where(active, kl, 0.0), axis=0))
    if entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + i, mask=active, other=0.0).to(tl.float32)
        tl.store(column + 7 * width, tl.sum(entropy, axis=0))


@triton.jit
def _row_total(sums_ptr, row, columns, WIDTH: tl.constexpr):
    """The sum of one row, always in the same order; float64, for counts beyond 2²⁴."""
    total = tl.zeros((WIDTH,), tl.float64)
    at = 0
    while at < columns:
        place = at + tl.arange(0, WIDTH)
        total += tl.load(sums_ptr + row * columns + place, mask=place < columns, other=0.0)
        at += WIDTH
    return tl.sum(total, axis=0)


@triton.jit
def total_kernel(
    loss_ptr,
    figures_ptr,
    tokens_ptr,
    sums_ptr,
    columns,
    normalizer_ptr,
    normalizer,
    WITH_ENTROPY: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """figures: 1 / total, then reference.FIGURES."""
    active = _row_total(sums_ptr, 1, columns, WIDTH)
    if normalizer_ptr is not None:
        total = tl.load(normalizer_ptr).to(tl.float64)
    elif normalizer is not None:
        total = active * 0 + normalizer
    else:
        total = tl.maximum(_row_total(sums_ptr, 0, columns, WIDTH), 1.0)
    count = tl.maximum(active, 1.0)
    tl.store(tokens_ptr, active.to(tl.int64))
    tl.store(loss_ptr, (_row_total(sums_ptr, 2, columns, WIDTH) / total).to(tl.float32))
    tl.store(figures_ptr, (1.0 / total).to(tl.float32))
    tl.store(figures_ptr + 1, (_row_total(sums_ptr, 3, columns, WIDTH) / total).to(tl.float32))
    for row in tl.static_range(4, 7):
        mean = _row_total(sums_ptr, row, columns, WIDTH) / count
        tl.store(figures_ptr + row - 2, mean.to(tl.float32))
    if WITH_ENTROPY:
        mean = _row_total(sums_ptr, 7, columns, WIDTH) / count
        tl.store(figures_ptr + 5, mean.to(tl.float32))


@dataclass(frozen=True)
class Plan:
    """The constant arguments; tensors are flat, contiguous and on logp's device."""

    advantage: Tensor  # (N / per_advantage,)
    per_advantage: int  # tokens that share an advantage
    old_logp: Tensor | None  # (N,), like those that follow
    ref_logp: Tensor | None
    entropy: Tensor | None
    importance_weight: Tensor | None
    mask: Tensor | None
    coefficient: Tensor | None  # float32; None is 1
    normalizer: Tensor | float | None  # None: the number of live tokens, at least 1
    beta: float
    kl: str
    clip: tuple[float, float]
    differentiate: bool  # whether gradients will be asked for


class PolicyLoss(torch.autograd.Function):
    """(logp (N,), token_kl (N,)) → loss, active tokens, figures, and what backward needs.

    figures: 1 / total, then reference.FIGURES.
    """

    @staticmethod
    def forward(logp: Tensor, token_kl: Tensor | None, plan: Plan) -> tuple[Tensor, ...]:
        n, blocks = logp.shape[0], triton.cdiv(logp.shape[0], BLOCK)
        loss = logp.new_empty((), dtype=torch.float32)
        figures = logp.new_empty(1 + len(reference.FIGURES), dtype=torch.float32)
        tokens = logp.new_empty((), dtype=torch.int64)
        sums = logp.new_empty((len(SUMS), blocks), dtype=torch.float32)
        g_logp = logp.new_empty(n if plan.differentiate else 0, dtype=torch.float32)
        g_kl = logp.new_empty(
            n if plan.differentiate and token_kl is not None else 0, dtype=torch.float32
        )
        given = plan.normalizer
        with torch.cuda.device_of(logp):  # Triton launches on the current device
            if n:
                loss_kernel[(blocks,)](
                    sums,
                    g_logp if g_logp.numel() else None,
                    g_kl if g_kl.numel() else None,
                    logp,
                    plan.advantage,
                    plan.old_logp,
                    plan.ref_logp,
                    token_kl,
                    plan.entropy,
                    plan.importance_weight,
                    plan.mask,
                    plan.coefficient,
                    n,
                    plan.per_advantage,
                    plan.beta,
                    1 - plan.clip[0],
                    1 + plan.clip[1],
                    KL=plan.kl,
                    WITH_KL=plan.beta != 0,
                    BLOCK=BLOCK,
                )
            total_kernel[(1,)](
                loss,
                figures,
                tokens,
                sums,
                blocks,
                given if isinstance(given, Tensor) else None,
                None if isinstance(given, Tensor) else given,
                WITH_ENTROPY=plan.entropy is not None,
                WIDTH=1024,
            )
        return loss, tokens, figures, g_logp, g_kl

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor | None, Plan], output: tuple[Tensor, ...]
    ) -> None:
        logp, token_kl, _ = inputs
        _, tokens, figures, g_logp, g_kl = output
        ctx.mark_non_differentiable(tokens, figures, g_logp, g_kl)
        ctx.save_for_backward(figures, g_logp, g_kl)
        ctx.dtypes = logp.dtype, None if token_kl is None else token_kl.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        figures, g_logp, g_kl = ctx.saved_tensors
        scale = upstream * figures[0]

        def scaled(gradient: Tensor, dtype: torch.dtype) -> Tensor:
            return (gradient * scale).to(dtype)

        logp_dtype, kl_dtype = ctx.dtypes
        needs_logp, needs_kl, _ = ctx.needs_input_grad
        return (
            scaled(g_logp, logp_dtype) if needs_logp else None,
            scaled(g_kl, kl_dtype) if needs_kl else None,
            None,
        )


def compile_cases(capability: int = 90) -> list[Case]:
    """A million tokens with every option, with each KL and none, and the totals."""
    n, cases = 1 << 20, []
    for kl in ("k1", "k2", "k3", "exact", None):
        pointers = {name: "*fp32" for name in loss_kernel.arg_names if name.endswith("_ptr")}
        pointers["mask_ptr"] = "*i1"
        for name in ("token_kl_ptr", "grad_kl_ptr") if kl != "exact" else ("ref_logp_ptr",):
            del pointers[name]
        numbers = {"tokens": "i32", "per_advantage": "i32"}
        numbers |= dict.fromkeys(("beta", "low", "high"), "fp32")
        fixed = {"KL": kl or "k3", "WITH_KL": kl is not None, "BLOCK": BLOCK}
        moved = n * (4.0 * (len(pointers) - 2) + 1)
        name = f"loss_kernel {kl or 'no'} KL"
        cases.append(Case(name, loss_kernel, pointers | numbers, fixed, 0.0, moved))
    signature = {"loss_ptr": "*fp32", "figures_ptr": "*fp32", "tokens_ptr": "*i64"}
    signature |= {"sums_ptr": "*fp32", "columns": "i32"}
    fixed = {"WITH_ENTROPY": True, "WIDTH": 1024}
    moved = 4.0 * len(SUMS) * n / BLOCK
    return [*cases, Case("total_kernel", total_kernel, signature, fixed, 0.0, moved)]
