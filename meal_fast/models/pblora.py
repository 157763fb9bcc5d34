"""The adapter of PARM: one guide model, conditioned on the preference w through its weights.

Each linear layer of the frozen base gets (PBLoRA; Lin et al., "PARM", 2025 [P])

    W(w) = W + s [B1 W1 A1 + B2 reshape(P w) A2],    s = alpha / r

with A1, A2 (r, in), B1, B2 (out, r), W1 (r, r) and P (r, r, K), so that reshape(P w)_ij is
sum_k P_ijk w_k. The first term is the same for every w, the second is linear in it. B1 = B2 = 0 at
the start: the guide is the base model; W1 starts as the identity, so that the first term starts as
plain LoRA, and P is drawn with a variance of 1/r: both are ours [R], as is one rank for both terms.

In training w differs from row to row; (x A2ᵀ) ⊗ w is mixed by P, and no matrix is made for a row.
At one w the adapter is a matrix of rank 2r, which sampling adds to W: see guide.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from meal_fast.ops.gemm import linear


class Bilinear(nn.Module):
    """A frozen linear layer and its factors, which are float32."""

    def __init__(self, base: nn.Linear, k: int, rank: int, scale: float) -> None:
        super().__init__()
        self.base_layer, self.scale = base, scale
        out, width = base.weight.shape

        def factor(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, device=base.weight.device))

        self.a1, self.a2 = factor(rank, width), factor(rank, width)
        self.b1, self.b2 = factor(out, rank), factor(out, rank)
        self.w1, self.p = factor(rank, rank), factor(rank, rank, k)
        self.w: Tensor | None = None  # (K,), or one for each place of x; None: the base layer
        self.merged: Tensor | None = None  # W(w), where it has been added up

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> None:
        """Draw the factors' first values."""
        rank, width = self.a1.shape
        for a in (self.a1, self.a2):
            a.uniform_(-1, 1, generator=generator).div_(math.sqrt(width))
        self.w1.copy_(torch.eye(rank))
        self.p.normal_(0, rank**-0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        if self.w is None:
            return self.base_layer(x)
        if self.merged is not None:
            return linear(x, self.merged, self.base_layer.bias)
        low1, low2 = linear(x.to(self.a1.dtype), torch.cat([self.a1, self.a2])).chunk(2, -1)
        mixed = (low2[..., None] * self.w[..., None, :]).flatten(-2) @ self.p.flatten(1).t()
        low = torch.cat([low1 @ self.w1.t(), mixed], -1) * self.scale
        more = linear(low, torch.cat([self.b1, self.b2], 1))
        return self.base_layer(x) + more.to(x.dtype)

    @torch.no_grad()
    def delta(self, w: Tensor) -> Tensor:
        """Compute s [B1 W1 A1 + B2 reshape(P w) A2] for one w (K,): (out, in), float32."""
        return self.scale * (self.b1 @ self.w1 @ self.a1 + self.b2 @ (self.p @ w) @ self.a2)


class Adapter:
    """All bilinear layers of a model, by name, and the preference that they are at."""

    def __init__(self, model: nn.Module, k: int, rank: int, alpha: int, seed: int) -> None:
        """Put them in place of every linear layer but the head, and freeze all else.

        Raises ValueError for a model without such layers.
        """
        model.requires_grad_(False)
        head = model.get_output_embeddings()  # type: ignore[operator]
        plain = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and m is not head}
        if not plain:
            raise ValueError(
                f"policy.path: {type(model).__name__} has no plain linear layers, which recipe "
                "'parm' adapts; use a Llama- or Qwen-like model"
            )
        self.k, self.layers = k, {}
        generator = torch.Generator().manual_seed(seed)
        for name, base in plain.items():
            layer = Bilinear(base, k, rank, alpha / rank)
            layer.draw(generator)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
            self.layers[name] = layer

    @property
    def w(self) -> Tensor | None:
        return next(iter(self.layers.values())).w

    @contextmanager
    def at(self, w: Tensor | None) -> Iterator[None]:
        """Make the model the guide at w, within it: (K,), or (N, K) for N places of a packed pass;
        None: the base model. A backward pass that recomputes belongs inside."""
        before = self.w
        try:
            self._set(w)
            yield
        finally:
            self._set(before)

    def _set(self, w: Tensor | None) -> None:
        for layer in self.layers.values():
            layer.w = w

    @contextmanager
    def merged(self, w: Tensor) -> Iterator[None]:
        """Let the layers hold W(w), within it, for passes at w: a copy of the weights, and two of
        three products less. In bfloat16 the sum would be rounded: those factors stay apart."""
        try:
            for layer in self.layers.values():
                if layer.base_layer.weight.dtype == torch.float32:
                    layer.merged = layer.base_layer.weight + layer.delta(w)
            yield
        finally:
            for layer in self.layers.values():
                layer.merged = None

    def state(self, base: dict[str, Tensor], w: Tensor) -> dict[str, Tensor]:
        """Give the plain model's state at w, from `base`, that of the model with these layers."""
        factors = {
            f"{n}.{p}" for n, m in self.layers.items() for p, _ in m.named_parameters(recurse=False)
        }
        state = {n.replace(".base_layer.", "."): v for n, v in base.items() if n not in factors}
        for name, layer in self.layers.items():
            state[f"{name}.weight"] = state[f"{name}.weight"] + layer.delta(w)
        return state

    def save(self, path: Path) -> None:
        """Write a safetensors file of the factors, LAYER.a1 and so on."""
        factors = {
            f"{name}.{part}": value.detach().cpu().contiguous()
            for name, layer in self.layers.items()
            for part, value in layer.named_parameters(recurse=False)
        }
        save_file(factors, path)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Raise ValueError where there is no such file, or it is of another model or shape."""
        try:
            held = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{str(path)!r}: no factors of a guide ({error})") from None
        mine = {
            f"{name}.{part}": value
            for name, layer in self.layers.items()
            for part, value in layer.named_parameters(recurse=False)
        }
        other = [n for n in sorted(mine.keys() | held.keys()) if _shape(mine, n) != _shape(held, n)]
        if other:
            raise ValueError(
                f"{str(path)!r}: {other[0]} is {_shape(held, other[0])} there and "
                f"{_shape(mine, other[0])} here; load it with the run's own model and options"
            )
        for name, value in mine.items():
            value.copy_(held[name])


def _shape(tensors: dict[str, Any], name: str) -> tuple[int, ...] | str:
    return tuple(tensors[name].shape) if name in tensors else "missing"
