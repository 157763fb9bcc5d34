"""`meal_fast.ops.prefix_attention` in Triton: decode attention over shared prefixes.

    R  rows    B  prefixes    H  key heads    rep  query heads a key head    S  parts of a prefix

A first kernel takes the rows behind one prefix, rep query heads each, as the rows of a tile: one
product of tensor cores with a part of the prefix's single copy. It leaves the largest score, the
sum of exponentials and the weighted values of each row, in float32. A second kernel, a program for
each row and key head, merges a row's parts and goes on through the row's own tail.

The grid comes from shapes alone and nothing is read back to the host: which rows lie behind which
prefix is looked up on the device. The groups' tiles are at most as many as groups with rows and
full tiles together; programs beyond the last find nothing to do. So a step can be captured as a
CUDA graph, with other groups and lengths at every replay.

Compiled ahead of time and run in Triton's interpreter; never run on a GPU.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from meal_fast.ops.prefix_attention import Groups

from .cases import Case

TILE = 64  # rows of a tile: what a warp group's product has at the least
BLOCK = 64  # tokens at a time
MAX_PARTS = 64


@triton.jit
def _attend(q, k, v, seen, top, total, acc, scale, PRECISION: tl.constexpr):
    """One block of keys more: (top, total, acc). `scale` is to base 2.

    `top` is -inf while nothing was seen; there -inf - -inf would be NaN.
    """
    z = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    z = tl.where(seen[None, :], z, -float("inf"))
    new_top = tl.maximum(top, tl.max(z, 1))
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    p = tl.exp2(z - shift[:, None])
    fade = tl.exp2(top - shift)
    total = fade * total + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, fade[:, None] * acc, input_precision=PRECISION)
    return new_top, total, acc


# Sizes that change from call to call: no variant of a kernel for those that are 1 or round.
@triton.jit(do_not_specialize=["b", "rows", "capacity", "blocks_per_part"])
def _prefix_kernel(
    query,  # (R, Hq, d)
    key,  # (B, H, P, d)
    value,
    prefix_length,  # (B,) int64
    order,  # (R,) int64, rows in the order of their groups
    offset,  # (B + 1,) int64, where each group begins in it
    tops,  # (S, R, Hq) float32
    totals,  # (S, R, Hq) float32
    weighted,  # (S, R, Hq, d) float32
    q_row,
    q_head,
    k_prefix,
    k_head,
    k_token,
    v_prefix,
    v_head,
    v_token,
    scale,
    b,
    rows,
    capacity,
    blocks_per_part,
    HEADS: tl.constexpr,
    REP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    slot = tl.program_id(0)
    head = tl.program_id(1)
    part = tl.program_id(2)

    # The slot-th tile of all groups: the group is the first whose tiles, with all before, pass it.
    g = tl.arange(0, BLOCK_B)
    begins = tl.load(offset + g, mask=g < b, other=0)
    ends = tl.load(offset + g + 1, mask=g < b, other=0)
    tiles = (((ends - begins) * REP + TILE - 1) // TILE).to(tl.int32)
    before = tl.cumsum(tiles, 0) - tiles
    mine = (before <= slot) & (slot < before + tiles)
    # No group has it: the tiles are fewer than the slots.
    if tl.sum(mine.to(tl.int32), 0) > 0:
        group = tl.sum(tl.where(mine, g, 0), 0).to(tl.int64)
        begin = tl.sum(tl.where(mine, begins, 0), 0)
        end = tl.sum(tl.where(mine, ends, 0), 0)
        first = (slot - tl.sum(tl.where(mine, before, 0), 0)) * TILE

        flat = first + tl.arange(0, TILE)
        place = begin + flat // REP
        live = place < end
        row = tl.load(order + place, mask=live, other=0)
        q_at = (head * REP + flat % REP).to(tl.int64)
        d = tl.arange(0, BLOCK_D)
        at = query + row[:, None] * q_row + q_at[:, None] * q_head + d[None, :]
        q = tl.load(at, mask=live[:, None] & (d < D)[None, :], other=0.0)

        top = tl.full((TILE,), -float("inf"), tl.float32)
        total = tl.zeros((TILE,), tl.float32)
        acc = tl.zeros((TILE, BLOCK_D), tl.float32)
        k_base = key + group * k_prefix + head.to(tl.int64) * k_head
        v_base = value + group * v_prefix + head.to(tl.int64) * v_head
        length = tl.minimum(tl.load(prefix_length + group), capacity).to(tl.int32)
        from_token = part * blocks_per_part * BLOCK_P
        to_token = tl.minimum(from_token + blocks_per_part * BLOCK_P, length)
        for start in tl.range(from_token, to_token, BLOCK_P):
            token = start + tl.arange(0, BLOCK_P)
            seen = token < length
            there = seen[:, None] & (d < D)[None, :]
            token_64 = token.to(tl.int64)[:, None]
            k = tl.load(k_base + token_64 * k_token + d[None, :], mask=there, other=0.0)
            v = tl.load(v_base + token_64 * v_token + d[None, :], mask=there, other=0.0)
            top, total, acc = _attend(q, k, v, seen, top, total, acc, scale, PRECISION)

        out = (part.to(tl.int64) * rows + row) * (HEADS * REP) + q_at
        tl.store(tops + out, top, mask=live)
        tl.store(totals + out, total, mask=live)
        # Where nothing was seen the merge reads no more than that.
        kept = (live & (top > -float("inf")))[:, None] & (d < D)[None, :]
        tl.store(weighted + out[:, None] * D + d[None, :], acc, mask=kept)


@triton.jit(do_not_specialize=["b", "parts", "prefix_capacity", "capacity"])
def _tail_kernel(
    query,  # (R, Hq, d)
    key,  # (R, H, T, d)
    value,
    tail_length,  # (R,) int64
    prefix_length,  # (B,) int64
    group,  # (R,) int64
    tops,  # (S, R, Hq) float32
    totals,
    weighted,  # (S, R, Hq, d) float32
    out,  # (R, Hq, d), contiguous
    q_row,
    q_head,
    k_row,
    k_head,
    k_token,
    v_row,
    v_head,
    v_token,
    scale,
    b,
    parts,
    prefix_capacity,
    capacity,
    HEADS: tl.constexpr,
    REP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    live = m < REP
    q_at = (head * REP + m).to(tl.int64)
    inside = live[:, None] & (d < D)[None, :]

    # A group or a length out of range: the row is NaN, and nothing is read by it.
    g = tl.load(group + row)
    known = (g >= 0) & (g < b)
    prefix = tl.load(prefix_length + tl.where(known, g, 0), mask=known, other=-1)
    length = tl.load(tail_length + row)
    sound = (prefix >= 0) & (prefix <= prefix_capacity) & (length >= 0) & (length <= capacity)

    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    at = row * (HEADS * REP) + q_at
    for _ in tl.range(0, parts):
        from_part = tl.load(tops + at, mask=live & sound, other=-float("inf"))
        seen = from_part > -float("inf")
        more = tl.load(totals + at, mask=seen, other=0.0)
        values_at = weighted + at[:, None] * D + d[None, :]
        values = tl.load(values_at, mask=seen[:, None] & (d < D)[None, :], other=0.0)
        new_top = tl.maximum(top, from_part)
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        fade = tl.exp2(top - shift)
        grow = tl.exp2(from_part - shift)
        total = fade * total + grow * more
        acc = fade[:, None] * acc + grow[:, None] * values
        top = new_top
        at += tl.num_programs(0) * (HEADS * REP)

    at = query + row * q_row + q_at[:, None] * q_head + d[None, :]
    q = tl.load(at, mask=inside, other=0.0)
    k_base = key + row * k_row + head.to(tl.int64) * k_head
    v_base = value + row * v_row + head.to(tl.int64) * v_head
    to_token = tl.where(sound, length, 0).to(tl.int32)
    for start in tl.range(0, to_token, BLOCK_T):
        token = start + tl.arange(0, BLOCK_T)
        seen = token < to_token
        there = seen[:, None] & (d < D)[None, :]
        token_64 = token.to(tl.int64)[:, None]
        k = tl.load(k_base + token_64 * k_token + d[None, :], mask=there, other=0.0)
        v = tl.load(v_base + token_64 * v_token + d[None, :], mask=there, other=0.0)
        top, total, acc = _attend(q, k, v, seen, top, total, acc, scale, PRECISION)

    # 0 / 0 where nothing was seen: NaN, as documented.
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    out_at = out + (row * (HEADS * REP) + q_at[:, None]) * D + d[None, :]
    tl.store(out_at, result, mask=inside)


def blocks_per_part(slots: int, heads: int, blocks: int, multiprocessors: int) -> int:
    """How many blocks of a prefix one program walks: enough programs to keep a GPU's memory busy.

    Two programs a multiprocessor; more parts only add partial sums to write and to read.
    """
    parts = math.ceil(2 * multiprocessors / max(1, slots * heads))
    return math.ceil(blocks / max(1, min(parts, blocks, MAX_PARTS)))


def _width(d: int) -> int:
    """The side of a tile that holds `d`."""
    return max(16, triton.next_power_of_2(d))


def _tiling(d: int, itemsize: int) -> tuple[int, dict[str, int]]:
    """Tokens of a block, and how Triton compiles the prefix's kernel: what fits, with no spill.

    Float32 products go through the ordinary multipliers, which keep more in registers.
    """
    bytes_a_token = _width(d) * itemsize
    wide = itemsize == 4 or bytes_a_token > 256
    options = {"num_warps": 8 if wide else 4, "num_stages": 3 if bytes_a_token <= 256 else 2}
    return (BLOCK if itemsize == 2 else max(16, BLOCK // 2)), options


def prefix_attention_forward(
    query: Tensor,  # (R, Hq, d)
    prefix_key: Tensor,  # (B, H, P, d)
    prefix_value: Tensor,
    prefix_length: Tensor,  # (B,) int64
    groups: Groups,
    tail_key: Tensor,  # (R, H, T, d)
    tail_value: Tensor,
    tail_length: Tensor,  # (R,) int64
    scale: float,
) -> Tensor:
    """As `meal_fast.ops.prefix_attention`, which has checked the arguments. (R, Hq, d)."""
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    (r, hq, d), (b, h, p, _), t = query.shape, prefix_key.shape, tail_key.shape[2]
    if r == 0:
        return out
    multiprocessors = 1
    if query.is_cuda:
        multiprocessors = torch.cuda.get_device_properties(query.device).multi_processor_count
    given = (query, prefix_key, prefix_value, tail_key, tail_value)
    if not query.is_cuda and query.dtype == torch.bfloat16:
        # The interpreter multiplies bfloat16 bit patterns; widening changes no value.
        given = tuple(x.float() for x in given)
    # A token's numbers lie side by side in every cache; the rest may have any strides.
    q, pk, pv, tk, tv = (x if x.stride(-1) == 1 else x.contiguous() for x in given)
    rep = hq // h
    slots = min(b, r) + r * rep // TILE
    block, options = _tiling(d, q.element_size())
    blocks = math.ceil(p / block)
    per_part = blocks_per_part(slots, h, blocks, multiprocessors)
    parts = math.ceil(blocks / max(1, per_part))
    partial = torch.empty(parts, r, hq, d + 2, dtype=torch.float32, device=query.device).view(-1)
    tops, totals, weighted = partial.split([parts * r * hq, parts * r * hq, parts * r * hq * d])
    to_base_2 = scale / math.log(2)
    fixed = {
        "HEADS": h,
        "REP": rep,
        "D": d,
        "BLOCK_D": _width(d),
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",  # of float32 products alone
    }
    with torch.cuda.device_of(query):  # Triton launches on the current device
        if parts:
            _prefix_kernel[(slots, h, parts)](
                q, pk, pv, prefix_length.contiguous(), groups.order_R, groups.offset,
                tops, totals, weighted, *q.stride()[:2], *pk.stride()[:3], *pv.stride()[:3],
                to_base_2, b, r, p, per_part, **fixed, BLOCK_B=_width(b),
                TILE=TILE, BLOCK_P=block, **options,
            )  # fmt: skip
        _tail_kernel[(r, h)](
            q, tk, tv, tail_length.contiguous(), prefix_length.contiguous(), groups.group_R,
            tops, totals, weighted, out, *q.stride()[:2], *tk.stride()[:3], *tv.stride()[:3],
            to_base_2, b, parts, p, t, **fixed, BLOCK_M=_width(rep), BLOCK_T=block,
            num_warps=4, num_stages=2,
        )  # fmt: skip
    return out


# --- what `make sass` compiles -----------------------------------------------------------------
# Query heads, key heads and width of a head.
ATTENTIONS = {
    "SmolLM2-135M": (9, 3, 64),
    "Qwen2-0.5B": (14, 2, 64),
    "Gemma-2B": (8, 1, 256),
    "Llama-3-8B": (32, 8, 128),
}


def compile_cases(capability: int = 90) -> list[Case]:
    """256 rows behind 32 prompts of 512 tokens, 256 tokens of their own each."""
    cases = [case for model in ATTENTIONS for case in _cases_of(model, "bf16")]
    return [*cases, *_cases_of("SmolLM2-135M", "fp32")]


def _cases_of(model: str, dtype: str) -> list[Case]:
    (hq, h, d), r, b, p, t = ATTENTIONS[model], 256, 32, 512, 256
    rep, itemsize = hq // h, 2 if dtype == "bf16" else 4
    block, options = _tiling(d, itemsize)
    slots = min(b, r) + r * rep // TILE
    parts = math.ceil(p / block / blocks_per_part(slots, h, math.ceil(p / block), 132))
    partial = 4.0 * parts * r * hq * (d + 2)
    floats = {"scale": "fp32"} | dict.fromkeys(("tops", "totals", "weighted"), "*fp32")
    caches = dict.fromkeys(("query", "key", "value"), f"*{dtype}")
    precision = "tf32" if dtype == "bf16" else "ieee"
    fixed = {"HEADS": h, "REP": rep, "D": d, "BLOCK_D": _width(d), "PRECISION": precision}

    def signature(fn: Any, indices: tuple[str, ...]) -> tuple[dict[str, str], tuple[str, ...]]:
        pointers = floats | caches | dict.fromkeys(indices, "*i64")
        if fn is _tail_kernel:
            pointers["out"] = f"*{dtype}"
        numbers = [n for n in fn.arg_names if n.islower() and n not in pointers]
        strides = tuple(n for n in numbers if n[:2] in ("q_", "k_", "v_"))
        return pointers | dict.fromkeys(numbers, "i32"), strides

    shared, strides = signature(_prefix_kernel, ("prefix_length", "order", "offset"))
    first = Case(
        f"prefix attention {dtype} {model}",
        _prefix_kernel,
        shared,
        fixed | {"BLOCK_B": _width(b), "TILE": TILE, "BLOCK_P": block},
        flops=4.0 * r * hq * p * d,
        bytes=itemsize * (2.0 * b * h * p * d + r * hq * d) + partial,
        matrix=dtype == "bf16",
        divisible=strides,
        **options,
    )
    own, strides = signature(_tail_kernel, ("tail_length", "prefix_length", "group"))
    second = Case(
        f"prefix attention's tail {dtype} {model}",
        _tail_kernel,
        own,
        fixed | {"BLOCK_M": _width(rep), "BLOCK_T": block},
        flops=4.0 * r * hq * t * d,
        bytes=itemsize * (2.0 * r * h * t * d + 2.0 * r * hq * d) + partial,
        num_stages=2,
        divisible=strides,
    )
    return [first, second]
