"""Float32 matrix products on a CPU through oneDNN, which torch uses for bfloat16 alone.

torch's own float32 product is MKL's. On 2 cores of an AMD EPYC with AVX-512 that reaches 180
GFLOP/s at 1024 rows, and oneDNN's 430, with the same precision; Intel's processors were not tried.
Everything else (other dtypes and devices, a few rows, builds without oneDNN) is torch's product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_FEW_ROWS = 8  # below, a product is a read of the matrix, and setting oneDNN up costs more
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
    """a (M, K) @ b (K, N) + bias (N,) -> (M, N) of their dtype; no gradient. Any strides."""
    if _suits(a, b.shape[1]):
        return _onednn(a, b.t(), bias, "none", [], "")
    product = a @ b
    return product if bias is None else product.add_(bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, K) @ weight (N, K)ᵀ + bias (N,): `torch.nn.functional.linear`, gradients too."""
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


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """x Wᵀ + bias + scale · (x Aᵀ) Bᵀ with W (N, K) frozen, A (r, K), B (N, r): (…, N).

    On a CPU in float32, one function: the low-rank term is added within its product, both ways,
    and what is kept for the gradient is x and x Aᵀ alone.
    """
    one_dtype = x.dtype == weight.dtype == a.dtype == b.dtype
    if not one_dtype or weight.requires_grad or not _suits(x, len(weight)):
        low = F.linear(F.linear(x.to(a.dtype), a), b) * scale
        return F.linear(x, weight, bias) + low.to(x.dtype)
    return _LoRA.apply(x, weight, bias, a, b, scale)


def _add_product(a: Tensor, b: Tensor, to: Tensor) -> Tensor:
    """to + a @ b."""
    return _onednn.binary(a, to, b.t(), None, "add")


class _LoRA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low = matmul(flat, a.t()).mul_(scale)
        ctx.save_for_backward(flat, weight, a, b, low)
        ctx.scale = scale
        out = _add_product(low, b.t(), to=matmul(flat, weight.t(), bias))
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        flat, weight, a, b, low = ctx.saved_tensors
        dy = upstream.reshape(-1, upstream.shape[-1]).contiguous()
        d_low = matmul(dy, b).mul_(ctx.scale)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _add_product(d_low, a, to=matmul(dy, weight))
            dx = dx.view(*upstream.shape[:-1], weight.shape[1])
        da = matmul(d_low.t(), flat) if ctx.needs_input_grad[3] else None
        db = matmul(low.t(), dy).t().contiguous() if ctx.needs_input_grad[4] else None
        return dx, None, None, da, db, None


class _Module(nn.Linear):
    """`nn.Linear` whose product is `linear` above."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def accelerate(model: nn.Module) -> nn.Module:
    """Makes every plain `nn.Linear` of `model` use `linear`, in place; parameters stay as they are.

    For models that run in float32 on a CPU; for anything else the product is torch's, as before.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = _Module
    return model
