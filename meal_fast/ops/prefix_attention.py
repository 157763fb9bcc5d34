"""Decode attention: one new token a row, and a prefix whose rows share its single copy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from meal_fast.common import require

from . import checks, dispatch, reference
from .registration import Given, registered

_WIDEST = 256  # a head in Triton: what a GPU's shared memory and registers have room for


class _Layout(NamedTuple):
    """Where the rows of each group lie, as Python numbers: for loops on the host."""

    starts: list[int]  # (B + 1,) as `Groups.offset`
    even: int  # the size of every group; 0 where sizes differ
    order: Tensor | None  # None: the rows are in order already
    back: Tensor | None  # (R,) its inverse


@dataclass(frozen=True)
class Groups:
    """Say which rows are behind which of B prefixes: made once a step, used in every layer."""

    b: int
    group_R: Tensor  # int64, the prefix of each row, in any order
    order_R: Tensor  # int64, the rows in order of their prefixes
    offset: Tensor  # (B + 1,) int64, where each prefix's rows begin in `order_R`

    TENSORS: ClassVar[int] = 3  # by which a registered op takes it

    def to_tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.group_R, self.order_R, self.offset

    @staticmethod
    def from_tensors(group_R: Tensor, order_R: Tensor, offset: Tensor) -> Groups:
        return Groups(len(offset) - 1, group_R, order_R, offset)

    @staticmethod
    def of(group_R: Tensor, b: int) -> Groups:
        """Make the plan of rows `group_R` (R,) behind `b` prefixes; some may have no row.

        Does not wait for a GPU. There a row outside [0, b) belongs nowhere; on the CPU it raises
        ValueError.
        """
        require(group_R.dim() == 1, "group.shape", tuple(group_R.shape), "must be (R,)")
        checks.integer("group", group_R)
        group_R = group_R.long().contiguous()
        if group_R.device.type == "cpu":
            for row, g in enumerate(group_R.tolist()):
                if not 0 <= g < b:
                    raise ValueError(f"group: row {row} is {g}, outside [0, {b}); number it anew")
        ordered, order_R = torch.sort(group_R, stable=True)
        offset = torch.searchsorted(ordered, torch.arange(b + 1, device=group_R.device))
        return Groups(b, group_R, order_R, offset)

    @cached_property
    def layout(self) -> _Layout:
        """Give the layout for work in torch. Reading it the first time waits for a GPU."""
        starts = self.offset.tolist()
        inside = starts[0] == 0 and starts[-1] == len(self.group_R)
        require(inside, "group", "(R,)", f"some are outside [0, {self.b}); number them anew")
        sizes = {end - start for start, end in pairwise(starts)}
        even = sizes.pop() if len(sizes) == 1 else 0
        places = torch.arange(len(self.order_R), device=self.order_R.device)
        if torch.equal(self.order_R, places):
            return _Layout(starts, even, None, None)
        back = torch.empty_like(places).scatter_(0, self.order_R, places)
        return _Layout(starts, even, self.order_R, back)


def _without_gradients(given: Given) -> Given:
    """For decoding: no gradient, and so no backward pass."""
    if torch.is_grad_enabled():
        for name in ("query", "prefix_key", "prefix_value", "tail_key", "tail_value"):
            if given[name].requires_grad:
                raise ValueError(
                    f"{name}: requires a gradient, and prefix_attention has none; "
                    "use torch.no_grad() or detach it"
                )
    return given


def _fake(given: Given) -> Tensor:
    return given["query"].new_empty(given["query"].shape)


@registered(fake=_fake, prepare=_without_gradients)
def prefix_attention(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_length: Tensor,
    group: Tensor | Groups,
    tail_key: Tensor,
    tail_value: Tensor,
    tail_length: Tensor,
    *,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Attend from one new token a row to its group's prefix and its own tail.

        out_r = Σ_j p_j v_j,  p = softmax(scale · q_r · k_j),  j over prefix group[r], then tail r

    The rows of a prefix are the rows of one matrix product with its single copy: a step reads
    B·P + R·T keys and values, not R·(P + T); in half precision a CPU makes float32 copies of those.
    For decoding: not differentiable. [R]

    Args:
        query: (R, Hq, d). prefix_key, prefix_value: (B, H, P, d), padded on the right, H a divisor
            of Hq (head h of the query goes with head h // (Hq / H)). prefix_length: (B,) int64.
        group: (R,) int64, the prefix of each row, in any order; or the `Groups.of` it, made once
            for several calls.
        tail_key, tail_value: (R, H, T, d); a view of a longer buffer will do. tail_length: (R,)
            int64. What lies beyond the lengths is never looked at, and may be NaN.
        scale: default 1/√d. Scores, softmax and sums are float32 (float64 for float64).

    Returns:
        out (R, Hq, d) in the dtype of query. On a GPU a row whose lengths are both 0, or with a
        group or length out of range, is NaN (with impl="torch" it waits for the GPU and raises).

    Raises:
        ValueError: bad shapes, dtypes or devices; an input that requires a gradient while gradients
            are recorded; on the CPU also values out of range, and a row with nothing to look at.
    """
    _without_gradients(
        {"query": query, "prefix_key": prefix_key, "prefix_value": prefix_value}
        | {"tail_key": tail_key, "tail_value": tail_value}
    )
    _check(query, prefix_key, prefix_value, prefix_length, tail_key, tail_value, tail_length)
    r, b = query.shape[0], prefix_key.shape[0]
    groups = group if isinstance(group, Groups) else Groups.of(group, b)
    require(groups.b == b, "group", f"Groups of {groups.b} prefixes", f"prefix_key has {b}")
    checks.shape("group", groups.group_R, (r,))
    checks.same_device("query", query, group=groups.group_R)
    if scale is None:
        scale = query.shape[2] ** -0.5
    require(math.isfinite(scale), "scale", scale, "must be finite")
    arguments = (
        query.detach(), prefix_key.detach(), prefix_value.detach(), prefix_length.long(), groups,
        tail_key.detach(), tail_value.detach(), tail_length.long(), scale,
    )  # fmt: skip
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        if _choose(impl, query) == "triton":
            if query.device.type == "cpu":
                p, t = prefix_key.shape[2], tail_key.shape[2]
                _check_values(prefix_length, groups, p, t, tail_length)
            from meal_fast.kernels import prefix_attention as kernels

            return kernels.prefix_attention_forward(*arguments)
        return _in_torch(*arguments)


def _choose(impl: str | None, query: Tensor) -> str:
    """As `dispatch.choose`; heads that no tile of the kernel holds run in torch."""
    d = query.shape[2]
    if d > _WIDEST:
        remedy = f"heads of {d} are wider than the {_WIDEST} that fit; use None or 'torch'"
        if impl == "triton":
            raise ValueError(f"impl='triton': {remedy}")
        impl = impl or "torch"
    return dispatch.choose("prefix_attention", impl, query)


def _check(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_length: Tensor,
    tail_key: Tensor,
    tail_value: Tensor,
    tail_length: Tensor,
) -> None:
    checks.floating("query", query)
    for name, x, dims in (
        ("query", query, "(R, Hq, d)"),
        ("prefix_key", prefix_key, "(B, H, P, d)"),
        ("tail_key", tail_key, "(R, H, T, d)"),
    ):
        require(x.dim() == dims.count(",") + 1, f"{name}.shape", tuple(x.shape), f"must be {dims}")
    (r, hq, d), (b, h, p, _), t = query.shape, prefix_key.shape, tail_key.shape[2]
    require(d >= 1, "query.shape", tuple(query.shape), "needs a width d of at least 1")
    divides = h >= 1 and hq >= 1 and hq % h == 0
    require(divides, "query.shape", tuple(query.shape), f"Hq must be a multiple of H = {h}")
    checks.shape("prefix_key", prefix_key, (b, h, p, d))
    checks.shape("prefix_value", prefix_value, (b, h, p, d))
    checks.shape("prefix_length", prefix_length, (b,))
    checks.shape("tail_key", tail_key, (r, h, t, d))
    checks.shape("tail_value", tail_value, (r, h, t, d))
    checks.shape("tail_length", tail_length, (r,))
    checks.integer("prefix_length", prefix_length)
    checks.integer("tail_length", tail_length)
    others = {
        "prefix_key": prefix_key,
        "prefix_value": prefix_value,
        "tail_key": tail_key,
        "tail_value": tail_value,
    }
    for name, x in others.items():
        if x.dtype != query.dtype:
            raise ValueError(f"{name}: dtype {x.dtype}, but query has {query.dtype}; cast one")
    others |= {"prefix_length": prefix_length, "tail_length": tail_length}
    checks.same_device("query", query, **others)


def _check_values(
    prefix_length: Tensor, groups: Groups, p: int, t: int, tail_length: Tensor
) -> tuple[list[int], list[int]]:
    """The lengths as Python numbers."""
    prefixes, tails = prefix_length.tolist(), tail_length.tolist()
    for name, lengths, most in (("prefix_length", prefixes, p), ("tail_length", tails, t)):
        if lengths and not 0 <= min(lengths) <= max(lengths) <= most:
            i = next(i for i, n in enumerate(lengths) if not 0 <= n <= most)
            raise ValueError(f"{name}: entry {i} is {lengths[i]}, outside [0, {most}]; correct it")
    if tails and min(tails) == 0 == min(prefixes):
        for row, (g, n) in enumerate(zip(groups.group_R.tolist(), tails, strict=True)):
            if n == prefixes[g] == 0:
                raise ValueError(
                    f"tail_length: row {row} has no tail and its prefix {g} no tokens; "
                    "give it something to look at"
                )
    return prefixes, tails


def _in_torch(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_length: Tensor,
    groups: Groups,
    tail_key: Tensor,
    tail_value: Tensor,
    tail_length: Tensor,
    scale: float,
) -> Tensor:
    """Scores of prefix and tail side by side under one softmax: the products are what costs."""
    prefixes, tails = _check_values(
        prefix_length, groups, prefix_key.shape[2], tail_key.shape[2], tail_length
    )
    if query.shape[0] == 0:
        return torch.empty_like(query)
    layout, dtype = groups.layout, reference.compute_dtype(query)
    (r, hq, d), (b, h), p, t = query.shape, prefix_key.shape[:2], max(prefixes), max(tails)
    rep = hq // h
    q = (query.to(dtype) * scale).contiguous().view(r, h, rep, d)
    key, value = (x[:, :, :p].to(dtype) for x in (prefix_key, prefix_value))
    tail_k, tail_v = (x[:, :, :t].to(dtype) for x in (tail_key, tail_value))
    products = _even(key, value) if layout.even else _uneven(layout, prefixes, rep)

    def fold(x: Tensor) -> Tensor:
        """(R, H, rep, ·), as they came, to (B, H, G·rep, ·), or uneven: (H, R·rep, ·)."""
        x = x if layout.order is None else x[layout.order]
        if layout.even:
            x = x.view(b, layout.even, h, rep, -1).transpose(1, 2)
            return x.reshape(b, h, layout.even * rep, -1)
        return x.transpose(0, 1).reshape(h, r * rep, -1)

    def unfold(x: Tensor) -> Tensor:
        if layout.even:
            x = x.view(b, h, layout.even, rep, -1).transpose(1, 2).reshape(r, h, rep, -1)
        else:
            x = x.view(h, r, rep, -1).transpose(0, 1)
        return x if layout.back is None else x[layout.back]

    of_rows, of_tails = fold(q), q.flatten(0, 1) @ tail_k.flatten(0, 1).transpose(1, 2)
    of_tails = of_tails.view(r, h, rep, t)
    beyond_BP = beyond_RT = None
    if min(tails) < t:
        beyond_RT = torch.arange(t, device=q.device) >= tail_length[:, None]
        of_tails.masked_fill_(beyond_RT[:, None, None], -torch.inf)
    scores = q.new_empty(*of_rows.shape[:-1], p + t)
    scores[..., p:] = fold(of_tails)
    for rows, prefix, n in products:
        part = scores[rows]
        part[..., :n] = of_rows[rows] @ key[prefix][..., :n, :].transpose(-1, -2)
        part[..., n:p] = -torch.inf
    if layout.even and min(prefixes) < p:
        beyond_BP = torch.arange(p, device=q.device) >= prefix_length[:, None]
        scores[..., :p].masked_fill_(beyond_BP[:, None, None], -torch.inf)
    prob = torch.softmax(scores, -1)

    def weighted(value: Tensor, tail_v: Tensor) -> Tensor:
        out = torch.empty_like(of_rows)
        for rows, prefix, n in products:
            out[rows] = prob[rows][..., :n] @ value[prefix][..., :n, :]
        of_prefix, weights = unfold(out).reshape(r * h, rep, d), unfold(prob[..., p:].contiguous())
        return torch.baddbmm(of_prefix, weights.reshape(r * h, rep, t), tail_v.flatten(0, 1))

    out = weighted(value, tail_v)
    if not (beyond_BP is None and beyond_RT is None) and not bool(out.isfinite().all()):
        # 0 times what lies beyond a length is NaN where that is not finite, which is rare: so the
        # values are copied only then.
        if beyond_BP is not None:
            value = value.masked_fill(beyond_BP[:, None, :, None], 0)
        if beyond_RT is not None:
            tail_v = tail_v.masked_fill(beyond_RT[:, None, :, None], 0)
        out = weighted(value, tail_v)
    return out.view(r, hq, d).to(query.dtype)


# Products of rows with prefixes: where the rows lie, where the prefixes, tokens of these.
Products = list[tuple[Any, Any, int]]


def _even(key: Tensor, value: Tensor) -> Products:
    """Groups of one size: all at once, or head by head where heads lie inside of tokens.

    There prefixes and heads are no single axis, and a product of both would copy the cache.
    """
    h, p = key.shape[1:3]
    if all(x.shape[0] == 1 or x.stride(0) == h * x.stride(1) for x in (key, value)):
        return [(..., ..., p)]
    return [((slice(None), i), (slice(None), i), p) for i in range(h)]


def _uneven(layout: _Layout, prefixes: list[int], rep: int) -> Products:
    """Group by group, each as long as it is."""
    spans = enumerate(pairwise(layout.starts))
    return [
        ((slice(None), slice(start * rep, end * rep)), i, prefixes[i])
        for i, (start, end) in spans
        if end > start
    ]
