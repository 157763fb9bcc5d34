"""Policies of random weights at the shapes of real models: nothing has to be fetched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from bench.endless import endless
from meal_fast.config.config import PolicyConfig
from meal_fast.data.toy import build_world
from meal_fast.data_types import Prompt
from meal_fast.models.policy import Policy, load_policy
from meal_fast.rollout import Request
from tools.contact.here import Here

NAMES = ("first", "second")
# Published configurations; both tie the head to the embedding.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
HEADS = ("num_attention_heads", "num_key_value_heads")
SMOLLM2 = dict(zip(SIZES + HEADS, (49_152, 576, 1536, 30, 9, 3), strict=True))
QWEN2 = dict(zip(SIZES + HEADS, (151_936, 896, 4864, 24, 14, 2), strict=True))
SHAPES: dict[str, tuple[Any, Any, dict[str, int]]] = {
    "SmolLM2-135M": (LlamaForCausalLM, LlamaConfig, SMOLLM2),
    "Qwen2-0.5B": (Qwen2ForCausalLM, Qwen2Config, QWEN2),
}
# In a rehearsal: as many heads, each of 8 numbers.
SMALLER = {"vocab_size": 1024, "intermediate_size": 64, "num_hidden_layers": 2}


def random_policy(here: Here, name: str, dtype: str, *, drawn: float = 0.0) -> Policy:
    """A policy of the shape called `name`, or of the two-layer world, tuned by LoRA.

    `drawn`: the spread of LoRA's factors B; 0 as at the start of training.
    """
    path = "world:tiny" if name == "two layers" else str(folder_of(here, name))
    config = PolicyConfig(path=path, dtype=dtype, device=here.device)  # type: ignore[arg-type]
    policy = endless(load_policy(config, NAMES))
    generator = torch.Generator().manual_seed(1)  # the same on every device
    with torch.no_grad():
        for key, parameter in policy.named.items():
            if drawn and "lora_B" in key:
                parameter.copy_(drawn * torch.randn(parameter.shape, generator=generator))
    return policy


def folder_of(here: Here, name: str) -> Path:
    """The folder of a model of that shape, written when it is first asked for."""
    folder = here.folder / name
    if folder.is_dir():
        return folder
    kind, settings, sizes = SHAPES[name]
    if here.rehearsal:
        sizes = sizes | SMALLER | {"hidden_size": 8 * sizes["num_attention_heads"]}
    torch.manual_seed(0)
    config = settings(**sizes, max_position_embeddings=2048, tie_word_embeddings=True)
    with torch.device(here.device):
        model = kind(config).to(torch.bfloat16)
    model.save_pretrained(folder.with_name(folder.name + ".part"))
    # The world's tokenizer: what it cannot read of the answers is left out of their texts.
    tokenizer = AutoTokenizer.from_pretrained(build_world("tiny"))
    tokenizer.save_pretrained(folder.with_name(folder.name + ".part"))
    folder.with_name(folder.name + ".part").rename(folder)
    return folder


def requests(policy: Policy, count: int, tokens: int, samples: int) -> list[Request]:
    """`samples` answers to each of `count` prompts of about so many tokens, no two alike."""
    made = []
    for i in range(count):
        letters = [("abcdefghij")[(i * 7 + j * 3) % 10] for j in range(tokens)]
        short = tokens - len(policy.encode_suffix((0.5, 0.5))) - 12  # of the chat template
        text = f"{i:03d}" + "".join(letters[: max(short, 4)])
        made.append(Request(Prompt(text, text), (0.5, 0.5), samples))
    return made


def weights(policy: Policy) -> tuple[int, int]:
    """The number of the base model's parameters, each once, and the bytes that they take."""
    found = {id(p): p for n, p in policy.model.named_parameters() if ".lora_" not in n}
    return sum(p.numel() for p in found.values()), sum(
        p.numel() * p.element_size() for p in found.values()
    )


def kv_bytes(policy: Policy, tokens: float) -> float:
    """Bytes of so many tokens' keys and values."""
    config = policy._base.config
    width = config.hidden_size // config.num_attention_heads
    each = 2 * config.num_hidden_layers * config.num_key_value_heads * width
    return tokens * each * policy.network.weight.element_size()


def prefix_tokens(policy: Policy, given: Sequence[Request]) -> int:
    return sum(
        len(policy.encode_prompt(q.prompt.text)) + len(policy.encode_suffix(q.w)) for q in given
    )
