"""Sampling a token of each row by inverse CDF."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import checks, reference
from .checks import require
from .philox import uniform

_BLOCK = 256  # columns that are summed in float32; sums over blocks are float64
_SHORT_LIST = 1024


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
    """One token of each row, by inverse CDF with one uniform per (seed, row id, position).

    The uniform comes from Philox4x32-10 (key: seed; counter: position, row id), so a row's token
    depends on its own logits and ids, not on what else is in the batch. The token always has p > 0.

    Args:
        logits: (R, V). row: (R,) int64 ids. position: (R,) int64 or an int.
        temperature: p = softmax(logits / temperature). 0 is greedy: the first maximum.
        top_k: keep exactly the k likeliest (0: all). top_p: of those, the shortest prefix in order
            of probability whose share reaches top_p. min_p: of those, the ones with
            p ≥ min_p · max p. Ties are taken in order of token id.

    Returns:
        token (R,) int64; logp (R,), its log-probability under softmax(logits / temperature) (at
        temperature 0: under softmax(logits)); truncated_logp (R,), under what was sampled from,
        renormalised (at temperature 0: 0). Not differentiable.

    Raises:
        ValueError: bad shapes or options; on the CPU also a row whose largest logit is not finite
            or that holds a NaN.
    """
    checks.implementation("sample", impl)
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
    with torch.no_grad():
        if logits.device.type == "cpu":
            bad = ~logits.amax(1).isfinite()  # a NaN comes through amax
            if bool(bad.any()):
                first = int(bad.nonzero()[0, 0])
                raise ValueError(
                    f"logits: row {first} has a NaN, an infinite maximum or only -inf; "
                    "it is no distribution"
                )
        return _sample(
            logits,
            seed,
            row.long(),
            position.long(),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            dtype=reference.compute_dtype(logits),
        )


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
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(token, logp, truncated_logp), each (R,)."""
    if temperature == 0:
        token = logits.argmax(1)
        logits = logits.to(dtype)
        picked = logits.gather(1, token[:, None]).squeeze(1)
        logp = picked - logits.logsumexp(1)
        return token, logp, torch.where(logp.isnan(), logp, 0)
    p = torch.softmax(logits.to(dtype) * (1 / temperature), 1)
    kept = p
    if top_k or top_p < 1 or min_p > 0:
        kept = torch.where(_survivors(p, top_k, top_p, min_p), p, 0)
    token, mass = _inverse_cdf(kept, uniform(seed, row, position))
    picked = p.gather(1, token[:, None]).squeeze(1).log()
    # softmax sums to 1 up to rounding; `mass` is that sum, or what truncation left of it.
    full = mass if kept is p else p.sum(1, dtype=torch.float64)
    return token, picked - full.log().to(dtype), picked - mass.log().to(dtype)


def _inverse_cdf(p: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Token of each row where the running sum of `p` passes u · total, and the total (float64).

    A running sum of V float32 numbers drifts by more than a rare token's probability. So: sums of
    blocks, their running sum in float64, then one block's own running sum in float64. The token
    returned always has p > 0: it is the first at which a running sum increases past the mark, or,
    if rounding puts the mark past the end, the last at which it increases.
    """
    v = p.shape[1]
    whole = v // _BLOCK * _BLOCK
    blocks = p[:, :whole].unflatten(1, (-1, _BLOCK)).sum(2, dtype=p.dtype)
    if whole < v:
        blocks = torch.cat((blocks, p[:, whole:].sum(1, keepdim=True)), 1)
    running = blocks.double().cumsum(1)
    total = running[:, -1]
    mark = u * total
    block = _first_past(running, mark)
    before = torch.where(
        block > 0, running.gather(1, (block - 1).clamp(min=0)[:, None]).squeeze(1), 0
    )
    column = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=p.device)
    inside = torch.where(column < v, p.gather(1, column.clamp(max=v - 1)), 0).double().cumsum(1)
    token = block * _BLOCK + _first_past(inside, mark - before)
    return token, total


def _first_past(running: Tensor, mark: Tensor) -> Tensor:
    """First index of each row with running > mark; else the first that reaches the row's end."""
    past = running > mark[:, None]
    end = running >= running[:, -1:]
    return torch.where(past.any(1), past.int().argmax(1), end.int().argmax(1))


def _survivors(p: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """(R, V) bool: what top-k, then top-p of what it left, then min-p keep."""
    keep = torch.ones_like(p, dtype=torch.bool)
    if top_k or top_p < 1:
        ordered, total = _likeliest(p, top_k, top_p)
        running = ordered.double().cumsum(1)
        # Kept while the mass before it is short of top_p: the shortest prefix that reaches it.
        prefix = (running - ordered < top_p * total) if top_p < 1 else torch.ones_like(ordered) > 0
        count = prefix.sum(1, keepdim=True).clamp(min=1)
        keep = _first_likeliest(p, count, ordered.gather(1, count - 1))
    if min_p > 0:
        keep &= p >= min_p * p.amax(1, keepdim=True)
    return keep


def _likeliest(p: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """(values, total): enough of the largest values, descending, and the mass top-p is a share of.

    A sort of the vocabulary costs ten times the rest of the op, so without top-k a short list is
    tried first. Looking whether it was enough waits for the device: on the CPU only.
    """
    v = p.shape[1]
    if 0 < top_k:
        values = p.topk(min(top_k, v), 1).values
        return values, values.sum(1, keepdim=True, dtype=torch.float64)
    total = p.sum(1, keepdim=True, dtype=torch.float64)
    if p.device.type == "cpu" and v > _SHORT_LIST:
        values = p.topk(_SHORT_LIST, 1).values
        if bool((values.sum(1, keepdim=True, dtype=torch.float64) >= top_p * total).all()):
            return values, total
    return p.sort(dim=1, descending=True).values, total


def _first_likeliest(p: Tensor, count: Tensor, least: Tensor) -> Tensor:
    """The `count` (R, 1) largest of each row, the last of which is `least` (R, 1).

    Of the values equal to `least` the first in order of token id are taken, and no more than there
    is room for.
    """
    keep = p >= least
    if p.device.type == "cpu" and bool((keep.sum(1, keepdim=True) == count).all()):
        return keep
    above = p > least
    tied = keep & ~above
    return above | (tied & (tied.cumsum(1) <= count - above.sum(1, keepdim=True)))
