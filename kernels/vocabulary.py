"""A row of the vocabulary at a time: log-probability, entropy, exact KL, and the gradient.

    C  rows    V  columns (the vocabulary)    x  the policy's raw logits    q  the reference's

The raw logits are there already, in a tile that a product with the head made, or in a caller's
tensor of any strides. A program takes one row and reads it in blocks of columns:

    stats      one read of x
    stats_kl   two reads of x and q: the second knows the row's totals, so that a small KL survives
    gradient   one read of x (and of q for a KL), one write

No row is split over programs: with few rows the product that makes the tile is what takes time.

Shown to be right by Triton's interpreter, and compiled for sm_90; never run on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cases import HEADS, Case

# What is kept of each row: `out` (KEPT, C) float32. The gradient needs TOP, LOG_TOTAL, ENTROPY
# and GAP: p = exp(z - TOP - LOG_TOTAL), and the mean of z - z_q under p is GAP.
KEPT = 7
LOGP, ENTROPY, REF_LOGP, KL = (tl.constexpr(i) for i in range(4))
TOP, LOG_TOTAL, GAP = (tl.constexpr(i) for i in range(4, 7))

# Columns, over the tiles read at once. As many for each of two tiles is 180 registers a thread.
MAX_BLOCK = 4096

# They change with every batch: no variant of a kernel for those that are 1 or round.
SIZES = ["x_inner", "q_inner", "out_stride", "kept_stride"]


@triton.jit
def _series(d):
    """exp(-d) - 1 + d for |d| < 1/2, to full relative precision: d²/2 (1 - d/3 (1 - d/4 (…)))."""
    r = 1.0 - d * (1.0 / 9)
    for k in tl.static_range(8, 2, -1):
        r = 1.0 - d * (1.0 / k) * r
    return 0.5 * d * d * r


@triton.jit
def _excess(d):
    """exp(-d) - 1 + d, which is never negative."""
    return tl.where(tl.abs(d) < 0.5, _series(d), tl.exp(-d) - 1.0 + d)


@triton.jit
def _log1p(x):
    """log(1 + x), x ≥ 0: through the area tangent where 1 + x would round x away."""
    s = x / (2.0 + x)
    r = s * s
    odd = 1.0 + r * (1.0 / 3 + r * (1.0 / 5 + r * (1.0 / 7 + r * (1.0 / 9))))
    return tl.where(x < 0.5, 2.0 * s * odd, tl.log(1.0 + x))


@triton.jit
def _tanh(x):
    t = 2.0 * tl.abs(x)
    drop = tl.where(t < 0.5, t - _series(t), 1.0 - tl.exp(-t))  # 1 - exp(-t)
    y = drop / (2.0 - drop)
    return tl.where(x < 0, -y, y)


@triton.jit
def _row(pointer, row, inner, outer_stride, inner_stride):
    """Where row `row` of a (outer, inner, V) tensor begins; `row` is int64."""
    return pointer + (row // inner) * outer_stride + (row % inner) * inner_stride


@triton.jit
def _logits(start, columns, stride, bias, into, out_of, V: tl.constexpr):
    """Logits of these columns, -inf outside the vocabulary, and the softcap's 1 - tanh².

    z = x · into + bias, or out_of · tanh(that); the bias has been multiplied by `into` before.
    """
    inside = (columns >= 0) & (columns < V)
    z = tl.load(start + columns.to(tl.int64) * stride, mask=inside, other=0.0).to(tl.float32) * into
    if bias is not None:
        z += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    slope = 1.0
    if out_of is not None:
        z = _tanh(z)
        slope = 1.0 - z * z
        z *= out_of
    return tl.where(inside, z, float("-inf")), slope


@triton.jit
def _shift(top, z):
    """(new maximum, what to subtract instead of it, factor of the sums, what u loses by it)."""
    new = tl.maximum(top, tl.max(z, 0))
    anchor = tl.where(new == float("-inf"), 0.0, new)  # -inf - -inf is NaN
    moved = tl.where(top == float("-inf"), 0.0, top - anchor)
    return new, anchor, tl.exp(top - anchor), moved


@triton.jit
def _at_target(z, top, log_total, target, V: tl.constexpr):
    inside = (target >= 0) & (target < V)
    return tl.where(inside, z - top - log_total, float("nan"))


@triton.jit(do_not_specialize=SIZES)
def _stats(
    x, x_inner, x_outer_stride, x_inner_stride, x_stride, x_bias,
    target, active, out, out_stride, into, out_of,
    V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    out += row
    if active is not None:
        if tl.load(active + row) == 0:
            for i in tl.static_range(7):
                tl.store(out + i * out_stride, 0.0)
            return
    x = _row(x, row, x_inner, x_outer_stride, x_inner_stride)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)  # Σ e, e = exp(u), u = z - top
    weighted = tl.zeros((BLOCK,), tl.float32)  # Σ e u
    for block in range(0, V, BLOCK):
        z, _ = _logits(x, block + tl.arange(0, BLOCK), x_stride, x_bias, into, out_of, V)
        top, anchor, factor, moved = _shift(top, z)
        u = z - anchor
        e = tl.exp(u)
        # e = 0 where u may be -inf; a NaN is left to `total`.
        weighted = (weighted + total * moved) * factor + tl.where(e > 0, e * u, 0.0)
        total = total * factor + e
    s = tl.sum(total, 0)
    log_total = tl.log(s)
    t = tl.load(target + row)
    z_t, _ = _logits(x, t, x_stride, x_bias, into, out_of, V)
    tl.store(out + LOGP * out_stride, _at_target(z_t, top, log_total, t, V))
    tl.store(out + ENTROPY * out_stride, log_total - tl.sum(weighted, 0) / s)
    tl.store(out + TOP * out_stride, top)
    tl.store(out + LOG_TOTAL * out_stride, log_total)


@triton.jit(do_not_specialize=SIZES)
def _stats_kl(
    x, x_inner, x_outer_stride, x_inner_stride, x_stride, x_bias,
    q, q_inner, q_outer_stride, q_inner_stride, q_stride, q_bias,
    target, active, out, out_stride, into, out_of,
    V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`_stats` of x, the reference's log-probability, and KL(p‖q).

    With gap = z - z_q and d = gap - Σ p gap, KL = log1p(Σ p (exp(-d) - 1 + d) + rest): every term
    is ≥ 0, so nothing cancels, where log Σ e - log Σ e_q + Σ p gap loses all below 1e-7. `rest` is
    the reference's share of columns with p = 0, which have dropped out of every sum.
    """
    row = tl.program_id(0).to(tl.int64)
    out += row
    if active is not None:
        if tl.load(active + row) == 0:
            for i in tl.static_range(7):
                tl.store(out + i * out_stride, 0.0)
            return
    x = _row(x, row, x_inner, x_outer_stride, x_inner_stride)
    q = _row(q, row, q_inner, q_outer_stride, q_inner_stride)
    top = tl.full((), float("-inf"), tl.float32)
    top_q = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    total_q = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    gaps = tl.zeros((BLOCK,), tl.float32)  # Σ e gap
    for block in range(0, V, BLOCK):
        columns = block + tl.arange(0, BLOCK)
        z, _ = _logits(x, columns, x_stride, x_bias, into, out_of, V)
        z_q, _ = _logits(q, columns, q_stride, q_bias, into, out_of, V)
        top, anchor, factor, moved = _shift(top, z)
        u = z - anchor
        e = tl.exp(u)
        weighted = (weighted + total * moved) * factor + tl.where(e > 0, e * u, 0.0)
        gaps = gaps * factor + tl.where(e > 0, e * (z - z_q), 0.0)
        total = total * factor + e
        top_q, anchor_q, factor_q, _ = _shift(top_q, z_q)
        total_q = total_q * factor_q + tl.exp(z_q - anchor_q)
    s = tl.sum(total, 0)
    log_total, log_total_q = tl.log(s), tl.log(tl.sum(total_q, 0))
    gap = tl.sum(gaps, 0) / s

    excess = tl.zeros((BLOCK,), tl.float32)
    unshared = tl.zeros((BLOCK,), tl.float32)
    for block in range(0, V, BLOCK):
        columns = block + tl.arange(0, BLOCK)
        z, _ = _logits(x, columns, x_stride, x_bias, into, out_of, V)
        z_q, _ = _logits(q, columns, q_stride, q_bias, into, out_of, V)
        p = tl.exp(z - top - log_total)
        excess += tl.where(p > 0, p * _excess(z - z_q - gap), 0.0)
        unshared += tl.where((p == 0) & (columns < V), tl.exp(z_q - top_q), 0.0)
    # `rest` has the factor exp(mean gap) in its units; a reference without any such column must
    # not meet 0 · inf there.
    rest = tl.sum(unshared, 0)
    rest = tl.where(rest > 0, rest * tl.exp(gap - top + top_q - log_total), 0.0)
    small = tl.sum(excess, 0) + rest
    large = gap - top - log_total + top_q + log_total_q
    kl = tl.where((small < float("inf")) & (large < 0.5), _log1p(small), large)

    t = tl.load(target + row)
    z_t, _ = _logits(x, t, x_stride, x_bias, into, out_of, V)
    q_t, _ = _logits(q, t, q_stride, q_bias, into, out_of, V)
    tl.store(out + LOGP * out_stride, _at_target(z_t, top, log_total, t, V))
    tl.store(out + REF_LOGP * out_stride, _at_target(q_t, top_q, log_total_q, t, V))
    tl.store(out + ENTROPY * out_stride, log_total - tl.sum(weighted, 0) / s)
    tl.store(out + KL * out_stride, tl.where(kl < 0, 0.0, kl))  # maximum() would hide a NaN
    tl.store(out + TOP * out_stride, top)
    tl.store(out + LOG_TOTAL * out_stride, log_total)
    tl.store(out + GAP * out_stride, gap)


@triton.jit(do_not_specialize=SIZES)
def _gradient(
    x, x_inner, x_outer_stride, x_inner_stride, x_stride, x_bias,
    q, q_inner, q_outer_stride, q_inner_stride, q_stride, q_bias,
    target, active, kept, kept_stride, g_logp, g_entropy, g_kl,
    grad, grad_stride, into, out_of, scale,
    V: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dz = p (g_kl d - g_entropy (u - mean u) - g_logp) + g_logp onehot(target), d as above.

    `grad` may be x itself: an element is written after it was read, and by nothing else.
    """
    row = tl.program_id(0).to(tl.int64)
    grad += row * grad_stride
    if active is not None:
        if tl.load(active + row) == 0:
            for block in range(0, V, BLOCK):
                columns = block + tl.arange(0, BLOCK)
                zero = tl.zeros((BLOCK,), grad.dtype.element_ty)
                tl.store(grad + columns, zero, mask=columns < V)
            return
    x = _row(x, row, x_inner, x_outer_stride, x_inner_stride)
    kept += row
    t = tl.load(target + row)
    top, log_total = tl.load(kept + TOP * kept_stride), tl.load(kept + LOG_TOTAL * kept_stride)
    if g_logp is not None:
        a = tl.load(g_logp + row)
    if g_entropy is not None:
        b = tl.load(g_entropy + row)
        mean_u = log_total - tl.load(kept + ENTROPY * kept_stride)
    if g_kl is not None:
        c = tl.load(g_kl + row)
        gap = tl.load(kept + GAP * kept_stride)
        q = _row(q, row, q_inner, q_outer_stride, q_inner_stride)
    for block in range(0, V, BLOCK):
        columns = block + tl.arange(0, BLOCK)
        z, slope = _logits(x, columns, x_stride, x_bias, into, out_of, V)
        u = z - top
        p = tl.exp(u - log_total)
        inner = tl.zeros((BLOCK,), tl.float32)
        if g_logp is not None:
            inner -= a
        if g_entropy is not None:
            inner -= b * (u - mean_u)
        if g_kl is not None:
            z_q, _ = _logits(q, columns, q_stride, q_bias, into, out_of, V)
            inner += c * (z - z_q - gap)
        dz = tl.where(p == 0, 0.0, p * inner)  # u may be -inf there; a NaN p stays one
        if g_logp is not None:
            dz += tl.where(columns == t, a, 0.0)
        dz = (dz * slope * scale).to(grad.dtype.element_ty)
        tl.store(grad + columns, dz, mask=columns < V)


def _layout(x: Tensor) -> tuple[Tensor, int, int, int, int]:
    """A tensor (C, V) or (B, T, V) of any strides, as the kernels take it."""
    y = x if x.dim() == 3 else x[None]
    return y, max(1, y.shape[1]), *y.stride()


def _blocks(v: int, tiles: int) -> dict[str, int]:
    block = min(MAX_BLOCK // tiles, triton.next_power_of_2(v))
    return {"V": v, "BLOCK": block, "num_warps": max(1, min(8, block * tiles // 512))}


def _launch(kernel: Any, x: Tensor, rows: int, tiles: int, *arguments: object) -> None:
    if rows:
        with torch.cuda.device_of(x):  # Triton launches on the current device, whatever x is on
            kernel[(rows,)](*arguments, **_blocks(x.shape[-1], tiles))


def stats(
    x: Tensor,  # (C, V) or (B, T, V) with B·T = C, any strides; any floating dtype but float64
    target: Tensor,  # (C,) int64; out of range gives NaN
    into: float,
    out_of: float | None,
    bias: Tensor | None,  # (V,), times `into`
    out: Tensor,  # (KEPT, C) float32
    active: Tensor | None = None,  # (C,) uint8; rows of 0 are not read, and their stats are 0
) -> None:
    """Fills LOGP, ENTROPY, TOP and LOG_TOTAL of `out`, for the logits

    z = x · into + bias, or, unless `out_of` is None, z = out_of · tanh(x · into + bias).
    """
    _launch(
        _stats, x, len(target), 1,
        *_layout(x), bias, target, active, out, out.stride(0), into, out_of,
    )  # fmt: skip


def stats_kl(
    x: Tensor,
    q: Tensor,  # as x
    target: Tensor,
    into: float,
    out_of: float | None,
    bias: Tensor | None,
    q_bias: Tensor | None,
    out: Tensor,
    active: Tensor | None = None,
) -> None:
    """`stats`, and REF_LOGP, KL and GAP of `out`."""
    _launch(
        _stats_kl, x, len(target), 2,
        *_layout(x), bias, *_layout(q), q_bias, target, active, out, out.stride(0),
        into, out_of,
    )  # fmt: skip


def gradient(
    x: Tensor,
    q: Tensor | None,  # needed with g_kl
    target: Tensor,
    into: float,
    out_of: float | None,
    bias: Tensor | None,
    q_bias: Tensor | None,
    kept: Tensor,  # (KEPT, C) float32, as `stats` or `stats_kl` left it
    derivatives: tuple[Tensor | None, Tensor | None, Tensor | None],  # of logp, entropy, KL: (C,)
    scale: float,  # of the result
    grad: Tensor,  # (C, V) contiguous rows of any floating dtype; may be x
    active: Tensor | None = None,  # rows of 0 are not read, and get a gradient of 0
) -> None:
    """Fills `grad` with `scale` · dz (with a softcap: · 1 - tanh²).

    Its derivative with respect to x is that with `scale` = into · out_of, or into.
    """
    reference = (None, 0, 0, 0, 0) if q is None else _layout(q)
    coefficients = [None if g is None else g.to(torch.float32).contiguous() for g in derivatives]
    _launch(
        _gradient, x, len(target), 1 if q is None else 2,
        *_layout(x), bias, *reference, q_bias, target, active, kept, kept.stride(0),
        *coefficients, grad, grad.stride(0), into, out_of, scale,
    )  # fmt: skip


def _declared(name: str, dtype: str | None, bias: bool = False) -> dict[str, str | None]:
    """What `_layout` and a bias give a kernel; None for what is not given."""
    kinds = [None] * 6
    if dtype is not None:  # a column's stride is 1, which Triton compiles for
        kinds = [dtype, "i32", "i64", "i32", None, "*fp32" if bias else None]
    tails = ("", "_inner", "_outer_stride", "_inner_stride", "_stride", "_bias")
    return {name + tail: kind for tail, kind in zip(tails, kinds, strict=True)}


def compile_cases(capability: int = 90) -> list[Case]:
    """Every kernel on a tile of 1024 rows of each head, and on bfloat16 logits, plain and whole."""
    known = {"target": "*i64", "out": "*fp32", "out_stride": "i32", "into": "fp32", "scale": "fp32"}
    known |= {"kept": "*fp32", "kept_stride": "i32", "g_logp": "*fp32"}
    known |= {"grad": "*bf16", "grad_stride": "i32"}
    optional = {"active": "*u8", "out_of": "fp32", "g_entropy": "*fp32", "g_kl": "*fp32"}
    cases = []
    for model, (_, v) in HEADS.items():
        for dtype, size, whole in (("*fp32", 4, False), ("*fp32", 4, True), ("*bf16", 2, False)):
            for fn, has_q, moved in (
                (_stats, False, size),
                (_stats_kl, True, 4 * size),
                (_gradient, whole, size * (1 + whole) + 2),
            ):
                tuned = _blocks(v, 1 + has_q)
                warps = tuned.pop("num_warps")
                given = known | (optional if whole else {}) | _declared("x", dtype, whole)
                given |= _declared("q", dtype if has_q else None, whole)
                signature = {k: given.get(k) for k in fn.arg_names if k not in tuned}
                present = {k: kind for k, kind in signature.items() if kind is not None}
                absent = dict.fromkeys(signature.keys() - present.keys())
                unit = {"x_stride": 1} | ({"q_stride": 1} if has_q else {})
                cases.append(
                    Case(
                        f"{fn.__name__[1:]} {dtype[1:]} {'whole' if whole else 'plain'} {model}",
                        fn,
                        present,
                        absent | unit | tuned,
                        flops=0.0,
                        bytes=1024.0 * v * moved,
                        num_warps=warps,
                        divisible=tuple(k for k in present if k[-8:] in ("r_stride", "d_stride")),
                    )
                )
    return cases
