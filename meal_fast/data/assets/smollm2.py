"""SmolLM2-135M-Instruct: GGUF (4-bit) to a standard transformers folder in fp32 safetensors.

Read with the `gguf` library rather than through transformers' GGUF loader, which takes four times
as long and leaves the wrong end-of-turn token on some versions. What is written here is the same
bytes whatever version is installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_SPECIAL = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}


def convert(gguf_file: Path, to: Path) -> None:
    """Write model, configuration, tokenizer and chat template of `gguf_file` into `to`."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(gguf_file)
    fields = {name: field for name, field in reader.fields.items()}

    def value(name: str) -> Any:
        return fields[name].contents()

    heads, kv_heads = value("llama.attention.head_count"), value("llama.attention.head_count_kv")
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        matrix = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype("float32"))
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            matrix = _unpermute(matrix, heads if ".attn_q." in tensor.name else kv_heads)
        weights[_name(tensor.name)] = matrix.contiguous()
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})

    vocabulary = value("tokenizer.ggml.tokens")
    ids = {key: vocabulary.index(token) for key, token in _SPECIAL.items()}
    width = value("llama.embedding_length")
    _write(
        to / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": ids["bos_token"],
            "dtype": "float32",
            "eos_token_id": ids["eos_token"],
            "head_dim": width // heads,
            "hidden_act": "silu",
            "hidden_size": width,
            "initializer_range": 0.02,
            "intermediate_size": value("llama.feed_forward_length"),
            "max_position_embeddings": value("llama.context_length"),
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": heads,
            "num_hidden_layers": value("llama.block_count"),
            "num_key_value_heads": kv_heads,
            "pad_token_id": ids["pad_token"],
            "rms_norm_eps": 1e-05,
            "rope_parameters": {
                "rope_theta": value("llama.rope.freq_base"),
                "rope_type": "default",
            },
            "tie_word_embeddings": True,
            "vocab_size": len(vocabulary),
        },
    )
    _write(
        to / "generation_config.json",
        {f"{key}_id": ids[key] for key in ("bos_token", "eos_token", "pad_token")},
    )
    control = [i for i, kind in enumerate(value("tokenizer.ggml.token_type")) if kind == 3]
    _write(
        to / "tokenizer.json",
        _tokenizer(vocabulary, value("tokenizer.ggml.merges"), control),
        indent=None,
    )
    _write(
        to / "tokenizer_config.json",
        {
            **_SPECIAL,
            "clean_up_tokenization_spaces": False,
            "model_max_length": value("llama.context_length"),
            "padding_side": "left",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    (to / "chat_template.jinja").write_text(value("tokenizer.chat_template"), encoding="utf-8")


def _name(gguf_name: str) -> str:
    if gguf_name in _TOP:
        return _TOP[gguf_name]
    _, layer, part, kind = gguf_name.split(".")
    return f"model.layers.{layer}.{_BLOCK[part]}.{kind}"


def _unpermute(matrix: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp interleaves the two halves of each rotary head; transformers keeps them apart."""
    rows, columns = matrix.shape
    halves = matrix.view(heads, rows // heads // 2, 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def _tokenizer(vocabulary: list[str], merges: list[str], control: list[int]) -> dict[str, Any]:
    """tokenizer.json of SmolLM2: single digits, then GPT-2's byte-level BPE."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": i,
                "content": vocabulary[i],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i in control
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(vocabulary)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }


def _write(path: Path, content: Any, indent: int | None = 1) -> None:
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
