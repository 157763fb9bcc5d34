"""Forward passes over prompts and the many rows that share them: no prefix is computed twice.

The model is a plain transformers decoder, loaded with the attention function registered here. What
a forward pass does with its keys and values is said by the object handed to it as `tree=`:

    none          a plain causal pass
    Packed        prefixes and rows laid end to end, for training: prompt tokens go through the
                  model once for all their samples, and no padding goes at all
    rollout.kv_cache the sampler's passes over prompts, suffixes and single new tokens

Padding is on the right, so positions are plain counts and a pad is never seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import AttentionInterface

ATTENTION = "meal_fast_tree"


class Refused(ValueError):
    """Why a model cannot be a policy; whoever loads it puts its name before."""


class Pass(Protocol):
    """What a forward pass does with the queries, keys and values of a layer."""

    @property
    def task_id(self) -> Tensor:
        """int64, of the shape of the tokens or to be expanded to it: see `stacked`."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend: query (R, Hq, T, d), key and value (R, H, T, d) -> (R, T, Hq, d)."""


@dataclass(frozen=True)
class Packed:
    """Prefixes and the rows behind them as one sequence of N tokens, without padding.

    Attention alone needs rectangles: prefixes (B, P), rows (R, S). Every token has one place there,
    a number among B P + R S, so that laying out and picking up again copy each token once, and
    their gradients too: an index with duplicates would be summed one by one on a GPU.

    M are the rows' tokens, which the states (N, D) predict: `predicting`. One more a row than are
    in the sequence, since a row's last token predicts nothing.
    """

    tokens_1N: Tensor
    positions_1N: Tensor
    task_id_1N: Tensor  # int64: see `stacked`
    group_N: Tensor  # the prefix that each token is of, or stands behind
    place_N: Tensor  # in the rectangles
    group_R: Tensor
    length_R: Tensor  # of the prefix that the row stands behind
    last_B: Tensor  # of each prefix the place in the sequence of its last token
    before_M: Tensor  # of each predicted token: r < R, the end of row r's prefix; or R + row token
    sampled_M: Tensor  # where each predicted token lies in the flat `tokens_RT` of `pack`
    row_M: Tensor  # of which of the R rows it is
    prefixes: int  # tokens of the prefixes, which come first
    shape_BPRS: tuple[int, int, int, int]
    _made: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)  # for all layers

    @property
    def task_id(self) -> Tensor:
        return self.task_id_1N

    def predicting(self, states_ND: Tensor) -> Tensor:
        """Pick the states (M, D) that predict the rows' tokens, in their order."""
        prefix, row = states_ND.split([self.prefixes, len(states_ND) - self.prefixes])
        ends_RD = self.copies(prefix.index_select(0, self.last_B))
        return torch.cat([ends_RD, row]).index_select(0, self.before_M)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend prefixes causally, then every row behind its prefix: `Pass`."""
        b, p, r, s = self.shape_BPRS
        heads, kv_heads = query.shape[1], key.shape[1]
        flat = torch.cat([rearrange(x, "1 h n d -> n h d") for x in (query, key, value)], 1)
        laid = flat.new_zeros(b * p + r * s, *flat.shape[1:]).index_copy(0, self.place_N, flat)
        prefix, row = laid.split([b * p, r * s])
        parts = [heads, 2 * kv_heads]
        q, prefix_kv = rearrange(prefix, "(b p) h d -> b p h d", b=b).split(parts, 2)
        prefixes = causal(*_by_head(q, prefix_kv), scale)
        out = [rearrange(prefixes, "b h p d -> (b p) h d")]
        if r * s:
            q, kv = rearrange(row, "(r s) h d -> r s h d", r=r).split(parts, 2)
            kv = torch.cat([self.copies(prefix_kv), kv], 1)
            rows = _masked(*_by_head(q, kv), self._mask(query.dtype), scale)
            out.append(rearrange(rows, "r h s d -> (r s) h d"))
        return torch.cat(out).index_select(0, self.place_N)[None]

    def copies(self, x: Tensor) -> Tensor:
        """Copy each prefix's x (B, …) for each of its rows, (R, …)."""
        return _Copies.apply(x, self)

    def member(self, dtype: torch.dtype) -> Tensor:
        """Make (B, R): 1 where the row stands behind the prefix, else 0."""
        if ("member", dtype) not in self._made:
            numbers = torch.arange(self.shape_BPRS[0], device=self.group_R.device)
            self._made["member", dtype] = (numbers[:, None] == self.group_R).to(dtype)
        return self._made["member", dtype]

    def _mask(self, dtype: torch.dtype) -> Tensor:
        """See `_row_mask`."""
        if ("mask", dtype) not in self._made:
            _, p, _, s = self.shape_BPRS
            valid_RP = torch.arange(p, device=self.length_R.device) < self.length_R[:, None]
            self._made["mask", dtype] = _row_mask(valid_RP, s, dtype)
        return self._made["mask", dtype]


def _by_head(query: Tensor, key_value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(R, T, Hq, d) and (R, S, 2 H, d), keys and values -> (R, heads, tokens, d) each."""
    key, value = rearrange(key_value, "r s (two h) d -> two r h s d", two=2)
    return rearrange(query, "r t h d -> r h t d"), key, value


def pack(
    prefixes: Sequence[Sequence[int]],
    groups: Sequence[int],
    lengths: Sequence[int],
    tokens_RT: Tensor,
    *,
    rows: Sequence[int] | None = None,
    task_id: Sequence[int] = (),
) -> Packed:
    """Lay B prefixes end to end and, after them, rows. A row's last token is left out: the
    states that predict a row are its prefix's last one and those of its tokens before the last.

    All sizes are known on the host, where the numbers of places are made: they go to the device of
    `tokens_RT` in one copy, which waits for nothing, and nothing is read back.

    groups, lengths: of each row the prefix that it stands behind, and its tokens, at least one.
    tokens_RT: tokens, padded on the right; `rows`: which of its rows are meant (none: all).
    task_id: of each prefix and its rows.
    """
    width = tokens_RT.shape[1]
    row_R = torch.tensor(range(len(groups)) if rows is None else rows, dtype=torch.int64)
    group_R, length_R = (torch.tensor(x, dtype=torch.int64) for x in (groups, lengths))
    prefix_B = torch.tensor([len(prefix) for prefix in prefixes])
    p, s = int(prefix_B.max()), int(length_R.max()) - 1 if len(length_R) else 0
    of_prefix, at_prefix = _places(prefix_B)
    of_row, at_row = _places(length_R - 1)
    of_M, at_M = _places(length_R)
    first_R = len(length_R) + (length_R - 1).cumsum(0) - (length_R - 1)
    group_N = torch.cat([of_prefix, group_R[of_row]])
    behind_R = prefix_B[group_R]
    host = {
        "tokens": torch.tensor([t for prefix in prefixes for t in prefix]),
        "inputs": row_R[of_row] * width + at_row,
        "positions_1N": torch.cat([at_prefix, behind_R[of_row] + at_row]),
        "task_id_1N": torch.tensor(task_id or [0] * len(prefixes))[group_N],
        "group_N": group_N,
        "place_N": torch.cat([of_prefix * p + at_prefix, len(prefixes) * p + of_row * s + at_row]),
        "group_R": group_R,
        "length_R": behind_R,
        "last_B": prefix_B.cumsum(0) - 1,
        "before_M": torch.where(at_M == 0, of_M, first_R[of_M] + at_M - 1),
        "sampled_M": row_R[of_M] * width + at_M,
        "row_M": of_M,
    }
    sent: dict[str, Any] = dict(
        zip(host, to_device(list(host.values()), tokens_RT.device), strict=True)
    )
    prefix_tokens, inputs = sent.pop("tokens"), sent.pop("inputs")
    row_tokens = tokens_RT.reshape(-1).index_select(0, inputs)
    for name in ("positions_1N", "task_id_1N"):
        sent[name] = sent[name][None]
    return Packed(
        tokens_1N=torch.cat([prefix_tokens, row_tokens])[None],
        prefixes=len(prefix_tokens),
        shape_BPRS=(len(prefixes), p, len(length_R), s),
        **sent,
    )


def _places(length_R: Tensor) -> tuple[Tensor, Tensor]:
    """Of runs laid end to end: which run an element is of, and its number in it."""
    of = torch.repeat_interleave(length_R)
    return of, torch.arange(len(of)) - (length_R.cumsum(0) - length_R)[of]


def to_device(parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Send one-dimensional int64 tensors of the host in one copy; a GPU is not waited for."""
    if device.type == "cpu":
        return list(parts)
    sizes = [len(part) for part in parts]
    staged = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
    torch.cat(list(parts), out=staged)
    return list(staged.to(device, non_blocking=True).split(sizes))


class _Copies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Packed) -> Tensor:
        ctx.packed = packed
        return x.index_select(0, packed.group_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        packed: Packed = ctx.packed
        shape = (packed.shape_BPRS[0], *upstream.shape[1:])
        if upstream.device.type == "cpu":
            return upstream.new_zeros(shape).index_add_(0, packed.group_R, upstream), None
        # A product with zeros and ones: sums in float32, in one order, and no atomics.
        flat = upstream.reshape(len(upstream), -1)
        return (packed.member(upstream.dtype) @ flat).view(shape), None


def check_supported(config: Any) -> None:
    """Raise Refused for a model whose attention is more than causal softmax attention.

    This is what a configuration says; `models.probe` asks the model itself.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or [])
    window = getattr(text, "sliding_window", None)
    if window and window >= context_of(config):
        kinds, window = kinds - {"sliding_attention"}, None  # it never shows
    if kinds - {"full_attention"} or (not kinds and window):
        raise Refused(f"with {sorted(kinds) or 'sliding-window'} layers is not supported")
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    for each in (rope, *(x for x in rope.values() if isinstance(x, dict))):
        if each.get("rope_type", each.get("type")) in ("dynamic", "longrope"):
            raise Refused(
                f"with {each.get('rope_type', each.get('type'))} rotary positions is not supported "
                "(a row's positions would depend on the longest row beside it)"
            )
    if getattr(text, "v_head_dim", None) is not None:
        raise Refused("with values of another width than its keys is not supported")
    if getattr(text, "attn_logit_softcapping", None):
        raise Refused("with capped attention scores is not supported")


def causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attend to the tokens before each and to itself: (R, Hq, T, d)."""
    return _attended(query, key, value, scale, is_causal=True)


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
    """Attend to each row's prefix, which is laid before it, and to its own tokens causally."""
    k, v = torch.cat([prefix_key[group_R], key], 2), torch.cat([prefix_value[group_R], value], 2)
    mask = _row_mask(valid_BP[group_R], query.shape[2], query.dtype)
    return _masked(query, k, v, mask, scale)


def _row_mask(valid_RP: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """(R, 1, T, P + T): 0 where a row's token sees one of its prefix or of its own, else -inf.

    Added to the scores, as a boolean one would be, by way of a copy of this kind in every layer.
    """
    rows, prefix = valid_RP.shape
    own = torch.ones(width, width, dtype=torch.bool, device=valid_RP.device).tril()
    seen = torch.cat([valid_RP[:, None].expand(-1, width, -1), own.expand(rows, -1, -1)], 2)
    # Rows of 16 numbers: a GPU's attention would copy any other into such, in every layer.
    padded = -(-(prefix + width) // 16) * 16
    mask = torch.full((rows, 1, width, padded), -torch.inf, dtype=dtype, device=valid_RP.device)
    return mask[..., : prefix + width].masked_fill_(seen[:, None], 0)


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    return _attended(query, key, value, scale, attn_mask=mask)


def _attended(query: Tensor, key: Tensor, value: Tensor, scale: float, **seen: Any) -> Tensor:
    """torch's attention, whose probabilities are float32 on a CPU in every dtype.

    As `ops.prefix_attention`'s are, so that a learner's log-probabilities are the sampler's. A
    GPU's kernels multiply with probabilities rounded to the dtype, ours and torch's each in its own
    order.
    """
    rep, dtype = query.shape[1] // key.shape[1], query.dtype
    if _wide(query):
        query, key, value = query.float(), key.float(), value.float()
        seen = {name: x.float() if isinstance(x, Tensor) else x for name, x in seen.items()}
    key, value = _repeat(key, rep), _repeat(value, rep)
    return F.scaled_dot_product_attention(query, key, value, scale=scale, **seen).to(dtype)


def _wide(query: Tensor) -> bool:
    """Whether attention is computed in float32, though the model is not."""
    return query.device.type == "cpu" and query.dtype in (torch.bfloat16, torch.float16)


def _repeat(x: Tensor, times: int) -> Tensor:
    return x if times == 1 else x.repeat_interleave(times, 1)


def attention(
    module: Any,
    query: Tensor,  # (R, Hq, T, d)
    key: Tensor,  # (R, H, T, d)
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    tree: Pass | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend as `tree` says, or causally: a function of transformers' `AttentionInterface`."""
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if tree is None:
        return causal(query, key, value, scale).transpose(1, 2), None
    return tree.attend(module.layer_idx, query, key, value, scale), None


AttentionInterface.register(ATTENTION, attention)


def context_of(config: Any) -> int:
    """Give the tokens that a model can see by its configuration; 2**30 where it does not say."""
    text = config.get_text_config()
    return int(getattr(text, "max_position_embeddings", None) or 1 << 30)


def forward(body: nn.Module, packed: Packed) -> Tensor:
    """Run a packed batch: hidden states (N, D)."""
    return body(
        input_ids=packed.tokens_1N,
        position_ids=packed.positions_1N,
        use_cache=False,
        tree=packed,
    ).last_hidden_state.squeeze(0)


def pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Lay token lists out as (tokens, valid): int64 and bool, padded on the right."""
    width = max(len(row) for row in rows)
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return tokens, torch.arange(width, device=device) < lengths[:, None]
