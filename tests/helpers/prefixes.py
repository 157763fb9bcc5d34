"""Rows behind shared prefixes, and their attention in float64, row by row."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from meal_fast import ops


@dataclass(frozen=True)
class Case:
    """The arguments of prefix_attention."""

    query: Tensor
    prefix_key: Tensor
    prefix_value: Tensor
    prefix_length: Tensor
    group: Tensor
    tail_key: Tensor
    tail_value: Tensor
    tail_length: Tensor

    def run(self, **options) -> Tensor:
        return ops.prefix_attention(*vars(self).values(), **options)

    def to(self, device: str = "cpu", dtype: torch.dtype | None = None) -> Case:
        moved = {
            name: x.to(device, dtype if x.is_floating_point() else None)
            for name, x in vars(self).items()
        }
        return Case(**moved)

    def spoiled(self) -> Case:
        """The same, with NaN and infinity beyond the lengths."""

        def spoil(x: Tensor, lengths: Tensor, value: float) -> Tensor:
            beyond = torch.arange(x.shape[2], device=x.device) >= lengths[:, None]
            return x.masked_fill(beyond[:, None, :, None], value)

        return replace(
            self,
            prefix_key=spoil(self.prefix_key, self.prefix_length, torch.nan),
            prefix_value=spoil(self.prefix_value, self.prefix_length, torch.inf),
            tail_key=spoil(self.tail_key, self.tail_length, torch.inf),
            tail_value=spoil(self.tail_value, self.tail_length, torch.nan),
        )

    def expected(self, scale: float | None = None) -> Tensor:
        """(R, Hq, d) float64: each row's keys and values gathered, one row and head at a time."""
        q = self.query.double()
        r, hq, d = q.shape
        rep = hq // self.prefix_key.shape[1]
        out = torch.zeros(r, hq, d, dtype=torch.float64)
        for i, g in enumerate(self.group.tolist()):
            p, t = int(self.prefix_length[g]), int(self.tail_length[i])
            for j in range(hq):
                h = j // rep
                k = torch.cat([self.prefix_key[g, h, :p], self.tail_key[i, h, :t]]).double()
                v = torch.cat([self.prefix_value[g, h, :p], self.tail_value[i, h, :t]]).double()
                score = k @ q[i, j] * (d**-0.5 if scale is None else scale)
                out[i, j] = score.softmax(0) @ v
        return out


def draw(
    group: list[int],
    prefix_length: list[int],
    tail_length: list[int],
    *,
    heads: int = 2,
    rep: int = 2,
    d: int = 4,
    spare: int = 1,
    seed: int = 0,
    size: float = 1.0,
) -> Case:
    """Random keys, values and queries; `spare`: places beyond the longest of each length."""
    generator = torch.Generator().manual_seed(seed)
    r, b = len(group), len(prefix_length)
    p, t = (max(lengths, default=0) + spare for lengths in (prefix_length, tail_length))

    def normal(*shape: int) -> Tensor:
        return size * torch.randn(shape, generator=generator)

    return Case(
        normal(r, heads * rep, d),
        normal(b, heads, p, d),
        normal(b, heads, p, d),
        torch.tensor(prefix_length, dtype=torch.int64),
        torch.tensor(group, dtype=torch.int64),
        normal(r, heads, t, d),
        normal(r, heads, t, d),
        torch.tensor(tail_length, dtype=torch.int64),
    )
