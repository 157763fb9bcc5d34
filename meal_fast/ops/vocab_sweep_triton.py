"""`sweep` with Triton kernels at work on the tiles; the products with the head stay the library's.

Logits that already exist are read where they lie, and their gradient is written where it will stay:
no tile at all. Nothing here waits for the device. The results are `sweep`'s, in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .vocab_sweep import Gradient, LinearSource, Source, Stats, default_max_bytes


def chunk_rows(source: LinearSource, tiles: int, gradient: bool, max_bytes: int | None) -> int:
    """Count how many rows' tiles, float32, with their gradient if that has another dtype, fit.

    Above 128 a multiple of it, the height of a block of the library's product.
    """
    budget = default_max_bytes(source.device) if max_bytes is None else max_bytes
    narrow = source.factor_dtype.itemsize if source.factor_dtype != torch.float32 else 0
    per_row = source.vocabulary * (4 * tiles + narrow * gradient)
    rows = budget // per_row
    if rows > 128:
        rows -= rows % 128
    return max(1, min(source.rows, rows))


def chunk_of(source: Source, exact_kl: bool, gradient: bool, max_bytes: int | None) -> int:
    """Count how many rows `sweep` takes at a time: logits that exist need no tile."""
    if isinstance(source, LinearSource):
        return chunk_rows(source, 1 + exact_kl, gradient, max_bytes)
    return max(1, source.rows)


def logits_of(source: Source, rows: slice) -> Tensor:
    """Give what the kernels read: a tile of these rows, or all of the logits that exist."""
    return source.raw(rows) if isinstance(source, LinearSource) else source.logits


def sweep(
    source: Source,
    target: Tensor,
    reference: Source | None = None,
    *,
    exact_kl: bool = False,
    gradient: Gradient | None = None,
    max_bytes: int | None = None,
    active: Tensor | None = None,  # (N,) bool: rows to leave out: stats 0, gradient 0
    known: Stats | None = None,  # of the same source and reference, from an earlier sweep
) -> Stats:
    """Sweep as `meal_fast.ops.vocab_sweep.sweep`; with `known` only the gradient is made."""
    from meal_fast.kernels import vocabulary as kernels

    n = source.rows
    chunk = chunk_of(source, exact_kl, gradient is not None, max_bytes)
    target = target.contiguous()
    active = None if active is None else active.contiguous().view(torch.uint8)
    read = source.readout
    readout = read.raw_scale, None if read.softcap is None else read.softcap / read.temperature
    stats = known
    if stats is None:
        empty = torch.empty(kernels.KEPT, n, device=source.device)
        stats = restore(empty, reference is not None, exact_kl)
    assert stats.kept is not None

    for start in range(0, n, chunk):
        rows = slice(start, min(start + chunk, n))
        at, kept = target[rows], stats.kept[:, rows]
        on = None if active is None else active[rows]
        ref_tile: Tensor | None = None
        ref_bias: Tensor | None = None
        if reference is not None:
            ref_bias = reference.bias
            if exact_kl:
                ref_tile = logits_of(reference, rows)
            elif known is None:
                assert stats.ref_logp is not None
                scratch = torch.empty_like(kept)
                kernels.stats(logits_of(reference, rows), at, *readout, ref_bias, scratch, on)
                stats.ref_logp[rows] = scratch[kernels.LOGP.value]
        tile = logits_of(source, rows)
        if known is None:
            if ref_tile is None:
                kernels.stats(tile, at, *readout, source.bias, kept, on)
            else:
                kernels.stats_kl(tile, ref_tile, at, *readout, source.bias, ref_bias, kept, on)
        if gradient is not None:
            derivatives = gradient(rows, stats.take(rows))
            if isinstance(source, LinearSource):  # whose `backward` scales what is smaller
                grad, scale = source.gradient_of(tile), 1.0
            else:
                assert source.grad_logits is not None
                grad, scale = source.grad_logits.view(n, -1), 1 / read.temperature
            kernels.gradient(
                tile, ref_tile, at, *readout, source.bias, ref_bias, kept, derivatives, scale,
                grad, on,
            )  # fmt: skip
            if isinstance(source, LinearSource):
                source.backward(rows, grad)
            del grad
        del tile, ref_tile  # free before the next ones are made
    return stats


def restore(kept: Tensor, with_reference: bool, exact_kl: bool) -> Stats:
    """Restore the stats of which `kept` is what the kernels keep."""
    from meal_fast.kernels import vocabulary as kernels

    return Stats(
        kept[kernels.LOGP.value],
        kept[kernels.ENTROPY.value],
        kept[kernels.REF_LOGP.value] if with_reference else None,
        kept[kernels.KL.value] if exact_kl else None,
        kept,
    )
