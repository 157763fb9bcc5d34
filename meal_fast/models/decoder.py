"""The body of a Llama-like model with few launches a layer: what a sampler runs on a GPU.

It rounds where transformers' modules do, so that a token's log-probability is the learner's up to
the order in which products are summed. A model is Llama-like if it is of a class that we know, its
modules have the names that we know (`llama_like`), and the two bodies agree on a few tokens
(`agree`): Llama, Mistral, Qwen2, Qwen3. Others with the same names scale queries far behind in the
context (Ministral 3), or turn no heads in every fourth layer (SmolLM3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput

from meal_fast.ops.gemm import linear

from .shared_prefix import Pass, causal

_BODIES = {"LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_PROJECTIONS, _HEAD_NORMS = ("q_proj", "k_proj", "v_proj", "o_proj"), {"q_norm", "k_norm"}
_TOKENS = 7  # on which the bodies are compared
_NEAR = {torch.float32: 1e-2, torch.bfloat16: 0.1}  # relative; float32 products may have 10 bits

# Weights, one below the other, in a tensor that follows them: `Served`.
Own = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Product:
    """x Wᵀ + bias, and with factors + (x Aᵀ) Bᵀ, as `ops.gemm.lora_linear` rounds it."""

    weight: Tensor  # (N, K)
    bias: Tensor | None
    factors: tuple[Tensor, Tensor] | None = None  # A (r, K), times LoRA's scale, and B (N, r)

    def __call__(self, x: Tensor) -> Tensor:
        out = linear(x, self.weight, self.bias)
        if self.factors is None:
            return out
        a, b = self.factors
        return out.addmm_(x @ a.t(), b.t())


# Linear layers that read the same, one below the other, with or without adapters.
Join = Callable[[list[Any]], Product]


class Decoder(nn.Module):
    """The body of a Llama-like model: what `transformers` computes, in 20 launches a layer, or 28
    where LoRA's factors stay apart.

    Queries, keys and values are one product, gate and up another; a norm is one kernel and its
    weight; queries and keys are turned together.
    """

    def __init__(self, body: Any, own: Own, join: Join) -> None:
        super().__init__()
        self.config, self.rotary = body.config, body.rotary_emb
        self.embedding: Tensor = own([body.embed_tokens.weight])
        self.layers: list[_Layer] = [_Layer(layer, own, join) for layer in body.layers]
        self.norm = _Norm(body.norm, own)

    def forward(
        self,
        *,
        input_ids: Tensor,  # (B, T)
        position_ids: Tensor | None = None,
        tree: Pass | None = None,
        use_cache: bool = False,
    ) -> BaseModelOutput:
        """Run as the body of transformers that it stands for; `use_cache` is ignored."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        x = F.embedding(input_ids, self.embedding)
        b, t, width = x.shape
        cos, sin = self.rotary(x, position_ids)
        half = sin.shape[-1] // 2
        # -(b sin) = (-b) sin: so the sign is put to what all layers share
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        turn = tuple(c.expand(b, -1, -1).reshape(b * t, 1, -1) for c in (cos, sin))
        x = x.view(b * t, width)
        for number, layer in enumerate(self.layers):
            x = layer(x, (b, t), turn, number, tree)
        return BaseModelOutput(last_hidden_state=self.norm(x).view(b, t, width))


class _Norm:
    """RMSNorm, rounded before its weight is multiplied with, as in transformers' Llama."""

    def __init__(self, norm: Any, own: Own) -> None:
        self.eps = norm.variance_epsilon
        self.weight: Tensor = own([norm.weight])

    def __call__(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x, x.shape[-1:], None, self.eps)


class _Layer:
    def __init__(self, layer: Any, own: Own, join: Join) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.scale, self.d = attention.scaling, attention.head_dim
        q, k, v, o = (getattr(attention, name) for name in _PROJECTIONS)
        self.queries, self.keys = (base_of(x).weight.shape[0] // self.d for x in (q, k))
        self.before, self.between = (
            _Norm(norm, own) for norm in (layer.input_layernorm, layer.post_attention_layernorm)
        )
        self.qkv, self.o = join([q, k, v]), join([o])
        self.gate_up, self.down = join([mlp.gate_proj, mlp.up_proj]), join([mlp.down_proj])
        self.act = mlp.act_fn
        self.head_norms: _Norm | None = None
        if hasattr(attention, "q_norm"):
            self.head_norms = _Norm(attention.q_norm, own)
            each = [attention.q_norm.weight] * self.queries
            each += [attention.k_norm.weight] * self.keys
            self.head_norms.weight = own(each).view(-1, self.d)

    def __call__(
        self, x: Tensor, size: tuple[int, int], turn: Any, number: int, tree: Pass | None
    ) -> Tensor:
        qkv = self.qkv(self.before(x)).view(len(x), -1, self.d)
        qk, v = qkv.split([self.queries + self.keys, self.keys], 1)
        if self.head_norms is not None:
            qk = self.head_norms(qk)
        cos, sin = turn
        qk = qk * cos + qk.roll(self.d // 2, -1) * sin
        q, k = qk.split([self.queries, self.keys], 1)
        q, k, v = (part.unflatten(0, size).transpose(1, 2) for part in (q, k, v))
        if tree is None:
            out = causal(q, k, v, self.scale).transpose(1, 2)
        else:
            out = tree.attend(number, q, k, v, self.scale)
        x = x + self.o(out.reshape(len(x), -1))
        gate, up = self.gate_up(self.between(x)).chunk(2, -1)
        return x + self.down(self.act(gate) * up)


def base_of(layer: Any) -> nn.Linear:
    """Give a linear layer without its adapters."""
    linear_layer: nn.Linear = getattr(layer, "base_layer", layer)
    return linear_layer


def llama_like(body: Any) -> bool:
    """Tell whether it is of a class that `Decoder` knows, and so are its modules."""

    def children(module: Any) -> set[str]:
        return {name for name, _ in module.named_children()}

    def plain(layers: list[Any]) -> bool:  # linear ones, all of them with a bias or none
        bases = [base_of(layer) for layer in layers]
        kinds = all(isinstance(base, nn.Linear) for base in bases)
        return kinds and len({base.bias is None for base in bases}) == 1

    if type(body).__name__ not in _BODIES or children(body) != {
        "embed_tokens",
        "layers",
        "norm",
        "rotary_emb",
    }:
        return False
    norms = [body.norm]
    for layer in body.layers:
        if children(layer) != _LAYER:
            return False
        attention, mlp = layer.self_attn, layer.mlp
        if not (hasattr(attention, "head_dim") and hasattr(attention, "scaling")):
            return False
        of_heads = children(attention) - set(_PROJECTIONS)
        if children(attention) != of_heads | set(_PROJECTIONS):
            return False
        if of_heads not in (set(), _HEAD_NORMS) or children(mlp) != _MLP:
            return False
        *qkv, o = (getattr(attention, name) for name in _PROJECTIONS)
        if not all(map(plain, (qkv, [o], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]))):
            return False
        heads = [getattr(attention, name) for name in of_heads]
        if any(norm.weight.shape != (attention.head_dim,) for norm in heads):
            return False
        norms += [layer.input_layernorm, layer.post_attention_layernorm, *heads]
    return all(hasattr(norm, "variance_epsilon") for norm in norms)


@torch.no_grad()
def agree(body: Decoder, other: Any) -> bool:
    """Tell whether both give the same hidden states, up to rounding."""
    vocabulary, device = len(body.embedding), body.embedding.device
    ids = (torch.arange(1, _TOKENS + 1, device=device) * 7919 % vocabulary)[None]
    positions = torch.arange(_TOKENS, device=device)[None]
    turn = body.rotary(body.embedding[:1, None], positions)[0]
    if turn.shape[-1] != body.layers[0].d:
        return False  # only a part of a head is turned
    got, wanted = (
        x(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state.float()
        for x in (body, other)
    )
    near = _NEAR.get(body.embedding.dtype, 0.1)
    return bool((got - wanted).norm() <= near * wanted.norm())
