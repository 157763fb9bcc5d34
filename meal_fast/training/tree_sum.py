"""Sums whose rounding depends on what is summed, and not on how many processes it is spread over.

The terms 0 … n-1 are the leaves of a binary tree: neighbours are added, then neighbouring sums, and
what has no neighbour goes up as it is. Each process adds what it has of the tree; the rest is added
slice by slice: every process gets one slice of all the sums (all-to-all), adds them up as the tree
says, and gives the slice back to all (all-gather). A process then sends (m + 1)(P - 1)/P times the
size of a term, with m sums of its own, mostly one: as much as the ring's all-reduce.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Node = tuple[int, int]  # level from the leaves up, place in it
_BUCKET = 1 << 24  # numbers that are exchanged at once
# By its later name, where torch has it and warns of the other.
_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Guarded = Callable[..., Any]  # calls a collective operation: (operation, *arguments)


class TreeSum:
    """Add lists of tensors up, each as soon as its neighbour is there.

    `count` is the number of leaves. What is given to `add` is its own from then on.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.held: dict[Node, list[Tensor]] = {}

    def add(self, number: int, terms: list[Tensor]) -> None:
        """Add a leaf."""
        self.put((0, number), terms)

    @torch.no_grad()
    def put(self, node: Node, terms: list[Tensor]) -> None:
        """Add a node of the tree."""
        while node[0] < _height(self.count):
            level, place = node
            if (place ^ 1) << level < self.count:  # it has a neighbour
                other = self.held.pop((level, place ^ 1), None)
                if other is None:
                    break
                if terms:  # a sum of two is the same both ways round
                    torch._foreach_add_(other, terms)
                terms = other
            node = level + 1, place >> 1
        self.held[node] = terms

    @property
    def whole(self) -> list[Tensor]:
        """Give the sum, where all leaves are here."""
        (terms,) = self.held.values()
        return terms


def nodes(numbers: Iterable[int], count: int) -> list[Node]:
    """Name the sums that a process holds which has been given these leaves, of `count`."""
    tree = TreeSum(count)
    for number in numbers:
        tree.add(number, [])
    return sorted(tree.held)


def _height(count: int) -> int:
    return (count - 1).bit_length()


def summed_over(
    tree: TreeSum,
    owners: Sequence[Sequence[int]],
    group: dist.ProcessGroup,
    like: Sequence[Tensor],
    call: Guarded,
) -> tuple[list[Tensor], int]:
    """Give the whole sum on every process of `group`, and how many bytes this one sent.

    Args:
        tree: with the leaves of this process.
        owners: of each process of the group, its leaves; together all of them.
        like: tensors of a term's shapes and types.
    """
    size, me = len(owners), dist.get_rank(group)
    held = [nodes(numbers, tree.count) for numbers in owners]
    mine = [tree.held[node] for node in held[me]]
    whole: list[Tensor] = [torch.empty(0)] * len(like)
    sent = 0
    for places in _buckets(like):
        shapes = [like[i].shape for i in places]
        length = sum(shape.numel() for shape in shapes)
        width = -(-length // size)
        first = like[places[0]]
        out = first.new_zeros(len(mine), size * width)
        for row, terms in zip(out, mine, strict=True):
            torch.cat([terms[i].reshape(-1) for i in places], out=row[:length])
        # Slice by slice, and of each slice all of this process's sums.
        out = out.view(len(mine), size, width).transpose(0, 1).contiguous().view(-1)
        found = first.new_empty(sum(map(len, held)) * width)
        call(
            dist.all_to_all_single,
            found,
            out,
            [len(h) * width for h in held],
            [len(mine) * width] * size,
            group=group,
        )
        slices = TreeSum(tree.count)
        for node, part in zip((n for h in held for n in h), found.split(width), strict=True):
            slices.put(node, [part])
        gathered = first.new_empty(size * width)
        call(_gather, gathered, slices.whole[0], group=group)
        parts = gathered[:length].split([shape.numel() for shape in shapes])
        for i, shape, part in zip(places, shapes, parts, strict=True):
            whole[i] = part.view(shape)
        sent += (len(mine) + 1) * (size - 1) * width * first.element_size()
    return whole, sent


def _buckets(like: Sequence[Tensor]) -> list[list[int]]:
    """Group the tensors' places: of one type and device, not too many numbers."""
    found: list[list[int]] = []
    open_: dict[tuple[torch.dtype, torch.device], tuple[list[int], int]] = {}
    for i, tensor in enumerate(like):
        key, n = (tensor.dtype, tensor.device), tensor.numel()
        places, held = open_.get(key, ([], 0))
        if not places or held + n > _BUCKET:
            places, held = [], 0
            found.append(places)
        places.append(i)
        open_[key] = places, held + n
    return found
