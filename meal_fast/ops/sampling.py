"""Sampling a token of each row by inverse CDF."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from meal_fast.common import require

from . import checks, dispatch, reference, sample_cuda
from .philox import uniform
from .registration import Given, registered

_BLOCK = 256  # columns that are summed in float32; sums over blocks are float64
_GROUP = 64  # columns of which the largest is looked at first, for top-k
_SHORT_LIST = 1 / 256  # the tokens likelier than this are top-p's first guess
_CHUNK = 1 << 20  # numbers that are worked on at a time, on the CPU


def _for_schema(given: Given) -> Given:
    """A schema has no `Tensor | int`, and its integers are signed."""
    if isinstance(given["position"], int):
        given["position"] = torch.full_like(given["row"], given["position"])
    given["seed"] = (given["seed"] + 2**63) % 2**64 - 2**63
    return given


def _fake(given: Given) -> tuple[Tensor, Tensor, Tensor]:
    logits, r = given["logits"], given["row"].shape[0]
    dtype = reference.compute_dtype(logits)
    token = logits.new_empty(r, dtype=torch.int64)
    return token, logits.new_empty(r, dtype=dtype), logits.new_empty(r, dtype=dtype)


@registered(fake=_fake, prepare=_for_schema)
def sample(
    logits: Tensor,
    *,
    seed: int,
    row: Tensor,
    position: Tensor | int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token of each row, by inverse CDF with one uniform per (seed, row id, position).

    The uniform comes from Philox4x32-10 (key: seed; counter: position, row id), so a row's token
    depends on its own logits and ids, not on what else is in the batch. The token always has p > 0.

    Args:
        logits: (R, V). row: (R,) int64 ids. position: (R,) int64 or an int.
        temperature: p = softmax(logits / temperature). 0 is greedy: the first maximum.
        top_k: keep exactly the k likeliest (0: all). top_p: of those, the shortest prefix in order
            of probability whose share reaches top_p. min_p: of those, the ones with
            p ≥ min_p · max p. Ties (equal logits) are taken in order of token id.
        impl: "cuda" (csrc/sample.cu, built on first use where nvcc is found), "triton" or "torch".
            All three draw from the same stream, and give the same token unless the uniform lies
            within rounding of a boundary between two tokens.

    Returns:
        token (R,) int64; logp (R,), its log-probability under softmax(logits / temperature) (at
        temperature 0: under softmax(logits)); truncated_logp (R,), under what was sampled from,
        renormalised (at temperature 0: 0). Not differentiable.

    Raises:
        ValueError: bad shapes or options; on the CPU also a row whose largest logit is not finite
            or that holds a NaN (elsewhere: log-probabilities are NaN, the token any that exists).
        RuntimeError: csrc/sample.cu does not compile; the message holds what nvcc said.
    """
    checks.floating("logits", logits)
    require(logits.dim() == 2, "logits.shape", tuple(logits.shape), "must be (R, V)")
    r, v = logits.shape
    require(v >= 1, "logits.shape", tuple(logits.shape), "needs a vocabulary")
    checks.shape("row", row, (r,))
    checks.integer("row", row)
    require(
        isinstance(seed, int) and -(2**63) <= seed < 2**64, "seed", seed, "must be a 64-bit int"
    )
    if isinstance(position, int):
        position = torch.full_like(row, position)
    checks.shape("position", position, (r,))
    checks.integer("position", position)
    checks.same_device("logits", logits, row=row, position=position)
    require(
        temperature == 0 or (math.isfinite(temperature) and temperature >= 1e-6),
        "temperature",
        temperature,
        "must be 0 (greedy) or at least 1e-6",
    )
    require(top_k >= 0, "top_k", top_k, "must be 0 (no limit) or positive")
    require(0 < top_p <= 1, "top_p", top_p, "must be in (0, 1]")
    require(0 <= min_p <= 1, "min_p", min_p, "must be in [0, 1]")
    chosen = dispatch.choose_with_cuda("sample", impl, logits)
    run = _sample
    if chosen == "cuda":
        run = sample_cuda.sample
    elif chosen == "triton":
        from meal_fast.kernels import sample as kernels

        run = kernels.sample
    with torch.no_grad():
        token, logp, truncated = run(
            logits,
            seed,
            row.long(),
            position.long(),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
        )
    if logits.device.type == "cpu" and bool(logp.isnan().any()):
        bad = int(logp.isnan().nonzero()[0, 0])
        raise ValueError(
            f"logits: row {bad} has a NaN, an infinite maximum or only -inf; it is no distribution"
        )
    return token, logp, truncated


def _sample(
    logits: Tensor,  # (R, V)
    seed: int,
    row: Tensor,  # (R,) int64
    position: Tensor,  # (R,) int64
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(token, logp, truncated_logp), each (R,).

    On the CPU a few rows at a time, in buffers that are used again: what one pass writes is still
    in the cache when the next one reads it, and no call asks the system for memory by the megabyte.
    """
    r, v = logits.shape
    cpu, dtype = logits.device.type == "cpu", reference.compute_dtype(logits)
    parts = max(1, -(-r * v // _CHUNK)) if cpu else 1
    step = max(1, -(-r // parts))
    scale = 1 / temperature if temperature else 1.0
    in_place = scale == 1 and logits.dtype == dtype and logits.is_contiguous()
    scaled = logits.new_empty(0 if in_place else step, v, dtype=dtype)
    truncates = bool(temperature) and (top_k > 0 or top_p < 1 or min_p > 0)
    work = logits.new_empty(step if truncates else 0, v, dtype=dtype)
    if in_place or truncates or not temperature:
        probability = logits.new_empty(step, v, dtype=dtype)
    else:
        probability = scaled  # no one looks at z again: softmax takes its place
    u = uniform(seed, row, position) if temperature else None
    token = torch.empty_like(row)
    logp, truncated = logits.new_zeros(2, r, dtype=dtype)
    for first in range(0, r, step):
        rows = slice(first, min(first + step, r))
        x = z = logits[rows]
        if not in_place:
            z = scaled[: len(z)].copy_(z).mul_(scale)
        if logits.dtype != dtype:
            x = z  # no two values of a shorter type become one
        p = torch.softmax(z, 1, out=probability[: len(z)])
        sums = _block_sums(p)
        full = sums[:, -1]  # 1 up to rounding
        mass = full
        if u is None:
            picked = _first_maximum(x)
        else:
            if truncates:
                # Multiplied, not selected: p is finite here (or the row is no distribution), and
                # on the CPU a float32 mask takes a tenth of the time of a bool one.
                kept = _survivors(x, p, top_k, top_p, min_p, work[: len(z)]).mul_(p)
                sums = _block_sums(kept)
                mass = sums[:, -1]
            else:
                kept = p
            picked = _inverse_cdf(kept, sums, u[rows])
        token[rows] = picked
        log_p = p.gather(1, picked[:, None]).squeeze(1).log()
        logp[rows] = log_p - full.log().to(dtype)
        if u is not None:
            truncated[rows] = log_p - mass.log().to(dtype)
    # At temperature 0 one token has all the mass; a row that is no distribution stays NaN.
    return token, logp, torch.where(logp.isnan(), logp, truncated)


def _blocks(x: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(R, V // width, width) and the (R, V % width) columns that are left over."""
    whole = x.shape[1] // width * width
    return x[:, :whole].unflatten(1, (-1, width)), x[:, whole:]


def _block_sums(p: Tensor) -> Tensor:
    """(R, blocks) float64: the running sum of the sums of blocks of columns.

    A running sum of V float32 numbers drifts by more than a rare token's probability. So: sums of
    blocks, their running sum in float64, and later one block's own running sum in float64.
    """
    blocks, rest = _blocks(p, _BLOCK)
    sums = blocks.sum(2)
    if rest.shape[1]:
        sums = torch.cat((sums, rest.sum(1, keepdim=True)), 1)
    return sums.cumsum(1, dtype=torch.float64)


def _inverse_cdf(p: Tensor, running: Tensor, u: Tensor) -> Tensor:
    """Token of each row where the running sum of `p` passes u · total; `running` is of its blocks.

    The token returned always has p > 0: it is the first at which a running sum increases past the
    mark, or, if rounding puts the mark past the end, the last at which it increases.
    """
    v = p.shape[1]
    mark = u * running[:, -1]
    block = _first_past(running, mark)
    before = torch.where(
        block > 0, running.gather(1, (block - 1).clamp(min=0)[:, None]).squeeze(1), 0
    )
    column = block[:, None] * _BLOCK + torch.arange(min(_BLOCK, v), device=p.device)
    inside = torch.where(column < v, p.gather(1, column.clamp(max=v - 1)), 0)
    inside = inside.cumsum(1, dtype=torch.float64)
    return block * _BLOCK + _first_past(inside, mark - before)


def _first_past(running: Tensor, mark: Tensor) -> Tensor:
    """First index of each row with running > mark; else the first that reaches the row's end."""
    past = running > mark[:, None]
    end = running >= running[:, -1:]
    return torch.where(past.any(1), past.int().argmax(1), end.int().argmax(1))


def _first_maximum(z: Tensor) -> Tensor:
    """`z.argmax(1)`, which is not vectorised on the CPU: first the block, then the column in it."""
    v = z.shape[1]
    blocks, rest = _blocks(z, _BLOCK)
    if not blocks.shape[1]:
        return z.argmax(1)
    top = blocks.amax(2)
    if rest.shape[1]:
        top = torch.cat((top, rest.amax(1, keepdim=True)), 1)
    # The last column of all stands in for those past the end: it is no earlier maximum.
    column = top.argmax(1, keepdim=True) * _BLOCK + torch.arange(_BLOCK, device=z.device)
    column = column.clamp(max=v - 1)
    return column.gather(1, z.gather(1, column).argmax(1, keepdim=True)).squeeze(1)


def _survivors(
    z: Tensor, p: Tensor, top_k: int, top_p: float, min_p: float, work: Tensor
) -> Tensor:
    """`work` (R, V): 1 for what top-k, then top-p of what it left, then min-p keep; else 0.

    The order is that of the logits z, not of p: that is exact, and the same on every device.
    """
    if top_k or top_p < 1:
        ordered, share, total = _likeliest(z, p, top_k, top_p, work)
        count = torch.full_like(total, min(top_k, z.shape[1]), dtype=torch.int64)
        if top_p < 1:
            # Kept while the mass before it is short of top_p: the shortest prefix that reaches it.
            running = share.cumsum(1, dtype=torch.float64)
            count = (running - share < top_p * total).sum(1, keepdim=True).clamp(min=1)
        _first_likeliest(z, count, ordered.gather(1, count - 1), work)
        if min_p > 0:
            work *= p >= min_p * p.amax(1, keepdim=True)
    else:
        torch.ge(p, min_p * p.amax(1, keepdim=True), out=work)
    return work


def _likeliest(
    z: Tensor, p: Tensor, top_k: int, top_p: float, work: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(z, p, mass): enough of the likeliest, descending, and the mass top-p is a share of.

    A sort of the vocabulary costs ten times the rest of the op. Choosing less of it waits for the
    device when the choice depends on the values: so for top-p on the CPU only.
    """
    v = z.shape[1]
    if top_k:
        column = _top_columns(z, min(top_k, v))
        share = p.gather(1, column)
        return z.gather(1, column), share, share.sum(1, keepdim=True, dtype=torch.float64)
    # All in float64: a sum of float32 blocks is off by enough to let a tie in.
    total = p.sum(1, keepdim=True, dtype=torch.float64)
    least = _SHORT_LIST if z.device.type == "cpu" else 0.0
    while least > 1 / (8 * v):
        # Fewer than 1 / least of a row's tokens are likelier than that.
        torch.threshold(p, least, 0, out=work)
        if bool((work.sum(1, keepdim=True) >= top_p * total).all()):
            ordered, share = _ordered_above(z, work)
            if bool((share.sum(1, keepdim=True, dtype=torch.float64) >= top_p * total).all()):
                return ordered, share, total
        least /= 2
    ordered, column = z.sort(dim=1, descending=True)
    return ordered, p.gather(1, column), total


def _top_columns(z: Tensor, k: int) -> Tensor:
    """(R, k): the columns of the k largest of each row, descending.

    They are found among the blocks with the k largest maxima: all others hold nothing that is
    larger than each of these maxima. Of equal values any may be among the k.
    """
    blocks, rest = _blocks(z, _GROUP)
    if 4 * k >= blocks.shape[1]:
        return z.topk(k, 1).indices
    chosen = blocks.amax(2).topk(k, 1).indices[:, :, None]
    column = (chosen * _GROUP + torch.arange(_GROUP, device=z.device)).flatten(1)
    if rest.shape[1]:
        last = torch.arange(z.shape[1] - rest.shape[1], z.shape[1], device=z.device)
        column = torch.cat((column, last.expand(len(z), -1)), 1)
    return column.gather(1, z.gather(1, column).topk(k, 1).indices)


def _ordered_above(z: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """The z and p of each row that have p > 0, by z, descending; rows are filled up with p = 0."""
    r, v = p.shape
    found = p.view(-1).nonzero().squeeze(1)
    row = found.div(v, rounding_mode="floor")
    count = torch.bincount(row, minlength=r)
    width = int(count.max())
    place = torch.arange(len(row), device=p.device) + (
        torch.arange(r, device=p.device) * width - (count.cumsum(0) - count)
    ).repeat_interleave(count)
    value = z.new_full((r * width,), -torch.inf).scatter_(0, place, z.reshape(-1)[found])
    share = p.new_zeros(r * width).scatter_(0, place, p.view(-1)[found])
    value, order = value.view(r, width).sort(dim=1, descending=True)
    return value, share.view(r, width).gather(1, order)


def _first_likeliest(z: Tensor, count: Tensor, least: Tensor, work: Tensor) -> None:
    """`work` becomes 1 for the `count` (R, 1) largest of each row, the last of which is `least`.

    Of the values equal to `least` the first in order of token id are taken, and no more than there
    is room for.
    """
    torch.ge(z, least, out=work)
    if z.device.type == "cpu" and bool((work.sum(1, keepdim=True) == count).all()):
        return  # the sum is exact: it is a count, and of no more than 2²⁴
    above = z > least
    tied = (z == least).cumsum(1)
    work *= above | (tied <= count - above.sum(1, keepdim=True))
