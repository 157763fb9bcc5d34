"""Small models of transformers' real classes, with random weights, and a policy around each."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

from meal_fast.models import shared_prefix
from meal_fast.models.policy import Network, cut

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {
    "llama": lambda: (tf.LlamaForCausalLM, tf.LlamaConfig(**SMALL)),
    "qwen2": lambda: (tf.Qwen2ForCausalLM, tf.Qwen2Config(**SMALL)),
    "qwen3": lambda: (tf.Qwen3ForCausalLM, tf.Qwen3Config(**SMALL, head_dim=8)),
    "gemma": lambda: (tf.GemmaForCausalLM, tf.GemmaConfig(**SMALL, head_dim=8)),
    "gpt2": lambda: (
        tf.GPT2LMHeadModel,
        tf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4),
    ),
}


def small_model(name: str) -> Any:
    torch.manual_seed(0)
    kind, config = MODELS[name]()
    config._attn_implementation = shared_prefix.ATTENTION
    shared_prefix.check_supported(config)
    return kind(config).eval()


class NumberPolicy:
    """What the engine asks of a policy, for a model without a tokenizer: a text is its tokens.

    A preference (a, b) adds the suffix 10 a, 10 b, …, of one to three tokens.
    """

    names = ("first", "second")

    def __init__(self, name: str, *, stop: frozenset[int] = frozenset(), context: int = 64) -> None:
        self.network: Network = cut(small_model(name))
        self.stop_ids, self.context = stop, context
        self.device = self.network.weight.device

    def encode_prompt(self, text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split()))

    def encode_suffix(self, w: tuple[float, ...] | None) -> tuple[int, ...]:
        tokens = (90,) if w is None else (1 + int(9 * w[0]), 20 + int(9 * w[1]), 33)
        return tokens[: 1 + sum(tokens) % 3]

    def encode(self, text, w=None, history=()):
        return self.encode_prompt(text), self.encode_suffix(w)

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))
