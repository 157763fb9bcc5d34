"""Sampling a token of each row by inverse CDF, in plain torch.

R  rows    V  vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor

from meal_fast.ops.philox import uniform

_BLOCK = 256  # columns that are summed in float32; sums over blocks are float64


def sample(
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
    """(R, V) bool: what top-k, then top-p of what it left, then min-p keep.

    Equal probabilities are taken in order of token id, so that top-k keeps exactly k and top-p no
    more than its prefix.
    """
    v = p.shape[1]
    keep = torch.ones_like(p, dtype=torch.bool)
    if 0 < top_k < v:
        least = p.topk(top_k, 1).values[:, -1:]
        above = p > least
        tied = p == least
        room = top_k - above.sum(1, keepdim=True)
        keep = above | (tied & (tied.cumsum(1) <= room))
    if top_p < 1:
        ordered, order = torch.where(keep, p, 0).sort(dim=1, descending=True, stable=True)
        running = ordered.double().cumsum(1)
        # Kept while the mass before it is short of top_p: the smallest prefix that reaches it.
        prefix = running - ordered < top_p * running[:, -1:]
        prefix[:, 0] = True
        keep &= torch.zeros_like(keep).scatter_(1, order, prefix)
    if min_p > 0:
        keep &= p >= min_p * p.amax(1, keepdim=True)
    return keep
