"""A policy as one GGUF file, for llama.cpp and what is built on it; read back before it is kept.

Of Llama's and Qwen's architectures with a byte-level BPE tokenizer. llama.cpp's own
`convert_hf_to_gguf.py` takes a saved policy of any other that it knows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from meal_fast.common import quiet

from .chat_template import default_template

# transformers' model type, and what GGUF calls it
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# The types of a file's matrices, and how far they may move it: KL(policy || file), nats a token.
LARGEST_KL = {"f32": 1e-5, "f16": 1e-4, "bf16": 3e-3, "q8_0": 2e-2}

_ASKED = [
    {"role": "user", "content": "How do tides work, and can I swim while they turn?"},
    {"role": "assistant", "content": "Tides are caused by the pull of the moon and the sun. When "
     "they turn, the water slows down before it flows the other way. Ask before you swim."},
]  # fmt: skip

_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# What llama.cpp calls the ways in which text is cut before BPE.
_CUTS = {
    _QWEN2: "qwen2",
    _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|"): "llama-bpe",
    "Digits": "smollm",
    "": "gpt-2",
}


def check_convertible(folder: Path) -> None:
    """Raise ValueError for a saved policy that cannot be written as GGUF here."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config.get("model_type")
    other = "llama.cpp's convert_hf_to_gguf.py takes the folder that --to hub writes"
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"model_type={kind!r}: is written as GGUF for {known} alone; {other}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    turned = rope.get("rope_type", rope.get("type", "default"))
    if turned != "default":
        raise ValueError(f"rope_type={turned!r}: is not written as GGUF here; {other}")
    odd = ["use_sliding_window", "mlp_bias", *["attention_bias"] * (kind != "qwen2")]
    for option in odd:
        if config.get(option):
            raise ValueError(f"{kind} with {option}: is not written as GGUF here; {other}")
    try:
        saved = _tokenizer(folder)
        _cut(saved)
    except ValueError as error:
        raise ValueError(f"{error}; {other}") from None
    last = max([*saved["model"]["vocab"].values(), *(t["id"] for t in saved["added_tokens"])])
    size = config["vocab_size"]
    if last >= size:
        raise ValueError(f"vocab_size={size}: the tokenizer has a token {last}; resize the model")


def write_gguf(folder: Path, file: Path, kind: str, about: dict[str, str]) -> None:
    """Write the policy saved in `folder` as the GGUF `file`, its matrices of `kind` (`LARGEST_KL`).

    Vectors stay float32. `about`: what `GGUFWriter.add_NAME` takes as text, name and licence, say.
    Raises ValueError for a policy that is none of `check_convertible`.
    """
    import gguf

    check_convertible(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(file, architecture)
    for name, text in about.items():
        getattr(writer, f"add_{name}")(text)
    _add_shape(writer, config)
    _add_tokenizer(writer, folder, config["vocab_size"])
    stored = gguf.GGMLQuantizationType[kind.upper()]
    writer.add_file_type(
        gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{stored.name}"]
    )
    known = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[architecture], config["num_hidden_layers"])
    for name, tensor in _tensors(folder):
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        called = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if called is None:
            raise ValueError(f"{name}: GGUF has no tensor of this name for {architecture}")
        if architecture == "llama":
            tensor = _interleaved(name, tensor, config)
        array = tensor.float().numpy()
        fit = array.ndim > 1 and (kind != "q8_0" or array.shape[-1] % 32 == 0)
        held = stored if fit else gguf.GGMLQuantizationType.F32
        writer.add_tensor(called, gguf.quants.quantize(array, held), raw_dtype=held)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@quiet()
@torch.no_grad()
def difference(folder: Path, file: Path) -> float:
    """Measure KL(policy || file) of the next token, nats, averaged over a short conversation.

    `folder` holds the policy that `file` was written of; the file is read by transformers' loader.
    Raises ValueError where the file's vocabulary is another one.
    """
    import gguf
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    fields = gguf.GGUFReader(file).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    wrong = [t for t, i in tokenizer.get_vocab().items() if tokens[i] != t]
    template = fields["tokenizer.chat_template"].contents()
    if wrong or template != default_template(tokenizer):
        raise ValueError(f"{file}: read back, its vocabulary or chat template is another one")
    text = tokenizer.apply_chat_template(_ASKED, tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    load = partial(
        AutoModelForCausalLM.from_pretrained, dtype=torch.float32, trust_remote_code=False
    )
    with redirect_stderr(StringIO()):  # a progress bar of the tensors
        there = {"gguf_file": file.name}
        config = AutoConfig.from_pretrained(file.parent, trust_remote_code=False, **there)
        kind = fields["general.architecture"].contents()
        config.head_dim = fields[f"{kind}.attention.key_length"].contents()  # not read of Qwen3
        both = load(folder), load(file.parent, config=config, **there)
    own, read = (model.eval()(ids).logits.double().log_softmax(-1) for model in both)
    return float((own.exp() * (own - read)).sum(-1).mean())


def _add_shape(writer: Any, config: dict[str, Any]) -> None:
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head = config.get("head_dim") or width // heads
    rope = config.get("rope_parameters") or config
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))


def _add_tokenizer(writer: Any, folder: Path, size: int) -> None:
    import gguf
    from transformers import AutoTokenizer

    saved, kinds = _tokenizer(folder), gguf.TokenType
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [kinds.UNUSED] * size
    for token, i in saved["model"]["vocab"].items():
        tokens[i], types[i] = token, kinds.NORMAL
    for added in saved["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = kinds.CONTROL if added["special"] else kinds.USER_DEFINED
    pairs = (
        pair if isinstance(pair, list) else pair.split(" ") for pair in saved["model"]["merges"]
    )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_cut(saved))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in pairs])
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    for name in ("bos", "eos", "pad"):
        if (i := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(i)
    if (end := _end_of_turn(folder, tokenizer.eos_token_id)) is not None:
        writer.add_eot_token_id(end)
    writer.add_add_bos_token(False)  # the chat template writes it
    writer.add_chat_template(default_template(tokenizer))


def _end_of_turn(folder: Path, eos: int | None) -> int | None:
    """Give the first token beside eos that the saved policy stops at."""
    path = folder / "generation_config.json"
    held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    stop = held.get("eos_token_id")
    return next((i for i in (stop if isinstance(stop, list) else []) if i != eos), None)


def _tokenizer(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError("no tokenizer.json: a tokenizer that is not byte-level BPE")
    saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if saved["model"].get("type") != "BPE" or saved["model"].get("byte_fallback"):
        raise ValueError("a tokenizer that is not byte-level BPE")
    return saved


def _cut(saved: dict[str, Any]) -> str:
    """Give llama.cpp's name of how this tokenizer cuts text. Raises ValueError where none is."""
    steps = saved["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    *before, last = [step.get("type") for step in steps]
    how = "other"
    if last == "ByteLevel" and not before:
        how = "" if steps[-1]["use_regex"] else how
    elif last == "ByteLevel" and before == ["Digits"] and steps[0]["individual_digits"]:
        how = "Digits" if steps[-1]["use_regex"] else how
    elif last == "ByteLevel" and before == ["Split"]:
        how = steps[0]["pattern"].get("Regex", how)
    if how not in _CUTS or steps[-1].get("add_prefix_space"):
        raise ValueError("a tokenizer that cuts text in a way that has no name in GGUF")
    return _CUTS[how]


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        if path.name.startswith("model"):
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    yield name, file.get_tensor(name)


def _interleaved(name: str, tensor: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Order the rows of Llama's queries and keys as llama.cpp turns them: pairs side by side."""
    heads = config["num_attention_heads"]
    if ".k_proj." in name:
        heads = config.get("num_key_value_heads") or heads
    elif ".q_proj." not in name:
        return tensor
    halves = tensor.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).reshape(tensor.shape)
