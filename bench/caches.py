"""What `prefix_attention` is measured against: a cache with a copy of its prefix for every row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from meal_fast import ops


class Step:
    """One decode step of rows behind prefixes of P tokens, T tokens of their own each."""

    def __init__(
        self,
        group: Tensor,  # (R,)
        p: int,
        t: int,
        heads: tuple[int, int, int],  # of queries, of keys, and their width
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(0)
        (hq, h, d), r, b = heads, len(group), int(group.max()) + 1

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype)

        self.query = normal(r, hq, d)
        self.prefix = normal(b, h, p, d), normal(b, h, p, d)
        self.tail = normal(r, h, t, d), normal(r, h, t, d)
        self.prefix_length = torch.full((b,), p, device=device)
        self.tail_length = torch.full((r,), t, device=device)
        self.group = group.to(device)
        self.groups = ops.Groups.of(self.group, b)  # once a step, for all layers
        self.bytes = 2 * self.query.element_size() * (b * p + r * t) * h * d
        self.copied = tuple(
            torch.cat([x[self.group], y], 2) for x, y in zip(self.prefix, self.tail, strict=True)
        )
        # One token shorter, and that token: what a cache that grows puts together again.
        self.before = tuple(x[:, :, :-1].contiguous() for x in self.copied)
        self.new = tuple(x[:, :, -1:].contiguous() for x in self.copied)

    def ours(self, impl: str | None = None) -> Tensor:
        return ops.prefix_attention(
            self.query,
            *self.prefix,
            self.prefix_length,
            self.groups,
            *self.tail,
            self.tail_length,
            impl=impl,
        )

    def attend(self, key: Tensor, value: Tensor) -> Tensor:
        query = self.query[:, :, None]
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)[:, :, 0]

    def static(self) -> Tensor:
        """A cache in place, as long as it has to be: no step can do less with copies."""
        return self.attend(*self.copied)

    def grown(self) -> Tensor:
        """As transformers' DynamicCache: every step puts the cache together anew."""
        return self.attend(
            *(torch.cat([x, y], 2) for x, y in zip(self.before, self.new, strict=True))
        )
