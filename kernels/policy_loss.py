"""The policy loss in Triton: loss, metrics and gradients in one pass over log-probabilities.

    N  tokens    A  advantage    ρ = exp(logp - old_logp)    c  the token's coefficient

    loss = Σ c (-min(ρ A, clip(ρ) A) · importance_weight + beta · KL) / total

`token_terms` is the definition of `meal_fast.ops.reference.loss_terms`, clamps included, and its
derivatives by hand. One program takes a block of tokens and leaves its sums in a column of its own;
a last launch adds the columns in their order (two runs give the same bits). Every value is loaded
under the mask of active tokens: what stands elsewhere may be NaN.

`Loss` runs it in pieces, for `meal_fast.ops.fused`. `policy_loss_from_logp` is one piece, one
launch; its total may be the count of live tokens, known at the end, so the gradients are those of
the undivided sum. The losses with a head in them are a launch for each chunk of tokens, while its
logits are there, with the total known beforehand. The ratio of a sequence needs all of its tokens:
there the mean log-ratios are handed in, and the derivative by them is handed out.

Nothing is read back to the host. The code has run in Triton's interpreter and compiles for sm_90;
it has never run on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from meal_fast.ops import reference

from .cases import Case

LOG_RATIO_LIMIT = tl.constexpr(reference.LOG_RATIO_LIMIT)
LOWEST = tl.constexpr(torch.finfo(torch.float32).min / 4)
BLOCK = 512
# Rows of the sums that programs leave.
SUMS = ("live", "active", "loss", "policy", "ratio", "clipped", "kl", "entropy")
# What `loss_kernel` is given of a chunk of tokens, which begins anywhere.
OF_TOKENS = [
    f"{name}_ptr"
    for name in "sums grad_logp grad_kl grad_ratio logp advantage old_logp mean_log_ratio ref_logp "
    "token_kl entropy importance mask coefficient".split()
]


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
    mean_log_ratio,
    ref_logp,
    token_kl,
    advantage,
    importance_weight,
    low,
    high,
    KL: tl.constexpr,
):
    """Per token: policy, kl, ratio, clipped, d policy / d logp, d kl / d logp (token_kl held).

    old_logp, mean_log_ratio, ref_logp, token_kl and importance_weight may be None; without ref_logp
    and token_kl the kl is 0. With mean_log_ratio, its sequence's, d policy is by that. Values of
    tokens that do not count must have been replaced by finite ones. `low`, `high` bound the ratio.
    """
    # Comparisons, not tl.maximum: a NaN stays one, as in torch's clamp.
    logp_moves = logp >= LOWEST
    logp = tl.where(logp < LOWEST, LOWEST, logp)
    log_ratio = logp - logp
    if old_logp is not None:
        log_ratio = logp - tl.where(old_logp < LOWEST, LOWEST, old_logp)
    policy_moves = logp_moves
    if mean_log_ratio is not None:
        log_ratio = mean_log_ratio
        policy_moves = logp_moves | (logp < LOWEST)
    ratio_moves = (log_ratio >= -LOG_RATIO_LIMIT) & (log_ratio <= LOG_RATIO_LIMIT)
    log_ratio = tl.where(log_ratio < -LOG_RATIO_LIMIT, -LOG_RATIO_LIMIT, log_ratio)
    ratio = tl.exp(tl.where(log_ratio > LOG_RATIO_LIMIT, LOG_RATIO_LIMIT, log_ratio))
    free = ratio * advantage
    bound = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio)) * advantage
    policy = -tl.where(bound < free, bound, free)
    # Where the two are equal torch's minimum gives each half of the gradient.
    inside = ((ratio >= low) & (ratio <= high)).to(tl.float32)
    share = tl.where(free < bound, 1.0, tl.where(free > bound, inside, (1 + inside) / 2))
    d_policy = tl.where(ratio_moves & policy_moves, -share * free, 0.0)
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


# Each micro-batch has other sizes: none of them is worth a compilation.
@triton.jit(do_not_specialize=["tokens", "columns"], do_not_specialize_on_alignment=OF_TOKENS)
def loss_kernel(
    sums_ptr,
    grad_logp_ptr,
    grad_kl_ptr,
    grad_ratio_ptr,
    logp_ptr,
    advantage_ptr,
    old_logp_ptr,
    mean_log_ratio_ptr,
    ref_logp_ptr,
    token_kl_ptr,
    entropy_ptr,
    importance_ptr,
    mask_ptr,
    coefficient_ptr,
    total_ptr,
    total,
    tokens,
    columns,
    per_advantage,
    beta,
    low,
    high,
    KL: tl.constexpr,
    WITH_KL: tl.constexpr,
    ALL_ACTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    i = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < tokens
    if mask_ptr is not None:
        live = live & (tl.load(mask_ptr + i, mask=live, other=0) != 0)
    advantage = tl.load(advantage_ptr + i // per_advantage, mask=live, other=0.0).to(tl.float32)
    active = live
    if not ALL_ACTIVE:
        active = live & (advantage != 0)
    logp = tl.load(logp_ptr + i, mask=active, other=0.0).to(tl.float32)
    old_logp = None
    if old_logp_ptr is not None:
        old_logp = tl.load(old_logp_ptr + i, mask=active, other=0.0).to(tl.float32)
    mean_log_ratio = None
    if mean_log_ratio_ptr is not None:
        mean_log_ratio = tl.load(mean_log_ratio_ptr + i, mask=active, other=0.0)
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
        logp, old_logp, mean_log_ratio, ref_logp, token_kl, advantage, importance, low, high, KL
    )
    coefficient = active.to(tl.float32)
    if coefficient_ptr is not None:
        coefficient = tl.load(coefficient_ptr + i, mask=active, other=0.0)
    if total_ptr is not None:
        coefficient /= tl.load(total_ptr).to(tl.float32)
    elif total is not None:
        coefficient /= total
    term = policy
    d_term = d_policy
    if grad_ratio_ptr is not None:
        d_ratio = tl.where(active, coefficient * d_policy, 0.0)
        tl.store(grad_ratio_ptr + i, d_ratio, mask=i < tokens)
        d_term = tl.zeros_like(d_policy)
    if WITH_KL:
        term += beta * kl
        d_term += beta * d_kl
    if grad_logp_ptr is not None:
        tl.store(grad_logp_ptr + i, tl.where(active, coefficient * d_term, 0.0), mask=i < tokens)
    if grad_kl_ptr is not None:
        tl.store(grad_kl_ptr + i, coefficient * beta, mask=i < tokens)

    column = sums_ptr + program
    width = columns
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


@triton.jit(do_not_specialize=["columns"])
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

    options: reference.LossOptions  # whose reduce has become coefficient and normalizer
    advantage: Tensor  # (N / per_advantage,)
    per_advantage: int  # tokens that share an advantage
    old_logp: Tensor | None  # (N,), like those that follow
    ref_logp: Tensor | None
    entropy: Tensor | None
    importance_weight: Tensor | None
    mask: Tensor | None
    coefficient: Tensor | None  # float32; None is 1
    normalizer: Tensor | float | None  # None: the number of live tokens, at least 1
    differentiate: bool  # whether gradients will be asked for
    all_active: bool = False  # also those without an advantage where there is no KL term


class Loss:
    """A loss of N tokens, `chunk` at a time; then `total`."""

    def __init__(
        self,
        like: Tensor,
        tokens: int,
        chunk: int,
        *,
        undivided: bool = False,
        entropy: bool = True,
    ) -> None:
        """undivided: the pieces are those of the undivided sum, and so are their gradients."""
        self.undivided, self.entropy, self.filled = undivided, entropy, 0
        blocks, rest = divmod(tokens, max(1, chunk))
        self.columns = blocks * triton.cdiv(chunk, BLOCK) + triton.cdiv(rest, BLOCK)
        self.sums = like.new_empty((len(SUMS), self.columns), dtype=torch.float32)

    def piece(
        self,
        plan: Plan,  # of these tokens
        logp: Tensor,
        token_kl: Tensor | None,
        grad_logp: Tensor | None = None,  # what is given is filled: float32, contiguous
        grad_kl: Tensor | None = None,
        mean_log_ratio: Tensor | None = None,
        grad_ratio: Tensor | None = None,
    ) -> None:
        n, total = logp.shape[0], None if self.undivided else plan.normalizer
        options, beta = plan.options, float(plan.options.beta)
        if n == 0:
            return
        blocks = triton.cdiv(n, BLOCK)
        with torch.cuda.device_of(logp):  # Triton launches on the current device
            loss_kernel[(blocks,)](
                self.sums[0, self.filled :],
                grad_logp,
                grad_kl,
                grad_ratio,
                logp,
                plan.advantage,
                plan.old_logp,
                mean_log_ratio,
                plan.ref_logp,
                token_kl,
                plan.entropy,
                plan.importance_weight,
                plan.mask,
                plan.coefficient,
                total if isinstance(total, Tensor) else None,
                None if isinstance(total, Tensor) else total,
                n,
                self.columns,
                plan.per_advantage,
                beta,
                1.0 - options.clip[0],
                1.0 + options.clip[1],
                KL=options.kl,
                WITH_KL=beta != 0,
                ALL_ACTIVE=plan.all_active or beta != 0,
                BLOCK=BLOCK,
            )
        self.filled += blocks

    def total(self, given: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor]:
        """loss, active tokens, figures: 1 / given, then reference.FIGURES.

        given: what the sums are divided by; None: the number of live tokens, at least 1.
        """
        assert self.filled == self.columns
        loss = self.sums.new_empty(())
        figures = self.sums.new_empty(1 + len(reference.FIGURES))
        tokens = self.sums.new_empty((), dtype=torch.int64)
        with torch.cuda.device_of(loss):
            total_kernel[(1,)](
                loss,
                figures,
                tokens,
                self.sums,
                self.columns,
                given if isinstance(given, Tensor) else None,
                None if isinstance(given, Tensor) else given,
                WITH_ENTROPY=self.entropy,
                WIDTH=1024,
            )
        return loss, tokens, figures


def compile_cases(capability: int = 90) -> list[Case]:
    """A million tokens with every option, with each KL and none, of a sequence; and the totals."""
    n, cases = 1 << 20, []
    of_sequence = ("grad_ratio_ptr", "mean_log_ratio_ptr")
    for kl, level in (
        ("k1", ""), ("k2", ""), ("k3", ""), ("exact", ""), (None, ""), ("k3", " of sequences")
    ):  # fmt: skip
        pointers = {name: "*fp32" for name in loss_kernel.arg_names if name.endswith("_ptr")}
        pointers["mask_ptr"] = "*i1"
        absent = ("token_kl_ptr", "grad_kl_ptr") if kl != "exact" else ("ref_logp_ptr",)
        for name in absent + (() if level else of_sequence):
            del pointers[name]
        numbers = {"tokens": "i32", "columns": "i32", "per_advantage": "i32"}
        numbers |= dict.fromkeys(("beta", "low", "high"), "fp32")
        fixed = {"KL": kl or "k3", "WITH_KL": kl is not None, "ALL_ACTIVE": kl is not None}
        moved = n * (4.0 * (len(pointers) - 3) + 1)
        name = f"loss_kernel {kl or 'no'} KL{level}"
        given = {"total": None, "BLOCK": BLOCK}
        cases.append(Case(name, loss_kernel, pointers | numbers, fixed | given, 0.0, moved))
    signature = {"loss_ptr": "*fp32", "figures_ptr": "*fp32", "tokens_ptr": "*i64"}
    signature |= {"sums_ptr": "*fp32", "columns": "i32"}
    fixed = {"WITH_ENTROPY": True, "WIDTH": 1024}
    moved = 4.0 * len(SUMS) * n / BLOCK
    return [*cases, Case("total_kernel", total_kernel, signature, fixed, 0.0, moved)]
