"""`meal_fast.ops.sample` in Triton: one program a row, no sort, nothing read back to the host.

    x  a row's logits, as float32    m = max x    e = exp((x - m) / temperature)
    w  e, or 0 where truncation drops the column    u  the row's uniform, of 53 bits

The token is the first at which the running sum of w passes u · Σ w. Sums are float64, so that a
rare token of a large vocabulary keeps its share, and all passes over a row use the same e. A token
with w = 0 cannot be returned.

Truncation is one threshold. Floats in their order are integers in theirs (`order_of`), so the k-th
largest logit, and the logit at which top-p's mass is reached, are found two bits at a time by
counting, or weighing, what lies above three candidates: 16 passes over a row that the level-2 cache
holds. Columns equal to the threshold are taken in order of token id, as many as there is room for.

The code has run in Triton's interpreter and compiles for sm_90; it has never run on a GPU.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cases import HEADS, Case

TILE = 2048
WARPS = 8


@triton.jit
def tile_of(row_ptr, stride, first, V: tl.constexpr, TILE: tl.constexpr):
    """(x, column) of the columns from `first`; x is -inf past the end, and never -0."""
    column = first + tl.arange(0, TILE)
    x = tl.load(row_ptr + column.to(tl.int64) * stride, mask=column < V, other=-float("inf"))
    x = x.to(tl.float32)
    return tl.where(x == 0, 0.0, x), column


@triton.jit
def order_of(x):
    """uint32 in the order of the float32 x; above 0."""
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def float_at(order):
    """The inverse of `order_of`."""
    bits = tl.where(order >= 0x80000000, order & 0x7FFFFFFF, order ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def share_of(x, top, scale):
    """e. The difference comes first: it is 0 at the maximum, and no compiler can fuse the two."""
    return tl.exp((x - top) * scale)


@triton.jit
def threshold(
    row_ptr,
    stride,
    top,
    scale,
    wanted,
    floor,
    MASS: tl.constexpr,
    V: tl.constexpr,
    TILE: tl.constexpr,
):
    """The largest order at or above which lie `wanted` columns, or with MASS a mass of `wanted`.

    What lies at `floor` or below is known to have enough.
    """
    found = floor * 0
    for digit in range(16):
        step = (found * 0 + 1) << (30 - 2 * digit)
        if MASS:
            one = tl.zeros((TILE,), tl.float64)
        else:
            one = tl.zeros((TILE,), tl.int32)
        two = one
        three = one
        for first in range(0, V, TILE):
            x, column = tile_of(row_ptr, stride, first, V, TILE)
            order = tl.where(column < V, order_of(x), 0)
            if MASS:
                value = share_of(x, top, scale).to(tl.float64)
            else:
                value = tl.full((TILE,), 1, tl.int32)
            one += tl.where(order >= found + step, value, 0)
            two += tl.where(order >= found + 2 * step, value, 0)
            three += tl.where(order >= found + 3 * step, value, 0)
        enough = ((found + step <= floor) | (tl.sum(one, 0) >= wanted)).to(tl.uint32)
        enough += ((found + 2 * step <= floor) | (tl.sum(two, 0) >= wanted)).to(tl.uint32)
        enough += ((found + 3 * step <= floor) | (tl.sum(three, 0) >= wanted)).to(tl.uint32)
        found += enough * step
    return found


@triton.jit
def above(row_ptr, stride, top, scale, order, V: tl.constexpr, TILE: tl.constexpr):
    """How many columns lie above `order`, and their mass."""
    count = tl.zeros((TILE,), tl.int32)
    mass = tl.zeros((TILE,), tl.float64)
    for first in range(0, V, TILE):
        x, column = tile_of(row_ptr, stride, first, V, TILE)
        over = (column < V) & (order_of(x) > order)
        count += over.to(tl.int32)
        mass += tl.where(over, share_of(x, top, scale).to(tl.float64), 0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def column_of_tie(row_ptr, stride, order, room, V: tl.constexpr, TILE: tl.constexpr):
    """The column of the `room`-th of those at `order`; V when there are fewer."""
    last = V
    before = room * 0
    for first in range(0, V, TILE):
        x, column = tile_of(row_ptr, stride, first, V, TILE)
        tie = (column < V) & (order_of(x) == order)
        count = tl.sum(tie.to(tl.int32), 0)
        if (before < room) & (before + count >= room):
            rank = before + tl.cumsum(tie.to(tl.int32), 0)
            last = tl.min(tl.where(tie & (rank == room), column, V), 0)
        before += count
    return last


@triton.jit
def weight_of(x, column, top, scale, order, last, min_p, V: tl.constexpr, RANKED: tl.constexpr):
    """w, float64."""
    share = share_of(x, top, scale)
    kept = (column < V) & (share >= min_p)
    if RANKED:
        place = order_of(x)
        kept = kept & ((place > order) | ((place == order) & (column <= last)))
    return tl.where(kept, share, 0.0).to(tl.float64)


@triton.jit
def uniform(seed, row, position):
    """float64 in [0, 1): as `meal_fast.ops.philox.uniform`."""
    high, low, _, _ = tl.philox(
        seed.to(tl.uint64),
        position.to(tl.uint32),
        (position >> 32).to(tl.uint32),
        row.to(tl.uint32),
        (row >> 32).to(tl.uint32),
    )
    return ((high >> 5).to(tl.float64) * 67108864 + (low >> 6).to(tl.float64)) / 9007199254740992


@triton.jit
def find(
    row_ptr,
    stride,
    top,
    scale,
    order,
    last,
    min_p,
    mark,
    V: tl.constexpr,
    TILE: tl.constexpr,
    RANKED: tl.constexpr,
):
    """The first column with w > 0 at which the running sum passes `mark`, or the last with w > 0.

    Summing in another order may move a sum across the mark: then the tile's last such column.
    """
    token = tl.full((), -1, tl.int32)
    carry = mark * 0
    last_kept = tl.full((TILE,), 0, tl.int32)
    first = tl.full((), 0, tl.int32)
    while (first < V) & (token < 0):
        x, column = tile_of(row_ptr, stride, first, V, TILE)
        w = weight_of(x, column, top, scale, order, last, min_p, V, RANKED)
        last_kept = tl.where(w > 0, column, last_kept)
        total = tl.sum(w, 0)
        if carry + total > mark:
            past = (carry + tl.cumsum(w, 0) > mark) & (w > 0)
            token = tl.min(tl.where(past, column, V), 0)
            token = tl.where(token < V, token, tl.max(last_kept, 0))
        carry += total
        first += TILE
    return tl.where(token < 0, tl.max(last_kept, 0), token)


@triton.jit(do_not_specialize=["seed", "top_k", "top_p_bits"])
def sample_kernel(
    token_ptr,
    logp_ptr,
    truncated_ptr,
    logits_ptr,
    row_ptr,
    position_ptr,
    row_stride,
    stride,
    seed,
    scale,
    top_k,
    top_p_bits,
    min_p,
    GREEDY: tl.constexpr,
    WITH_K: tl.constexpr,
    WITH_P: tl.constexpr,
    WITH_MIN: tl.constexpr,
    V: tl.constexpr,
    TILE: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    logits_ptr += program * row_stride
    highest = tl.full((TILE,), -float("inf"), tl.float32)
    for first in range(0, V, TILE):
        x, column = tile_of(logits_ptr, stride, first, V, TILE)
        highest = tl.maximum(highest, x)
    top = tl.max(highest, 0)
    mass = tl.zeros((TILE,), tl.float64)
    argmax = tl.full((TILE,), V - 1, tl.int32)
    for first in range(0, V, TILE):
        x, column = tile_of(logits_ptr, stride, first, V, TILE)
        mass += tl.where(column < V, share_of(x, top, scale), 0.0).to(tl.float64)
        if GREEDY:
            argmax = tl.where((x == top) & (column < argmax), column, argmax)
    full = tl.sum(mass, 0)
    kept = full
    if GREEDY:
        token = tl.min(argmax, 0)
    else:
        order = tl.full((), 0, tl.uint32)
        last = V
        if WITH_K:
            order = threshold(logits_ptr, stride, top, scale, top_k, order, False, V, TILE)
            count, over = above(logits_ptr, stride, top, scale, order, V, TILE)
            room = top_k - count
            kept = over + room * share_of(float_at(order), top, scale).to(tl.float64)
        if WITH_P:
            wanted = top_p_bits.to(tl.float64, bitcast=True) * kept
            floor = order
            order = threshold(logits_ptr, stride, top, scale, wanted, floor, True, V, TILE)
            count, over = above(logits_ptr, stride, top, scale, order, V, TILE)
            # A tie is kept while the mass before it is short of what is wanted.
            share = share_of(float_at(order), top, scale).to(tl.float64)
            ties = tl.maximum(tl.ceil((wanted - over) / share), 1.0)
            ties = tl.minimum(ties, V * 1.0).to(tl.int32)
            if WITH_K:
                ties = tl.where(order == floor, tl.minimum(ties, room), ties)
            room = ties
        if WITH_K or WITH_P:
            last = column_of_tie(logits_ptr, stride, order, room, V, TILE)
        if WITH_K or WITH_P or WITH_MIN:
            mass = tl.zeros((TILE,), tl.float64)
            for first in range(0, V, TILE):
                x, column = tile_of(logits_ptr, stride, first, V, TILE)
                mass += weight_of(x, column, top, scale, order, last, min_p, V, WITH_K or WITH_P)
            kept = tl.sum(mass, 0)
        u = uniform(seed, tl.load(row_ptr + program), tl.load(position_ptr + program))
        token = find(
            logits_ptr,
            stride,
            top,
            scale,
            order,
            last,
            min_p,
            u * kept,
            V,
            TILE,
            WITH_K or WITH_P,
        )
    x = tl.load(logits_ptr + token.to(tl.int64) * stride).to(tl.float32)
    gap = ((x - top) * scale).to(tl.float64)
    logp = (gap - tl.log(full)).to(tl.float32)
    truncated = logp - logp  # NaN where the row is no distribution
    if not GREEDY:
        truncated = tl.where(truncated == 0, (gap - tl.log(kept)).to(tl.float32), truncated)
    tl.store(token_ptr + program, token.to(tl.int64))
    tl.store(logp_ptr + program, logp)
    tl.store(truncated_ptr + program, truncated)


def sample(
    logits: Tensor,  # (R, V) of any strides
    seed: int,
    row: Tensor,  # (R,) int64
    position: Tensor,  # (R,) int64
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(token, logp, truncated_logp), each (R,), of arguments that `meal_fast.ops` has checked."""
    r, v = logits.shape
    token = torch.empty(r, dtype=torch.int64, device=logits.device)
    logp, truncated = (logits.new_empty(r, dtype=torch.float32) for _ in range(2))
    if r:
        with torch.cuda.device_of(logits):  # Triton launches on the current device
            sample_kernel[(r,)](
                token,
                logp,
                truncated,
                logits,
                row.contiguous(),
                position.contiguous(),
                logits.stride(0),
                logits.stride(1),
                (seed + 2**63) % 2**64 - 2**63,
                1 / temperature if temperature else 1.0,
                min(top_k, v),
                # Triton would round a float to float32, and a tie more would be in or out.
                struct.unpack("q", struct.pack("d", top_p))[0],
                min_p,
                GREEDY=temperature == 0,
                WITH_K=top_k > 0,
                WITH_P=top_p < 1,
                WITH_MIN=min_p > 0,
                V=v,
                TILE=min(TILE, max(16, triton.next_power_of_2(v))),
                num_warps=WARPS,
            )
    return token, logp, truncated


def compile_cases(capability: int = 90) -> list[Case]:
    """256 rows of each vocabulary, as they are and greedily; and of one all ways to truncate."""
    rows = 256
    given = {
        name: {"GREEDY": name == "greedy"} | {f"WITH_{x}": x in name for x in ("K", "P", "MIN")}
        for name in ("all", "greedy", "K", "P", "MIN", "K P MIN")
    }
    pointers = {"token_ptr": "*i64", "logp_ptr": "*fp32", "truncated_ptr": "*fp32"}
    pointers |= {"logits_ptr": "*fp32", "row_ptr": "*i64", "position_ptr": "*i64"}
    numbers = {"row_stride": "i64", "seed": "i64", "scale": "fp32", "top_k": "i32"}
    numbers |= {"top_p_bits": "i64", "min_p": "fp32"}
    cases = []
    for model, (_, v) in HEADS.items():
        for name, flags in given.items():
            if model != "Qwen2-0.5B" and name not in ("all", "greedy"):
                continue
            fixed = {**flags, "stride": 1, "V": v, "TILE": TILE}
            cases.append(
                Case(
                    f"sample_kernel {model} {name}",
                    sample_kernel,
                    pointers | numbers,
                    fixed,
                    0.0,
                    rows * v * 4.0,
                    num_warps=WARPS,
                    divisible=("row_stride",),
                )
            )
    return cases
