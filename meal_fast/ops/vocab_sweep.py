"""One sweep over the vocabulary: log-probability, entropy and KL of N tokens, and their gradients.

    N  tokens    D  hidden width    V  vocabulary    C  tokens of a chunk

(N, V) never exists. A chunk of C tokens goes through the head into a tile (C, V); the tile
is then worked on in blocks of a few rows that stay in the processor's cache, so that the passes of
a softmax cost next to nothing beside the products. Gradients are made in place of the logits while
the tile is there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .gemm import matmul, wide_product

_BLOCK_BYTES = 2 << 20  # of a block of the tile: about a core's share of a last-level cache


def default_max_bytes(device: torch.device) -> int:
    """Give the budget of a chunk's tiles. A thousand rows are worth a read of the head."""
    return (32 if device.type == "cpu" else 1024) << 20


@dataclass(frozen=True)
class Readout:
    """Turn raw logits a into logits z = softcap · tanh(a / softcap) / temperature."""

    temperature: float
    softcap: float | None

    @property
    def raw_scale(self) -> float:
        """Give what a source multiplies its raw logits by when it makes a tile."""
        return 1 / (self.temperature if self.softcap is None else self.softcap)

    def finish(self, tile: Tensor, slope: bool) -> Tensor | None:
        """Turn scaled raw logits into logits, in place; give 1 - tanh² when `slope` and softcap."""
        if self.softcap is None:
            return None
        tile.tanh_()
        derivative = 1 - tile.square() if slope else None
        tile.mul_(self.softcap / self.temperature)
        return derivative


class LinearSource:
    """Make raw logits `hidden @ weight.T + bias`, and take their gradients."""

    def __init__(
        self,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        readout: Readout,
        dtype: torch.dtype,
        needs: tuple[bool, bool, bool] = (False, False, False),  # hidden, weight, bias
    ) -> None:
        # A CPU gains nothing from low-precision products, and loses the digits: widen once.
        wide = dtype == torch.float64 or weight.device.type == "cpu"
        self.factor_dtype = dtype if wide or hidden.dtype != weight.dtype else weight.dtype
        self.dtype = dtype
        self.readout = readout
        self.hidden = hidden.detach()
        self.weight = weight.detach().to(self.factor_dtype)
        self.bias = None if bias is None else bias.detach().to(dtype) * readout.raw_scale
        self.rows, self.vocabulary, self.device = hidden.shape[0], weight.shape[0], hidden.device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=hidden.device)

        self.grad_hidden = None  # every row of it is written
        if needs[0]:
            self.grad_hidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
        self.grad_weight = zeros(*weight.shape) if needs[1] else None
        self.grad_bias = zeros(weight.shape[0]) if needs[2] else None

    def tile(self, rows: slice) -> Tensor:
        """Give scaled raw logits of these rows, the caller's to overwrite."""
        hidden = self.hidden[rows].to(self.factor_dtype)
        if self.factor_dtype == self.dtype:  # scaling the narrow factor is free
            return matmul(hidden * self.readout.raw_scale, self.weight.t(), self.bias)
        tile = wide_product(hidden, self.weight.t()).mul_(self.readout.raw_scale)
        return tile if self.bias is None else tile.add_(self.bias)

    def raw(self, rows: slice) -> Tensor:
        """Give raw logits without scale and bias, the caller's to overwrite."""
        return wide_product(self.hidden[rows].to(self.factor_dtype), self.weight.t())

    def gradient_of(self, tile: Tensor) -> Tensor:
        """Say where to write a raw tile's gradient: in place, if the products have its dtype."""
        same = self.factor_dtype == tile.dtype
        return tile if same else torch.empty_like(tile, dtype=self.factor_dtype)

    def backward(self, rows: slice, grad: Tensor) -> None:
        """Take `grad` (C, V), of the logits before their division by the temperature."""
        per_logit = 1 / self.readout.temperature
        grad = grad.to(self.factor_dtype)
        if self.grad_hidden is not None:
            torch.mul(wide_product(grad, self.weight), per_logit, out=self.grad_hidden[rows])
        if self.grad_weight is not None:
            hidden = self.hidden[rows].to(self.factor_dtype)
            if self.factor_dtype == self.dtype:
                self.grad_weight.addmm_(grad.t(), hidden, alpha=per_logit)
            else:  # summed within the product: a (V, D) of its own would not fit the budget
                torch.addmm(
                    self.grad_weight,
                    grad.t(),
                    hidden,
                    out_dtype=self.dtype,
                    alpha=per_logit,
                    out=self.grad_weight,
                )
        if self.grad_bias is not None:
            self.grad_bias.add_(grad.sum(0, dtype=self.dtype), alpha=per_logit)


class LogitsSource:
    """Read raw logits that exist: (N, V), any strides; for Triton (B, T, V) with B·T = N too."""

    bias = None

    def __init__(self, logits: Tensor, readout: Readout, dtype: torch.dtype, needs: bool) -> None:
        self.logits, self.readout, self.dtype = logits.detach(), readout, dtype
        self.rows, self.vocabulary = math.prod(logits.shape[:-1]), logits.shape[-1]
        self.device = logits.device
        # Every row is written, and written contiguous, whatever the logits' strides.
        empty = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        self.grad_logits = empty if needs else None

    def tile(self, rows: slice) -> Tensor:
        """Do as `LinearSource.tile`."""
        return self.logits[rows].to(self.dtype, copy=True).mul_(self.readout.raw_scale)

    def backward(self, rows: slice, grad: Tensor) -> None:
        if self.grad_logits is not None:
            self.grad_logits[rows] = grad.mul_(1 / self.readout.temperature)


@dataclass(frozen=True)
class Stats:
    """Hold what a sweep finds, (N,) each: `ref_logp` with a reference, `kl` where asked for.

    `kept` (…, N) is what the Triton kernels need to make the gradient later.
    """

    logp: Tensor
    entropy: Tensor
    ref_logp: Tensor | None
    kl: Tensor | None
    kept: Tensor | None = None

    def take(self, rows: slice) -> Stats:
        ref_logp = None if self.ref_logp is None else self.ref_logp[rows]
        kl = None if self.kl is None else self.kl[rows]
        return Stats(self.logp[rows], self.entropy[rows], ref_logp, kl)


Derivatives = tuple[Tensor | None, Tensor | None, Tensor | None]  # by logp, entropy, kl; None: 0
Gradient = Callable[[slice, Stats], Derivatives]  # of these rows, whose stats are given
Source = LinearSource | LogitsSource


def chosen(all_rows: Derivatives) -> Gradient:
    """Make a `Gradient` that hands out derivatives known beforehand."""

    def gradient(rows: slice, _: Stats) -> Derivatives:
        a, b, c = (None if g is None else g[rows] for g in all_rows)
        return a, b, c

    return gradient


def sweep(
    source: Source,
    target: Tensor,  # (N,) int64; out of range gives NaN
    reference: Source | None = None,
    *,
    exact_kl: bool = False,
    gradient: Gradient | None = None,
    max_bytes: int | None = None,
) -> Stats:
    """Stats of every token; with `gradient`, also `source.backward` on every chunk.

    `gradient` is called a block at a time, once the block's stats are known and before its
    gradients are made.
    """
    if max_bytes is None:
        max_bytes = default_max_bytes(source.device)
    n, v, dtype, device = source.rows, source.vocabulary, source.dtype, source.device
    names = ["logp", "entropy"] + ["ref_logp"] * (reference is not None) + ["kl"] * exact_kl
    made = {name: torch.empty(n, dtype=dtype, device=device) for name in names}
    stats = Stats(made["logp"], made["entropy"], made.get("ref_logp"), made.get("kl"))

    row_bytes = max(1, v * dtype.itemsize)
    tiles = 2 if exact_kl else 1
    chunk = max(1, min(n, max_bytes // (tiles * row_bytes)))
    block = chunk if device.type != "cpu" else max(1, min(chunk, _BLOCK_BYTES // row_bytes))
    scratch = torch.empty(block, v, dtype=dtype, device=device)

    for start in range(0, n, chunk):
        rows = slice(start, min(start + chunk, n))
        ref_tile = None
        if reference is not None:
            ref_tile = reference.tile(rows)
            if stats.ref_logp is not None and not exact_kl:
                for at, z in _blocks(rows, ref_tile, block):
                    reference.readout.finish(z, slope=False)
                    stats.ref_logp[at] = _logp(z, target[at])
                ref_tile = None  # frees it before the next one is made
        tile = source.tile(rows)
        for at, z in _blocks(rows, tile, block):
            zq = None if ref_tile is None else ref_tile[at.start - start : at.stop - start]
            _one_block(source, reference, target, at, z, zq, scratch, stats, gradient)
        if gradient is not None:
            source.backward(rows, tile)
        del tile  # z and zq are views: the memory is free before the next tile is made
    return stats


def _blocks(rows: slice, tile: Tensor, block: int) -> list[tuple[slice, Tensor]]:
    """The blocks of a chunk: which tokens, and their part of the tile."""
    starts = range(rows.start, rows.stop, block)
    spans = [slice(s, min(s + block, rows.stop)) for s in starts]
    return [(s, tile[s.start - rows.start : s.stop - rows.start]) for s in spans]


def _gather(z: Tensor, target: Tensor) -> Tensor:
    """z[i, target[i]], and NaN where the target is no column."""
    inside = (target >= 0) & (target < z.shape[1])
    picked = z.gather(1, target.clamp(0, z.shape[1] - 1)[:, None]).squeeze(1)
    return torch.where(inside, picked, torch.nan)


def _logp(z: Tensor, target: Tensor) -> Tensor:
    """Log-softmax at the target; `z` is used up."""
    z.sub_(z.amax(1, keepdim=True))
    picked = _gather(z, target)
    return picked - z.exp_().sum(1).log()


def _one_block(
    source: Source,
    reference: Source | None,
    target: Tensor,
    rows: slice,
    z: Tensor,  # the block's part of the tile: scaled raw logits in, gradients out
    zq: Tensor | None,  # the same of the reference, for the exact KL
    scratch: Tensor,
    stats: Stats,
    gradient: Gradient | None,
) -> None:
    slope = source.readout.finish(z, slope=gradient is not None)
    target = target[rows]
    u = z.sub_(z.amax(1, keepdim=True))
    picked = _gather(u, target)
    u.clamp_(min=torch.finfo(u.dtype).min)  # -inf would make p * u NaN where p is 0
    p = torch.exp(u, out=scratch[: u.shape[0]])
    total = p.sum(1, keepdim=True)
    p.div_(total)
    log_total = total.log().squeeze(1)
    mean_u = torch.linalg.vecdot(p, u)
    stats.logp[rows] = picked - log_total
    stats.entropy[rows] = log_total - mean_u
    d = None
    if zq is not None:
        assert reference is not None and stats.ref_logp is not None and stats.kl is not None
        reference.readout.finish(zq, slope=False)
        d, stats.ref_logp[rows], stats.kl[rows] = _exact_kl(p, u, log_total, zq, target)
    if gradient is None:
        return

    g_logp, g_entropy, g_kl = gradient(rows, stats.take(rows))
    # dz = p (g_kl d - g_entropy (u - mean u) - g_logp) + g_logp onehot(target)
    a = torch.zeros_like(picked) if g_logp is None else g_logp
    if g_entropy is None and (g_kl is None or d is None):
        torch.mul(p, -a[:, None], out=z)
    else:
        if g_entropy is None:
            z.zero_()
        else:
            u.sub_(mean_u[:, None]).masked_fill_(p == 0, 0).mul_(-g_entropy[:, None])
        if g_kl is not None and d is not None:
            z.add_(d.mul_(g_kl[:, None]))
        z.sub_(a[:, None]).mul_(p)
    z.scatter_add_(1, target.clamp(0, z.shape[1] - 1)[:, None], a[:, None])
    if slope is not None:
        z.mul_(slope)


def _exact_kl(
    p: Tensor,  # (C, V), probabilities of the policy
    u: Tensor,  # (C, V), its logits less their maximum, finite
    log_total: Tensor,  # (C,), log of the sum of exp(u)
    zq: Tensor,  # (C, V), logits of the reference; overwritten
    target: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d, ref_logp, KL(p‖q)) with d = log p - log q - KL, in the place of `zq`.

    The textbook form Σ p (u - u_q) - log Σ e^u + log Σ e^u_q subtracts numbers near 1, and in
    float32 loses every KL below 1e-7. log1p Σ p·expm1(-d) is the same number without that loss;
    where it overflows (p tiny, q not) the KL is large and the textbook form is exact enough.
    Columns with p = 0 drop out of every sum but this last one, where their share of q remains.
    """
    absent = p == 0
    zq.sub_(zq.amax(1, keepdim=True))
    picked = _gather(zq, target)
    exp_q = zq.exp()
    log_total_q = exp_q.sum(1).log()
    unshared = exp_q.masked_fill_(~absent, 0).sum(1)
    d = torch.sub(u, zq, out=zq).masked_fill_(absent, 0)
    mean_d = torch.linalg.vecdot(p, d)
    d.sub_(mean_d[:, None]).masked_fill_(absent, 0)
    excess = torch.linalg.vecdot(p, (-d).expm1_()) + unshared * (mean_d - log_total).exp()
    textbook = mean_d - log_total + log_total_q
    stable = excess.isfinite() & (textbook < 0.5)
    # The first argument of where() is NaN or infinite only where it is not taken.
    kl = torch.where(stable, excess.clamp(min=-0.5).log1p(), textbook)
    return d, picked - log_total_q, kl.clamp(min=0)
