"""Tensors that several processes hold together: each process's part of one, and what all make up.

A tensor is shared where it is a DTensor. Any other is whole on every process, and every function
here takes it as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard


def is_shared(x: Tensor) -> bool:
    """Say whether several processes hold it together."""
    return isinstance(x, DTensor)


def local(x: Tensor) -> Tensor:
    """Give what this process holds of a tensor, without a copy: changed in place, x is changed."""
    if not isinstance(x, DTensor):
        return x
    with torch.no_grad():
        return x.to_local()


def gathered(x: Tensor) -> Tensor:
    """Give the whole of a tensor, on every process of its mesh: all of them must ask for it."""
    if not isinstance(x, DTensor):
        return x.detach()
    with torch.no_grad():
        whole: Tensor = x.full_tensor()
    return whole


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """Cut out of a tensor that is whole here what this process holds of `like`, of its shape."""
    if not isinstance(like, DTensor):
        return whole
    part = whole
    for dim, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            parts = part.chunk(like.device_mesh.size(dim), placement.dim)
            place = like.device_mesh.get_local_rank(dim)
            empty = part.narrow(placement.dim, 0, 0)  # chunks may be fewer than processes
            part = parts[place] if place < len(parts) else empty
    return part


class Held:
    """Parameters as a process trains them: `local`, plain tensors, and sums over all processes.

    `local[i]` has the memory of what this process holds of `parameters[i]`; a parameter that is
    whole here is itself. An optimizer, copies and differences work on `local` as on any parameters;
    `take_gradients` puts the gradients there, `norm` and `clip` are over the whole tensors.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.local: list[nn.Parameter] = [
            nn.Parameter(local(p)) if isinstance(p, DTensor) else p for p in self.parameters
        ]
        self._groups = [_group(p) for p in self.parameters]

    def take_gradients(self) -> None:
        """Move what backward passes have left in the parameters to `local`."""
        for p, own in zip(self.parameters, self.local, strict=True):
            if p is not own and p.grad is not None:
                own.grad, p.grad = local(p.grad), None

    def assembled(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Say of tensors shaped as `local` that they are parts of ones shaped as the parameters."""
        return [
            DTensor.from_local(x, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
            if isinstance(p, DTensor)
            else x
            for x, p in zip(tensors, self.parameters, strict=True)
        ]

    def parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Cut tensors shaped as the parameters to what this process holds of them."""
        return [part_of(x, p) for x, p in zip(tensors, self.parameters, strict=True)]

    def norm(self, tensors: Sequence[Tensor]) -> Tensor:
        """Give the Euclidean norm of the whole of `tensors`, shaped as `local`.

        Collective, where any is shared.
        """
        norms = [torch.linalg.vector_norm(t) for t in tensors]
        among = {g.group_name: g for g in self._groups if g is not None}
        for name, group in among.items():
            own = [n for n, g in enumerate(self._groups) if g is not None and g.group_name == name]
            squares = torch.stack([norms[n] for n in own]).square()
            dist.all_reduce(squares, group=group)
            for n, whole in zip(own, squares.sqrt().unbind(), strict=True):
                norms[n] = whole
        return torch.linalg.vector_norm(torch.stack(norms))

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients to a norm of at most `max_norm`; give that of before. Collective."""
        held = [p for p in self.local if p.grad is not None]
        if not any(self._groups):
            return nn.utils.clip_grad_norm_(held, max_norm)
        norm = self.norm([torch.zeros_like(p) if p.grad is None else p.grad for p in self.local])
        nn.utils.clip_grads_with_norm_(held, max_norm, norm)
        return norm


def _group(p: Tensor) -> dist.ProcessGroup | None:
    """The processes that hold different parts of p; None where it is whole here."""
    if isinstance(p, DTensor):
        for dim, placement in enumerate(p.placements):
            if isinstance(placement, Shard):
                return p.device_mesh.get_group(dim)
    return None
