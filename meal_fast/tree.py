"""One forward pass over prompts and the many rows that share them: no prefix is computed twice.

A `Tree` holds the keys and values of B prefixes once, `Rows` those of R rows behind them. The model
is a plain transformers decoder; it is loaded with the attention function registered here, which
looks at what is handed to the forward pass:

    prefix pass   tokens_BP: causal; keys and values are kept as prefixes, one copy a prompt
    row pass      tokens_RT: every row sees its own prefix and, causally, its own earlier tokens
    packed pass   tokens_1N: prefixes and rows laid end to end, for training: prompt tokens go
                  through the model once for all their samples, and no padding goes at all

Padding of the first two is on the right, so positions are plain counts and a pad is never seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from .ops import Groups, prefix_attention

ATTENTION = "meal_fast_tree"


@dataclass
class Tree:
    """Keys and values of B prefixes, a list entry a layer."""

    valid_BP: Tensor  # bool, true on the real tokens, which come first
    prefix: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (B, H, P, d)

    def rows(self, group_R: Tensor, *, keep: bool = False, capacity: int = 0) -> Rows:
        """Rows behind these prefixes (shared, not copied). `capacity`: tokens to keep room for."""
        return Rows(self, group_R, Groups.of(group_R, len(self.valid_BP)), keep, capacity)

    def grown(self, rows: Rows, valid_RT: Tensor) -> Tree:
        """Prefixes made longer: row r's prefix and kept tail become prefix r of a new tree."""
        g, t = rows.group_R, valid_RT.shape[1]
        same = torch.equal(g, torch.arange(len(self.valid_BP), device=g.device))
        valid = torch.cat([self.valid_BP if same else self.valid_BP[g], valid_RT], 1)
        # The prefix's padding would be in the middle: real tokens first, in their order.
        length_R = valid.sum(1)
        at_RP = torch.sort(valid, dim=1, descending=True, stable=True).indices[
            :, : int(length_R.max())
        ]

        def joined(x: Tensor, tail: Tensor) -> Tensor:
            x = torch.cat([x if same else x[g], tail[:, :, :t]], 2)
            return x.gather(2, at_RP[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

        prefix = [
            (joined(pk, tk), joined(pv, tv))
            for (pk, pv), (tk, tv) in zip(self.prefix, rows.tail, strict=True)
        ]
        return Tree(valid.gather(1, at_RP), prefix)

    def reordered(self, order: Tensor) -> Tree:
        """The same prefixes in another order."""
        if torch.equal(order, torch.arange(len(order), device=order.device)):
            return self
        prefix = [(k[order], v[order]) for k, v in self.prefix]
        return Tree(self.valid_BP[order], prefix)


@dataclass
class Rows:
    """R rows, each behind one prefix. `keep`: what passes is kept in the tail (decoding)."""

    tree: Tree
    group_R: Tensor  # int64, the prefix of every row
    groups: Groups  # which rows lie behind which prefix
    keep: bool = False
    capacity: int = 0  # tokens of tail to make room for, when kept
    length: int = 0  # tokens of tail so far
    tail: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (R, H, capacity, d)

    def select(self, keep_R: Tensor) -> None:
        """Drops finished rows from the kept tail. keep_R: int64 indices, increasing."""
        self.group_R = self.group_R[keep_R]
        self.groups = Groups.of(self.group_R, len(self.tree.valid_BP))
        self.tail = [(k[keep_R], v[keep_R]) for k, v in self.tail]


@dataclass(frozen=True)
class Packed:
    """Prefixes and the rows behind them as one sequence of N tokens, without padding."""

    tokens_1N: Tensor
    positions_1N: Tensor
    group_R: Tensor
    prefix_BP: Tensor  # int64, places in the sequence; 0 where there is no token
    valid_BP: Tensor
    row_RT: Tensor  # the same of the rows
    prefix_at: Tensor  # int64, the real tokens' places in the flat (B, P); the rows' in (R, T).
    row_at: Tensor  # Known once: a boolean mask would make a GPU wait in every layer

    @property
    def before_RT(self) -> Tensor:
        """The place whose hidden state predicts the row's token t; T is one more than row_RT's."""
        ends_B = self.valid_BP.sum(1) - 1
        last_B = self.prefix_BP.gather(1, ends_B[:, None])
        return torch.cat([last_B[self.group_R], self.row_RT], 1)


def pack(
    prefixes: Sequence[Sequence[int]], group_R: Tensor, tokens_RT: Tensor, mask_RT: Tensor
) -> Packed:
    """Lays B prefixes end to end and, after them, R rows. A row's last token is left out: the
    states that predict a row are its prefix's last one and those of its tokens before the last.

    tokens_RT, mask_RT (R, T): the rows, padded on the right, at least one token each.
    """
    device = tokens_RT.device
    tokens_BP, valid_BP = pad(prefixes, device)
    tokens_RT, valid_RT = tokens_RT[:, :-1], mask_RT[:, 1:]
    steps = torch.arange(tokens_RT.shape[1], device=device)
    start_R = valid_BP.sum(1)[group_R]
    places = torch.arange(tokens_BP.shape[1], device=device).expand_as(tokens_BP)
    prefix_at, row_at = (v.flatten().nonzero().squeeze(1) for v in (valid_BP, valid_RT))

    def number(valid: Tensor, first: int) -> Tensor:
        return torch.where(valid, first - 1 + valid.flatten().cumsum(0).view_as(valid), 0)

    def joined(x_BP: Tensor, x_RT: Tensor) -> Tensor:
        return torch.cat([x_BP.flatten()[prefix_at], x_RT.flatten()[row_at]])[None]

    return Packed(
        tokens_1N=joined(tokens_BP, tokens_RT),
        positions_1N=joined(places, start_R[:, None] + steps),
        group_R=group_R,
        prefix_BP=number(valid_BP, 0),
        valid_BP=valid_BP,
        row_RT=number(valid_RT, len(prefix_at)),
        prefix_at=prefix_at,
        row_at=row_at,
    )


def check_supported(config: Any) -> None:
    """Raises ValueError for a model whose attention is more than causal softmax attention."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or [])
    if kinds - {"full_attention"} or (not kinds and getattr(text, "sliding_window", None)):
        raise ValueError(
            f"policy: {text.model_type} with {sorted(kinds) or 'sliding-window'} layers is not "
            "supported; use a model with full attention in every layer"
        )
    if getattr(text, "attn_logit_softcapping", None):
        raise ValueError(f"policy: {text.model_type} caps attention scores, which is not supported")


def _attention(
    module: Any,
    query: Tensor,  # (R, Hq, T, d)
    key: Tensor,  # (R, H, T, d)
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    tree: Tree | Rows | Packed | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if isinstance(tree, Packed):
        return _packed(query, key, value, tree, scale), None
    if not isinstance(tree, Rows):
        if tree is not None:
            tree.prefix.append((key, value))
        return _causal(query, key, value, scale).transpose(1, 2), None
    rows, layer = tree, module.layer_idx
    if rows.keep:
        if len(rows.tail) <= layer:
            room = (key.shape[0], key.shape[1], rows.capacity, key.shape[3])
            rows.tail.append((key.new_empty(room), key.new_empty(room)))
        tail_k, tail_v = rows.tail[layer]
        start, end = rows.length, rows.length + key.shape[2]
        tail_k[:, :, start:end] = key
        tail_v[:, :, start:end] = value
        key, value = tail_k[:, :, :end], tail_v[:, :, :end]
    pk, pv = rows.tree.prefix[layer]
    if query.shape[2] == 1 and not (torch.is_grad_enabled() and query.requires_grad):
        return _grouped(query, key, value, rows, pk, pv, scale).transpose(1, 2), None
    out = _expanded(query, key, value, rows.group_R, rows.tree.valid_BP, pk, pv, scale)
    return out.transpose(1, 2), None


def _repeat(x: Tensor, times: int) -> Tensor:
    return x if times == 1 else x.repeat_interleave(times, 1)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    rep = query.shape[1] // key.shape[1]
    return F.scaled_dot_product_attention(
        query, _repeat(key, rep), _repeat(value, rep), is_causal=True, scale=scale
    )


def _packed(query: Tensor, key: Tensor, value: Tensor, packed: Packed, scale: float) -> Tensor:
    """(1, H, N, d) each -> (1, N, H, d): prefixes causally, then every row behind its prefix."""

    def at(x: Tensor, places: Tensor) -> Tensor:  # (1, H, N, d) -> (B, H, P, d)
        return x[0].transpose(0, 1)[places].transpose(1, 2)

    q, pk, pv = (at(x, packed.prefix_BP) for x in (query, key, value))
    out = [_causal(q, pk, pv, scale).transpose(1, 2).flatten(0, 1)[packed.prefix_at]]
    if len(packed.row_at):
        q, k, v = (at(x, packed.row_RT) for x in (query, key, value))
        rows = _expanded(q, k, v, packed.group_R, packed.valid_BP, pk, pv, scale)
        out.append(rows.transpose(1, 2).flatten(0, 1)[packed.row_at])
    return torch.cat(out)[None]


def _expanded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group_R: Tensor,
    valid_BP: Tensor,
    pk: Tensor,
    pv: Tensor,
    scale: float,
) -> Tensor:
    """Each row's prefix is laid before its tail: where T is long beside P."""
    g, t, s = group_R, query.shape[2], key.shape[2]
    rep = query.shape[1] // key.shape[1]
    k = _repeat(torch.cat([pk[g], key], 2), rep)
    v = _repeat(torch.cat([pv[g], value], 2), rep)
    causal = torch.ones(t, s, dtype=torch.bool, device=query.device).tril(s - t)
    seen = valid_BP[g][:, None, None, :].expand(-1, 1, t, -1)
    mask = torch.cat([seen, causal.expand(len(g), 1, t, s)], -1)
    return F.scaled_dot_product_attention(query, k, v, attn_mask=mask, scale=scale)


def _grouped(
    query: Tensor, key: Tensor, value: Tensor, rows: Rows, pk: Tensor, pv: Tensor, scale: float
) -> Tensor:
    """One new token a row: the rows of a prefix share its single copy."""
    length_B = rows.tree.valid_BP.sum(1)
    tail_R = torch.full_like(rows.group_R, key.shape[2])
    out = prefix_attention(
        query[:, :, 0], pk, pv, length_B, rows.groups, key, value, tail_R, scale=scale
    )
    return out[:, :, None]


AttentionInterface.register(ATTENTION, _attention)


def prefill(body: nn.Module, prefixes: Sequence[Sequence[int]]) -> tuple[Tree, Tensor]:
    """Runs B prefixes through `body`; their tree, and each last token's hidden state (B, D)."""
    device = next(body.parameters()).device
    tokens_BP, valid_BP = pad(prefixes, device)
    tree = Tree(valid_BP)
    hidden = body(input_ids=tokens_BP, use_cache=False, tree=tree).last_hidden_state
    last = valid_BP.sum(1) - 1
    return tree, hidden[torch.arange(len(last), device=device), last]


def extend(body: nn.Module, rows: Rows, tokens_RT: Tensor) -> Tensor:
    """Runs T more tokens of every row: hidden states (R, T, D). Kept rows remember them."""
    start = rows.tree.valid_BP.sum(1)[rows.group_R] + rows.length
    positions = start[:, None] + torch.arange(tokens_RT.shape[1], device=tokens_RT.device)
    hidden = body(
        input_ids=tokens_RT, position_ids=positions, use_cache=False, tree=rows
    ).last_hidden_state
    if rows.keep:
        rows.length += tokens_RT.shape[1]
    return hidden


def forward(body: nn.Module, packed: Packed) -> Tensor:
    """Runs a packed batch: hidden states (N, D)."""
    return body(
        input_ids=packed.tokens_1N,
        position_ids=packed.positions_1N,
        use_cache=False,
        tree=packed,
    ).last_hidden_state[0]


def pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token lists as (tokens, valid): int64 and bool, padded on the right."""
    width = max(len(row) for row in rows)
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return tokens, torch.arange(width, device=device) < lengths[:, None]
