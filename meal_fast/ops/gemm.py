"""Matrix products: float32 ones on a CPU through oneDNN, which torch uses for bfloat16 alone; LoRA.

torch's own float32 product is MKL's. On 2 cores of an AMD EPYC with AVX-512 that reaches 180
GFLOP/s at 1024 rows, and oneDNN's 430, with the same precision; Intel's processors were not tried.
Everything else (other dtypes and devices, a few rows, builds without oneDNN) is torch's product.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_FEW_ROWS = 8  # below, a product is a read of the matrix, and setting oneDNN up costs more
_LONG_RUN = 32  # rows: below, products of their own cost more than one with zeros
_THIN = 64  # a factor of LoRA: its gradient is faster made transposed

_onednn: Any = None
if torch.backends.mkldnn.is_available():
    _onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _suits(x: Tensor, columns: int) -> bool:
    """Whether x (…, K) times a matrix of so many columns is oneDNN's."""
    return (
        _onednn is not None
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() >= _FEW_ROWS * x.shape[-1] > 0
        and columns > 0
    )


def matmul(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Give a (M, K) @ b (K, N) + bias (N,) -> (M, N) of their dtype; no gradient. Any strides."""
    if _suits(a, b.shape[1]):
        return _onednn(a, b.t(), bias, "none", [], "")
    product = a @ b
    return product if bias is None else product.add_(bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Give x (…, K) @ weight (N, K)ᵀ + bias (N,), gradients too, as torch's own `linear`."""
    if x.dtype != weight.dtype or not _suits(x, len(weight)):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(x, weight)
        return matmul(flat, weight.t(), bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dy = upstream.reshape(-1, upstream.shape[-1]).contiguous()
        dx = matmul(dy, weight).view(x.shape) if needs_x else None
        dw = None
        if needs_weight:
            flat = x.reshape(-1, x.shape[-1])
            if x.shape[-1] <= _THIN < dy.shape[1]:
                dw = matmul(flat.t(), dy).t().contiguous()
            else:
                dw = matmul(dy.t(), flat)
        return dx, dw, dy.sum(0) if needs_bias else None


@dataclass(frozen=True)
class Blocks:
    """Say which of several low-rank terms, side by side in A and B, is each row's own."""

    others_NR: Tensor  # bool, true in the columns that are not the row's
    runs: tuple[tuple[slice, slice], ...] = ()  # rows and their columns, all of one width; or none

    @staticmethod
    def of(block_N: Tensor, block_R: Tensor) -> Blocks:
        """Make them from the block of each row, and of each column.

        On a CPU, where rows of a block lie together, as in training, its products are made for them
        alone; where they are few, as in decoding, one product with zeros is faster.
        """
        others = block_N[:, None] != block_R
        if block_N.device.type != "cpu":
            return Blocks(others)
        block, count = (x.tolist() for x in torch.unique_consecutive(block_N, return_counts=True))
        if len(block_N) < _LONG_RUN * len(block):
            return Blocks(others)
        ends = [0, *accumulate(count)]
        width = len(block_R) // (int(block_R[-1]) + 1)
        columns = [slice(i * width, (i + 1) * width) for i in block]
        rows = [slice(*pair) for pair in pairwise(ends)]
        return Blocks(others, tuple(zip(rows, columns, strict=True)))


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    blocks: Blocks | None = None,
) -> Tensor:
    """Give x Wᵀ + bias + scale · (x Aᵀ) Bᵀ with W (N, K) frozen, A (r, K), B (N, r): (…, N).

    With `blocks` each row of x sees its own share of the r columns of x Aᵀ.

    One function: the low-rank term is added within its product, both ways, and what is kept for the
    gradient is x, as it is, and x Aᵀ alone. In low precision the factors, float32, are rounded for
    the products and their gradients are summed in float32; with B = 0 the result is exactly x Wᵀ.
    """
    others = None if blocks is None else blocks.others_NR
    frozen = x.dtype == weight.dtype and not weight.requires_grad
    if frozen and a.dtype == b.dtype == x.dtype and _suits(x, len(weight)):
        if blocks is not None and blocks.runs:
            return _Runs.apply(x, weight, bias, a, b, scale, blocks.runs)
        return _LoRA.apply(x, weight, bias, a, b, scale, others)
    if frozen and (x.dtype in (torch.bfloat16, torch.float16) or x.device.type == "cuda"):
        return _LibraryLoRA.apply(x, weight, bias, a, b, scale, others)
    low = F.linear(x.to(a.dtype), a)
    if others is not None:
        low = low.masked_fill(others.view(low.shape), 0)
    return F.linear(x, weight, bias) + (F.linear(low, b) * scale).to(x.dtype)


def _add_product(a: Tensor, b: Tensor, to: Tensor) -> Tensor:
    """Give to + a @ b."""
    return _onednn.binary(a, to, b.t(), None, "add")


class _LoRA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        others: Tensor | None,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low = matmul(flat, a.t()).mul_(scale)
        if others is not None:
            low.masked_fill_(others, 0)
        ctx.save_for_backward(flat, weight, a, b, low)
        ctx.scale, ctx.others = scale, others
        out = _add_product(low, b.t(), to=matmul(flat, weight.t(), bias))
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, a, b, low = ctx.saved_tensors
        dy = upstream.reshape(-1, upstream.shape[-1]).contiguous()
        d_low = matmul(dy, b).mul_(ctx.scale)
        if ctx.others is not None:
            d_low.masked_fill_(ctx.others, 0)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _add_product(d_low, a, to=matmul(dy, weight))
            dx = dx.view(*upstream.shape[:-1], weight.shape[1])
        da = matmul(d_low.t(), flat) if ctx.needs_input_grad[3] else None
        db = matmul(low.t(), dy).t().contiguous() if ctx.needs_input_grad[4] else None
        return dx, None, None, da, db, None, None


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Give a @ b with float32 sums and result, or float64 ones of float64 factors."""
    if a.dtype in (torch.float32, torch.float64):
        return matmul(a, b)
    if a.device.type == "cpu":  # which has no such product of low precision
        return matmul(a.float(), b.float())
    return torch.mm(a, b, out_dtype=torch.float32)


class _LibraryLoRA(torch.autograd.Function):
    """`_LoRA` through torch's products, in any dtype: on a GPU four launches more than the layer's
    own, and five back."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        others: Tensor | None,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        scaled_a = torch.mul(a, scale, out=torch.empty_like(a, dtype=x.dtype))
        own_b = b.to(x.dtype)
        low = flat @ scaled_a.t()
        if others is not None:
            low.masked_fill_(others, 0)
        ctx.save_for_backward(flat, weight, scaled_a, own_b, low)
        ctx.scale, ctx.others, ctx.dtypes = scale, others, (a.dtype, b.dtype)
        out = F.linear(flat, weight, bias).addmm_(low, own_b.t())
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, scaled_a, own_b, low = ctx.saved_tensors
        dy = upstream.reshape(-1, upstream.shape[-1])
        d_low = dy @ own_b
        if ctx.others is not None:
            d_low.masked_fill_(ctx.others, 0)
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight).addmm_(d_low, scaled_a)
            dx = dx.view(*upstream.shape[:-1], weight.shape[1])
        a_dtype, b_dtype = ctx.dtypes
        if ctx.needs_input_grad[3]:
            da = wide_product(d_low.t(), flat).mul_(ctx.scale).to(a_dtype)
        if ctx.needs_input_grad[4]:
            db = wide_product(dy.t(), low).to(b_dtype)
        return dx, None, None, da, db, None, None


class _Runs(torch.autograd.Function):
    """`_LoRA` where each run of rows has a pair of factors of its own: blocks of a and b."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        runs: tuple[tuple[slice, slice], ...],
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = matmul(flat, weight.t(), bias)
        lows = []
        for rows, block in runs:
            lows.append(matmul(flat[rows], a[block].t()).mul_(scale))
            out[rows].addmm_(lows[-1], b[:, block].t())
        ctx.save_for_backward(flat, weight, a, b, *lows)
        ctx.scale, ctx.runs = scale, runs
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, a, b, *lows = ctx.saved_tensors
        dy = upstream.reshape(-1, upstream.shape[-1]).contiguous()
        dx = matmul(dy, weight) if ctx.needs_input_grad[0] else None
        da, db = torch.zeros_like(a), torch.zeros_like(b)
        for (rows, block), low in zip(ctx.runs, lows, strict=True):
            d_low = torch.mm(dy[rows], b[:, block]).mul_(ctx.scale)
            if dx is not None:
                dx[rows].addmm_(d_low, a[block])
            da[block].addmm_(d_low.t(), flat[rows])
            db[:, block].addmm_(dy[rows].t(), low)
        if dx is not None:
            dx = dx.view(*upstream.shape[:-1], weight.shape[1])
        return dx, None, None, da, db, None, None


class _Module(nn.Linear):
    """`nn.Linear` whose product is `linear` above."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def accelerate(model: nn.Module) -> nn.Module:
    """Make every plain `nn.Linear` of `model` use `linear`, in place; parameters stay as they are.

    For models that run in float32 on a CPU; for anything else the product is torch's, as before.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = _Module
    return model
