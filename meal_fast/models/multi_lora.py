"""Adapters of several tasks over one frozen base, in one forward and backward pass.

    y_n = x_n W^T + scale * (x_n A_t^T) B_t^T,   t the task of token n

The factors of T tasks lie side by side as one adapter of rank T * r, (A_0 ... A_T) and
(B_0 ... B_T); of its inner product x A^T a token keeps the columns of its own task, and the others
are set to zero (`ops.gemm.Blocks`). What a pass over several tasks' tokens hands to the model
(`tree=`) says whose they are. It has never been run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from meal_fast.ops.gemm import Blocks, lora_linear

Tasks = Sequence[Sequence[Tensor]]  # of each task its factors, in one order


class Route:
    """Which columns of the inner products are of a token's own task."""

    def __init__(self, tasks: int, rank: int, device: torch.device) -> None:
        self.task_R = torch.arange(tasks, device=device).repeat_interleave(rank)
        self.blocks: Blocks | None = None

    def follow(self, body: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Note, before a pass of the model, whose its tokens are."""
        ids = kwargs["input_ids"]
        self.blocks = Blocks.of(kwargs["tree"].task_id.expand_as(ids).reshape(-1), self.task_R)


class Factors:
    """One layer's factors of all tasks: a (T*r, K), b (N, T*r)."""

    def __init__(self, a: Sequence[Tensor], b: Sequence[Tensor], route: Route) -> None:
        self.tasks, self.route = (a, b), route
        self.a, self.b = (
            torch.cat([x.detach() for x in parts], dim).requires_grad_()
            for dim, parts in enumerate(self.tasks)
        )

    def give_back(self) -> None:
        """Give what the passes left of gradient to the tasks' own tensors."""
        for dim, (joined, parts) in enumerate(zip((self.a, self.b), self.tasks, strict=True)):
            if joined.grad is not None:
                for own, grad in zip(parts, joined.grad.chunk(len(parts), dim), strict=True):
                    own.grad = grad.contiguous()


def fuse(model: Any) -> Any:
    """Compute PEFT's layers on plain linear ones by `lora_linear`, and ready them for `stacked`.

    In place; returns the model.
    """
    from peft.tuners.lora import Linear

    class Fused(Linear):
        stack: Factors | None = None

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.disable_adapters:
                return self.base_layer(x)
            base: Any = self.base_layer
            scale, of = self.scaling["default"], self.stack
            if of is not None:
                blocks = of.route.blocks
                return lora_linear(x, base.weight, base.bias, of.a, of.b, scale, blocks)
            a: Any = self.lora_A["default"]
            b: Any = self.lora_B["default"]
            return lora_linear(x, base.weight, base.bias, a.weight, b.weight, scale)

    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear:
            module.__class__ = Fused
    return model


def mergeable(layer: Any) -> bool:
    """Tell whether its factors can be multiplied out: one pair, not those of several tasks."""
    return getattr(layer, "stack", None) is None


def layers_of(model: nn.Module, body: nn.Module, trainable: Sequence[nn.Parameter]) -> list[Any]:
    """Find those with adapters. Raises ValueError for adapters on layers that `fuse` leaves."""
    layers = [m for m in model.modules() if hasattr(m, "stack")]
    if 2 * len(layers) != len(trainable):
        raise ValueError(
            f"meta.parallel=True: {type(body).__name__} has adapters on layers that are not plain "
            "linear ones; leave it out"
        )
    return layers


@contextmanager
def stacked(
    model: nn.Module, body: nn.Module, trainable: Sequence[nn.Parameter], tasks: Tasks
) -> Iterator[None]:
    """Let fused layers compute with the tasks' factors, as these are when it begins.

    tasks: of each the factors in the order of `trainable`. When it ends, their `grad` holds the
    gradient of the passes made in it, where there were any that go back.

    Raises ValueError as `layers_of`.
    """
    number = {id(p): i for i, p in enumerate(trainable)}
    layers = layers_of(model, body, trainable)
    of = [
        (number[id(m.lora_A["default"].weight)], number[id(m.lora_B["default"].weight)])
        for m in layers
    ]
    first = tasks[0][of[0][0]]
    route = Route(len(tasks), len(first), first.device)
    hook = body.register_forward_pre_hook(route.follow, with_kwargs=True)
    try:
        for layer, (a, b) in zip(layers, of, strict=True):
            layer.stack = Factors([t[a] for t in tasks], [t[b] for t in tasks], route)
        yield
        for layer in layers:
            layer.stack.give_back()
    finally:
        hook.remove()
        for layer in layers:
            layer.stack = None
