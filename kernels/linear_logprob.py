"""Log-probability and entropy from hidden states, with no tile of logits in memory: forward only.

    N  tokens    D  hidden width    V  vocabulary    S  parts that the vocabulary is split into

Each program multiplies a block of tokens with the columns of one part of the vocabulary, a tile at
a time, and keeps four numbers a token while the tile is in registers: the largest logit, the sum of
exponentials, their first moment, and the target's logit. A second kernel merges the parts.

Operands come through the tensor memory accelerator (host-made descriptors, whose addresses are
64 bits wide) and sums are float32 on the tensor cores.

Compiled ahead of time and run in Triton's interpreter; never run on a GPU. The public op
`meal_fast.ops.linear_logprob` works in chunks of rows, and uses this with impl="fused" alone until
both have been measured on a card.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from meal_fast.ops import checks, dispatch

from .cases import HEADS, Case

# What a part leaves behind for each token: partial[part, these], all to base 2.
TOP, TOTAL, MOMENT, PICKED = (tl.constexpr(i) for i in range(4))
KEPT = 4
LN2 = tl.constexpr(math.log(2))
MERGE_ROWS, MERGE_PARTS = 32, 32


@triton.jit
def _fade(top, new_top):
    """(2^(top - new_top), top - new_top), for a running sum whose largest term was 2^top.

    Nothing has been summed where top is -inf; there -inf - -inf would be NaN.
    """
    empty = top == -float("inf")
    drop = tl.where(empty, 0.0, top - new_top)
    return tl.where(empty, 0.0, tl.exp2(drop)), drop


# Sizes that change with every batch: no variant of the kernel for those that are 1 or round.
SIZES = ["part_stride", "n", "parts", "tiles_per_part"]


@triton.jit(do_not_specialize=SIZES)
def _parts_kernel(
    hidden,  # descriptor of (N, D), blocks (BLOCK_N, BLOCK_D)
    weight,  # descriptor of (V, D), blocks (BLOCK_V, BLOCK_D)
    bias,  # (V,) or None
    target,  # (N,) int64
    partial,  # (S, KEPT, N) float32
    part_stride,
    n,
    parts,
    tiles_per_part,
    inverse_softcap,  # or None
    scale,
    D: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    # Programs that run at the same time form a patch of GROUP row blocks by some parts, so that
    # what they read of either operand is shared in the second-level cache.
    row_blocks = tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0)
    first_block = program // (GROUP * parts) * GROUP
    height = tl.minimum(row_blocks - first_block, GROUP)
    within = program % (GROUP * parts)
    first_row = (first_block + within % height) * BLOCK_N
    part = within // height

    rows = first_row + tl.arange(0, BLOCK_N)
    live = rows < n
    wanted = tl.load(target + rows, mask=live, other=-1)
    # In 32 bits the comparison below is one instruction; -1 is no column.
    wanted = tl.where((wanted >= 0) & (wanted < V), wanted, -1).to(tl.int32)

    # z and `picked` are still to be multiplied by `scale`, which is positive; `top` is not.
    top = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    moment = tl.zeros((BLOCK_N,), tl.float32)
    picked = tl.zeros((BLOCK_N,), tl.float32)

    first_tile = part * tiles_per_part
    last_tile = tl.minimum(first_tile + tiles_per_part, tl.cdiv(V, BLOCK_V))
    for tile in tl.range(first_tile, last_tile, flatten=True):
        first_column = tile * BLOCK_V
        z = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for k in tl.range(0, D, BLOCK_D):
            a = hidden.load([first_row, k])
            b = weight.load([first_column, k])
            z = tl.dot(a, b.T, z)

        columns = first_column + tl.arange(0, BLOCK_V)
        if bias is not None:
            z += tl.load(bias + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
        if inverse_softcap is not None:
            # exp of a negative number cannot overflow, whatever the logit.
            shrunk = tl.exp(tl.abs(z) * inverse_softcap * -2.0)
            bent = (1.0 - shrunk) / (1.0 + shrunk)
            z = tl.where(z < 0.0, -bent, bent)
        if V % BLOCK_V != 0:
            z = tl.where(columns[None, :] < V, z, -float("inf"))

        hit = tl.arange(0, BLOCK_V)[None, :] == (wanted - first_column)[:, None]
        picked += tl.sum(tl.where(hit, z, 0.0), 1)
        new_top = tl.maximum(top, tl.max(z, 1) * scale)
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        d = tl.fma(z, scale, -shift[:, None])
        p = tl.exp2(d)
        fade, drop = _fade(top, shift)
        # exp2(-200) is 0 already: the bound only keeps 0 * -inf out of the moment.
        moment = fade * (moment + total * drop) + tl.sum(p * tl.maximum(d, -200.0), 1)
        total = fade * total + tl.sum(p, 1)
        top = new_top

    n_64 = n.to(tl.int64)
    out = partial + part.to(tl.int64) * part_stride + rows
    tl.store(out + TOP * n_64, top, mask=live)
    tl.store(out + TOTAL * n_64, total, mask=live)
    tl.store(out + MOMENT * n_64, moment, mask=live)
    tl.store(out + PICKED * n_64, picked, mask=live)


@triton.jit(do_not_specialize=SIZES[:3])
def _merge_kernel(
    partial,  # (S, KEPT, N) float32
    target,  # (N,) int64
    logp,  # (N,) float32
    entropy,  # (N,) float32
    part_stride,
    n,
    parts,
    scale,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = rows < n
    n_64 = n.to(tl.int64)

    top = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    moment = tl.zeros((BLOCK_N,), tl.float32)
    picked = tl.zeros((BLOCK_N,), tl.float32)
    for first in tl.range(0, parts, BLOCK_S):
        part = first + tl.arange(0, BLOCK_S)
        there = (part < parts)[:, None] & live[None, :]
        at = partial + part.to(tl.int64)[:, None] * part_stride + rows[None, :]
        tops = tl.load(at + TOP * n_64, mask=there, other=-float("inf"))
        totals = tl.load(at + TOTAL * n_64, mask=there, other=0.0)
        moments = tl.load(at + MOMENT * n_64, mask=there, other=0.0)
        picked += tl.sum(tl.load(at + PICKED * n_64, mask=there, other=0.0), 0)

        new_top = tl.maximum(top, tl.max(tops, 0))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        fade, drop = _fade(top, shift)
        fades, drops = _fade(tops, shift[None, :])
        moment = fade * (moment + total * drop) + tl.sum(fades * (moments + totals * drops), 0)
        total = fade * total + tl.sum(fades * totals, 0)
        top = new_top

    wanted = tl.load(target + rows, mask=live, other=-1)
    inside = (wanted >= 0) & (wanted < V)
    log_total = tl.log(total)
    # The same fused product as in the sum: at the largest logit the difference is exactly 0.
    value = tl.fma(picked, scale, -top) * LN2 - log_total
    tl.store(logp + rows, tl.where(inside, value, float("nan")), mask=live)
    tl.store(entropy + rows, log_total - moment / total * LN2, mask=live)


@dataclass(frozen=True)
class Tiling:
    """Sizes of a tile, and how Triton compiles for them."""

    tokens: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    per_sm: int  # programs that a multiprocessor holds at once

    def constexprs(self, d: int, v: int) -> dict[str, int]:
        blocks = {"BLOCK_N": self.tokens, "BLOCK_V": self.columns, "BLOCK_D": self.depth}
        return {"D": d, "V": v, "GROUP": GROUP} | blocks


# A wide model's tile does most arithmetic per byte; its epilogue is short beside the product.
WIDE = Tiling(128, 256, 64, num_warps=8, num_stages=4, per_sm=1)
# A narrow model's epilogue is a fifth of the work: two programs overlap, one multiplying while the
# other exponentiates. It also fits the shared memory of GPUs other than the H100 and B200 kinds.
NARROW = Tiling(128, 128, 64, num_warps=4, num_stages=3, per_sm=2)
# Few tokens: reading the weight is all the work, so the tile has rows for no more.
FEW = Tiling(64, 128, 64, num_warps=4, num_stages=4, per_sm=2)

GROUP = 8  # row blocks that run side by side
MAX_PARTS = 256


def tiling(n: int, d: int, capability: int = 90) -> Tiling:
    """The tile for N tokens of width D on a GPU of this compute capability."""
    if n <= FEW.tokens:
        return FEW
    return WIDE if d >= 2048 and capability in (90, 100, 103) else NARROW


@functools.lru_cache(maxsize=1024)
def tiles_per_part(n: int, v: int, tile: Tiling, multiprocessors: int) -> int:
    """How many tiles of the vocabulary one program walks: what finishes first.

    Time is counted in tiles: waves of programs, times a program's tiles and one more for filling
    and draining its pipeline. Of equals, the fewest parts.
    """
    tiles, row_blocks = math.ceil(v / tile.columns), math.ceil(n / tile.tokens)
    slots = multiprocessors * tile.per_sm

    def time(parts: int) -> int:
        return math.ceil(row_blocks * parts / slots) * (math.ceil(tiles / parts) + 1)

    # With far fewer parts than this, more row blocks run at once than the cache can keep.
    most = min(tiles, MAX_PARTS)
    least = max(1, min(most, slots // (2 * min(row_blocks, GROUP))))
    return math.ceil(tiles / min(range(least, most + 1), key=time))


def _for_tma(x: Tensor) -> Tensor:
    """`x` (A, B), or a copy of it that a descriptor can describe: rows at multiples of 16 bytes."""
    row_bytes = x.stride(0) * x.element_size()
    aligned = x.data_ptr() % 16 == 0 and row_bytes % 16 == 0 and x.stride(0) >= x.shape[1]
    if aligned and x.stride(1) == 1:
        return x
    per_16 = 16 // x.element_size()
    padded = x.new_empty(x.shape[0], math.ceil(x.shape[1] / per_16) * per_16)
    return padded[:, : x.shape[1]].copy_(x)


def linear_logprob_forward(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    bias: Tensor | None = None,  # (V,)
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and entropy; without gradients, and without any logits kept.

    z = c·tanh((hidden @ weightᵀ + bias) / c) / temperature (without `softcap` c: no tanh),
    logp = z_target - log Σ exp z, entropy = -Σ p log p with p = softmax(z). [P]

    Args:
        hidden, weight: the same dtype, bfloat16 or float16 (in the interpreter also float32). One
            whose rows are not at multiples of 16 bytes is copied.
        target: a row whose target is outside [0, V) has a logp of NaN.
        bias: any floating dtype; -inf takes a column out of the vocabulary.

    Returns:
        logp and entropy, (N,) float32. Extra memory: 16 bytes a token and part; at most 256 parts,
        a few dozen for thousands of tokens.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit; no GPU and no interpreter.
    """
    checks.positive("temperature", temperature)
    if softcap is not None:
        checks.positive("softcap", softcap)
    _check(hidden, weight, target, bias)
    n, d, v = *hidden.shape, weight.shape[0]
    logp = torch.empty(n, dtype=torch.float32, device=hidden.device)
    entropy = torch.empty_like(logp)
    if n == 0:
        return logp, entropy
    multiprocessors, capability = 1, 90
    if hidden.is_cuda:
        gpu = torch.cuda.get_device_properties(hidden.device)
        multiprocessors, capability = gpu.multi_processor_count, 10 * gpu.major + gpu.minor
    elif hidden.dtype == torch.bfloat16:
        # The interpreter multiplies bfloat16 bit patterns; widening changes no value.
        hidden, weight = hidden.float(), weight.float()
    tile = tiling(n, d, capability)
    per_part = tiles_per_part(n, v, tile, multiprocessors)
    parts = math.ceil(v / (tile.columns * per_part))
    partial = torch.empty(parts, KEPT, n, dtype=torch.float32, device=hidden.device)
    readout = (temperature, softcap, None if bias is None else bias.detach().contiguous())
    operands = (_for_tma(hidden.detach()), _for_tma(weight.detach()), target.long().contiguous())
    with torch.cuda.device_of(hidden):
        _launch(*operands, *readout, tile, per_part, partial, logp, entropy)
    return logp, entropy


def _check(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    narrow = (torch.bfloat16, torch.float16)
    dtypes = narrow if hidden.is_cuda else (*narrow, torch.float32)
    for name, tensor, least in (("hidden", hidden, 0), ("weight", weight, 1)):
        shape = tuple(tensor.shape)
        fits = len(shape) == 2 and shape[0] >= least and shape[1] >= 1
        checks.require(fits, f"{name}.shape", shape, f"must be ({least} or more rows, width)")
        remedy = "cast it to bfloat16, or use the op in chunks"
        checks.require(tensor.dtype in dtypes, f"{name}.dtype", tensor.dtype, remedy)
    checks.shape("weight", weight, (weight.shape[0], hidden.shape[1]))
    remedy = f"must be hidden's, {hidden.dtype}"
    checks.require(weight.dtype == hidden.dtype, "weight.dtype", weight.dtype, remedy)
    checks.shape("target", target, (hidden.shape[0],))
    checks.integer("target", target)
    if bias is not None:
        checks.shape("bias", bias, (weight.shape[0],))
        checks.floating("bias", bias)
    checks.same_device("hidden", hidden, weight=weight, target=target, bias=bias)
    obstacle = dispatch.triton_obstacle(hidden, weight, bias)
    if obstacle is not None:
        raise ValueError(f"hidden: on {hidden.device}; the fused product {obstacle}")


def _launch(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float,
    softcap: float | None,
    bias: Tensor | None,
    tile: Tiling,
    per_part: int,
    partial: Tensor,  # (S, KEPT, N) float32, each part contiguous
    logp: Tensor,
    entropy: Tensor,
) -> None:
    n, d, v, parts = *hidden.shape, weight.shape[0], partial.shape[0]
    sizes = (partial.stride(0), n, parts)
    inverse_softcap = None if softcap is None else 1 / softcap
    scale = (1 if softcap is None else softcap) / (temperature * math.log(2))
    a = TensorDescriptor.from_tensor(hidden, [tile.tokens, tile.depth])
    b = TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth])
    arguments = (a, b, bias, target, partial, *sizes, per_part, inverse_softcap, scale)
    _parts_kernel[(math.ceil(n / tile.tokens) * parts,)](
        *arguments, **tile.constexprs(d, v), num_warps=tile.num_warps, num_stages=tile.num_stages
    )
    arguments = (partial, target, logp, entropy, *sizes, scale)
    _merge_kernel[(math.ceil(n / MERGE_ROWS),)](
        *arguments, V=v, BLOCK_N=MERGE_ROWS, BLOCK_S=MERGE_PARTS
    )


# --- what `make sass` compiles -----------------------------------------------------------------


def compile_cases(capability: int = 90) -> list[Case]:
    """Every tile that `tiling` chooses for the models in HEADS, and heads that are not round."""
    cases = []
    for model, (d, v) in HEADS.items():
        for n in (64, 8192):
            cases.append(_parts_case(f"linear parts {model} N={n}", n, d, v, capability))
    for d, v in ((768, 50_257), (4096, 128_259)):
        name = f"linear parts D={d} V={v} N=8192 bias softcap"
        cases.append(_parts_case(name, 8192, d, v, capability, options=True))
    n, parts = 8192, 32
    signature = dict.fromkeys(("partial", "logp", "entropy"), "*fp32")
    signature |= {"target": "*i64", "scale": "fp32"} | dict.fromkeys(SIZES[:3], "i32")
    constexprs = {"V": 128_256, "BLOCK_N": MERGE_ROWS, "BLOCK_S": MERGE_PARTS}
    moved = 4 * n * (KEPT * parts + 4)
    return [*cases, Case(f"linear merge N={n}", _merge_kernel, signature, constexprs, 0, moved)]


def _parts_case(name: str, n: int, d: int, v: int, capability: int, options=False) -> Case:
    tile = tiling(n, d, capability)
    parts = math.ceil(v / (tile.columns * tiles_per_part(n, v, tile, 132)))
    signature = {
        "hidden": f"tensordesc<bf16[{tile.tokens}, {tile.depth}]>",
        "weight": f"tensordesc<bf16[{tile.columns}, {tile.depth}]>",
        "target": "*i64",
        "partial": "*fp32",
        "scale": "fp32",
    } | dict.fromkeys(SIZES, "i32")
    given = {"bias": "*bf16", "inverse_softcap": "fp32"} if options else {}
    return Case(
        name,
        _parts_kernel,
        signature | given,
        tile.constexprs(d, v),
        flops=2.0 * n * v * d,
        bytes=2.0 * (n + v) * d + 4.0 * KEPT * parts * n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        matrix=True,
    )
