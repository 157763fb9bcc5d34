"""Adapters of several tasks over one frozen base, in one forward and backward pass.

    y_n = x_n W^T + scale * (x_n A_t^T) B_t^T,   t the task of token n

The factors of T tasks lie side by side as one adapter of rank T * r, (A_0 ... A_T) and
(B_0 ... B_T); of its inner product x A^T a token keeps the columns of its own task, and the others
are set to zero. What a pass over several tasks' tokens hands to the model (`tree=`) says whose they
are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .ops.gemm import Blocks

Tasks = Sequence[Sequence[Tensor]]  # of each task its factors, in one order


class Route:
    """Which columns of the inner products are of a token's own task."""

    def __init__(self, tasks: int, rank: int, device: torch.device) -> None:
        self.task_R = torch.arange(tasks, device=device).repeat_interleave(rank)
        self.blocks: Blocks | None = None

    def follow(self, body: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before a pass of the model: whose its tokens are."""
        ids = kwargs["input_ids"]
        self.blocks = Blocks.of(kwargs["tree"].adapter.expand_as(ids).reshape(-1), self.task_R)


class Factors:
    """One layer's factors of all tasks: a (T*r, K), b (N, T*r)."""

    def __init__(self, a: Sequence[Tensor], b: Sequence[Tensor], route: Route) -> None:
        self.tasks, self.route = (a, b), route
        self.a, self.b = (
            torch.cat([x.detach() for x in parts], dim).requires_grad_()
            for dim, parts in enumerate(self.tasks)
        )

    def give_back(self) -> None:
        """What the passes left of gradient, to the tasks' own tensors."""
        for dim, (joined, parts) in enumerate(zip((self.a, self.b), self.tasks, strict=True)):
            if joined.grad is not None:
                for own, grad in zip(parts, joined.grad.chunk(len(parts), dim), strict=True):
                    own.grad = grad.contiguous()


@contextmanager
def stacked(
    body: nn.Module, layers: Sequence[tuple[Any, int, int]], tasks: Tasks
) -> Iterator[None]:
    """While it lasts, `layers` compute with the tasks' factors as these are now.

    layers: each one with the numbers of its A and B among a task's factors; its `stack` is set.
    When it ends, every factor's `grad` holds the gradient of the passes made in it.
    """
    first = tasks[0][layers[0][1]]
    route = Route(len(tasks), len(first), first.device)
    hook = body.register_forward_pre_hook(route.follow, with_kwargs=True)
    try:
        for layer, a, b in layers:
            layer.stack = Factors([t[a] for t in tasks], [t[b] for t in tasks], route)
        yield
        for layer, _, _ in layers:
            layer.stack.give_back()
    finally:
        hook.remove()
        for layer, _, _ in layers:
            layer.stack = None
