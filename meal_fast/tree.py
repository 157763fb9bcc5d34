"""Forward passes over prompts and the many rows that share them: no prefix is computed twice.

The model is a plain transformers decoder, loaded with the attention function registered here. What
a forward pass does with its keys and values is said by the object handed to it as `tree=`:

    none          a plain causal pass
    Packed        prefixes and rows laid end to end, for training: prompt tokens go through the
                  model once for all their samples, and no padding goes at all
    rollout.cache the sampler's passes over prompts, suffixes and single new tokens

Padding is on the right, so positions are plain counts and a pad is never seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

ATTENTION = "meal_fast_tree"


class Pass(Protocol):
    """What a forward pass does with the queries, keys and values of a layer."""

    @property
    def adapter(self) -> Tensor:
        """int64, of the shape of the tokens or to be expanded to it: see `stacked`."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """query (R, Hq, T, d), key and value (R, H, T, d) -> (R, T, Hq, d)."""


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
    adapter_B: Tensor  # int64: see `stacked`

    @property
    def before_RT(self) -> Tensor:
        """The place whose hidden state predicts the row's token t; T is one more than row_RT's."""
        ends_B = self.valid_BP.sum(1) - 1
        last_B = self.prefix_BP.gather(1, ends_B[:, None])
        return torch.cat([last_B[self.group_R], self.row_RT], 1)

    @property
    def group_N(self) -> Tensor:
        """The prefix that each token is of, or stands behind."""
        width_P, width_T = self.prefix_BP.shape[1], max(self.row_RT.shape[1], 1)
        return torch.cat([self.prefix_at // width_P, self.group_R[self.row_at // width_T]])

    @property
    def adapter(self) -> Tensor:
        return self.adapter_B[self.group_N][None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Prefixes causally, then every row behind its prefix: `Pass`."""

        def at(x: Tensor, places: Tensor) -> Tensor:  # (1, H, N, d) -> (B, H, P, d)
            return x[0].transpose(0, 1)[places].transpose(1, 2)

        q, pk, pv = (at(x, self.prefix_BP) for x in (query, key, value))
        out = [causal(q, pk, pv, scale).transpose(1, 2).flatten(0, 1)[self.prefix_at]]
        if len(self.row_at):
            q, k, v = (at(x, self.row_RT) for x in (query, key, value))
            rows = behind(q, k, v, pk, pv, self.group_R, self.valid_BP, scale)
            out.append(rows.transpose(1, 2).flatten(0, 1)[self.row_at])
        return torch.cat(out)[None]


def pack(
    prefixes: Sequence[Sequence[int]],
    group_R: Tensor,
    tokens_RT: Tensor,
    mask_RT: Tensor,
    adapter: Sequence[int] = (),
) -> Packed:
    """Lays B prefixes end to end and, after them, R rows. A row's last token is left out: the
    states that predict a row are its prefix's last one and those of its tokens before the last.

    tokens_RT, mask_RT (R, T): the rows, padded on the right, at least one token each. adapter: of
    each prefix and its rows.
    """
    device = tokens_RT.device
    tokens_BP, valid_BP = pad(prefixes, device)
    tokens_RT, valid_RT = tokens_RT[:, :-1], mask_RT[:, 1:]
    steps = torch.arange(tokens_RT.shape[1], device=device)
    adapter_B = torch.tensor(adapter or [0] * len(prefixes), device=device)
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
        adapter_B=adapter_B,
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
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if rope.get("rope_type") in ("dynamic", "longrope"):
        raise ValueError(
            f"policy: {text.model_type} with {rope['rope_type']} rotary positions is not supported:"
            " a row's positions would depend on the longest row beside it"
        )
    if getattr(text, "v_head_dim", None) is not None:
        raise ValueError(
            f"policy: {text.model_type} has values of another width than its keys, which is not "
            "supported"
        )
    if getattr(text, "attn_logit_softcapping", None):
        raise ValueError(f"policy: {text.model_type} caps attention scores, which is not supported")


def causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Each token sees those before it and itself: (R, Hq, T, d)."""
    rep = query.shape[1] // key.shape[1]
    return F.scaled_dot_product_attention(
        query, _repeat(key, rep), _repeat(value, rep), is_causal=True, scale=scale
    )


def behind(
    query: Tensor,  # (R, Hq, T, d)
    key: Tensor,  # (R, H, T, d)
    value: Tensor,
    prefix_key: Tensor,  # (B, H, P, d)
    prefix_value: Tensor,
    group_R: Tensor,
    valid_BP: Tensor,
    scale: float,
) -> Tensor:
    """Each row's tokens see its prefix, which is laid before them, and each other causally."""
    t, rep = query.shape[2], query.shape[1] // key.shape[1]
    k = _repeat(torch.cat([prefix_key[group_R], key], 2), rep)
    v = _repeat(torch.cat([prefix_value[group_R], value], 2), rep)
    own = torch.ones(t, t, dtype=torch.bool, device=query.device).tril()
    seen = valid_BP[group_R][:, None, None, :].expand(-1, 1, t, -1)
    mask = torch.cat([seen, own.expand(len(group_R), 1, t, t)], -1)
    return F.scaled_dot_product_attention(query, k, v, attn_mask=mask, scale=scale)


def _repeat(x: Tensor, times: int) -> Tensor:
    return x if times == 1 else x.repeat_interleave(times, 1)


def _attention(
    module: Any,
    query: Tensor,  # (R, Hq, T, d)
    key: Tensor,  # (R, H, T, d)
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    tree: Pass | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if tree is None:
        return causal(query, key, value, scale).transpose(1, 2), None
    return tree.attend(module.layer_idx, query, key, value, scale), None


AttentionInterface.register(ATTENTION, _attention)


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
