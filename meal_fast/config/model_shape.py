"""A model's sizes, from the files that say them, without loading it: no torch.

A folder's config.json gives layers and widths, the heads of its *.safetensors the very shapes of
its weights. Where those are not here, Llama's, Mistral's, Qwen2's and Qwen3's parameters are
counted from config.json by formula.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meal_fast.common import cache_folder, require

from .model_files import LARGEST, read_settings
from .sources import WORLDS, is_outside


@dataclass(frozen=True)
class ModelShape:
    """What the cost of a causal language model follows from; counts of numbers, not of bytes."""

    name: str
    layers: int
    width: int  # of hidden states: D
    inner: int  # of the feed-forward layers: F
    heads: int
    kv_heads: int
    head: int  # width of a head
    vocab: int
    parameters: int  # all, tied ones once
    linear: int  # weights of the blocks' linear layers: a token meets each in one product
    sides: int  # sum of their in + out
    linears: int  # how many they are

    @property
    def block(self) -> int:
        """Count the parameters of a block, about: what FSDP2 gathers at a time."""
        return -(-self.linear // self.layers)

    @property
    def kv(self) -> int:
        """Count the numbers of a token's keys and values, in all layers."""
        return 2 * self.layers * self.kv_heads * self.head

    def lora(self, rank: int) -> int:
        """Count LoRA's factors on all of the blocks' linear layers: sum of rank * (in + out)."""
        return rank * self.sides

    def bilinear(self, rank: int, objectives: int) -> int:
        """Count the bilinear adapters': two pairs of factors, W1 (r, r) and P (r, r, K) a layer."""
        return 2 * rank * self.sides + self.linears * rank * rank * (1 + objectives)


def _first(settings: Mapping[str, Any], *names: str) -> Any:
    return next((settings[n] for n in names if settings.get(n) is not None), None)


def shape_from(
    name: str,
    settings: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, ...]] | None = None,
) -> ModelShape:
    """Read a shape from the table of a config.json, and the shapes of weights where they are here.

    Raises ValueError for what is no decoder of linear layers, or cannot be counted.
    """
    of_text = settings.get("text_config")
    values = of_text if isinstance(of_text, Mapping) else settings

    def whole(what: str, *names: str, default: int | None = None) -> int:
        value = _first(values, *names)
        value = default if value is None else value
        good = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31
        require(good, f"model {name!r}: {what}", value, f"config.json must say it, as {names[0]}")
        assert isinstance(value, int)
        return value

    experts = _first(values, "num_experts", "num_local_experts", "n_routed_experts")
    require(not experts, f"model {name!r}: experts", experts, "the cost of experts is not modelled")
    width = whole("width", "hidden_size", "n_embd", "d_model")
    layers = whole("layers", "num_hidden_layers", "n_layer")
    heads = whole("heads", "num_attention_heads", "n_head")
    kv_heads = whole("heads of keys", "num_key_value_heads", default=heads)
    head = whole("width of a head", "head_dim", default=max(width // heads, 1))
    inner = whole("inner width", "intermediate_size", "n_inner", "ffn_dim", default=4 * width)
    vocab = whole("vocabulary", "vocab_size")
    if tensors:
        pairs = [s for n, s in tensors.items() if len(s) == 2 and re.search(r"\.\d+\.", n)]
        parameters = sum(math.prod(s) for s in tensors.values())
    else:
        pairs, parameters = _counted(name, values, layers, width, inner, heads, kv_heads, head)
    require(bool(pairs), f"model {name!r}: linear layers", 0, "its blocks have none")
    return ModelShape(
        name, layers, width, inner, heads, kv_heads, head, vocab, parameters,
        linear=sum(math.prod(s) for s in pairs), sides=sum(map(sum, pairs)), linears=len(pairs),
    )  # fmt: skip


def _counted(
    name: str,
    values: Mapping[str, Any],
    layers: int,
    width: int,
    inner: int,
    heads: int,
    kv_heads: int,
    head: int,
) -> tuple[list[tuple[int, int]], int]:
    """Give the shapes of the blocks' linear weights, and the number of all parameters."""
    kind = values.get("model_type")
    remedy = "its parameters are counted from its *.safetensors alone; name a folder that has them"
    counted = kind in ("llama", "mistral", "qwen2", "qwen3")
    require(counted, f"model {name!r}: model_type", kind, remedy)
    q, k = heads * head, kv_heads * head
    block = [(q, width), (k, width), (k, width), (width, q)]
    block += [(inner, width), (inner, width), (width, inner)]
    attention, mlp = bool(values.get("attention_bias")), bool(values.get("mlp_bias"))
    biases = (q + 2 * k) * (attention or kind == "qwen2") + width * (attention and kind != "qwen2")
    biases += (2 * inner + width) * mlp
    norms = 2 * width + 2 * head * (kind == "qwen3")
    embedding = values["vocab_size"] * width * (1 if values.get("tie_word_embeddings") else 2)
    each = sum(a * b for a, b in block) + biases + norms
    return block * layers, layers * each + embedding + width


def _llama_like(
    layers: int, width: int, inner: int, heads: int, kv_heads: int, vocab: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        **more,
    }


_TIED: dict[str, Any] = {"tie_word_embeddings": True}
_QWEN2: dict[str, Any] = {"model_type": "qwen2"}
# As their config.json have them: Qwen2.5-0.5B, Qwen2.5-7B, Llama-3.1-70B; what is packaged.
MODELS: dict[str, dict[str, Any]] = {
    "0.5B": _llama_like(24, 896, 4864, 14, 2, 151936, **_QWEN2, **_TIED),
    "7B": _llama_like(28, 3584, 18944, 28, 4, 152064, **_QWEN2),
    "70B": _llama_like(80, 8192, 28672, 64, 8, 128256),
    "packaged:smollm2-135m": _llama_like(30, 576, 1536, 9, 3, 49152, **_TIED),
    "world:tiny": _llama_like(2, 32, 64, 4, 2, 371, **_TIED),
}
SAME = {
    "world:concave-front": "world:tiny",
    "Qwen/Qwen2-0.5B": "0.5B",
    "Qwen/Qwen2-0.5B-Instruct": "0.5B",
    "Qwen/Qwen2.5-0.5B": "0.5B",
    "Qwen/Qwen2.5-0.5B-Instruct": "0.5B",
    "Qwen/Qwen2.5-7B": "7B",
    "Qwen/Qwen2.5-7B-Instruct": "7B",
    "meta-llama/Llama-3.1-70B": "70B",
    "meta-llama/Llama-3.1-70B-Instruct": "70B",
}


def shape_of(path: str) -> ModelShape:
    """Give the shape of a model: a name of `MODELS`, a folder, packaged:, world:, or a hub name.

    A hub name's files are looked for where the hub's library keeps them; nothing is fetched.

    Raises ValueError for one that is not here, or whose files do not say it.
    """
    named = SAME.get(path, path)
    if named in MODELS:
        return shape_from(path, MODELS[named])
    kind, _, rest = path.partition(":")
    if kind == "packaged" and re.fullmatch(r"[\w.-]{1,100}", rest):
        folder = cache_folder() / rest
    elif kind == "world" and re.fullmatch(r"[\w.-]{1,100}", rest):
        folder = cache_folder() / "worlds" / rest
    elif os.path.isdir(path):
        folder = Path(path)
    else:
        folder = _of_hub(path)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model={path!r}: its sizes are not known, for its config.json is not here; name a "
            f"folder that has one, or a size: {', '.join(n for n in MODELS if ':' not in n)}"
        )
    settings = read_settings(folder / "config.json", f"model {path!r}")
    tensors: dict[str, tuple[int, ...]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= _shapes(file)
    return shape_from(path, settings, tensors)


def _of_hub(name: str) -> Path:
    """Give the folder of a hub name's newest snapshot here; one that is not there without."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub"))
    if not re.fullmatch(r"[\w.-]{1,100}/[\w.-]{1,100}", name):
        return hub / "none"
    found = sorted((hub / f"models--{name.replace('/', '--')}" / "snapshots").glob("*/config.json"))
    return found[-1].parent if found else hub / "none"


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of a safetensors file's tensors from its head."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > LARGEST:
                raise ValueError("its head is too long")
            head = json.loads(file.read(length))
        return {n: tuple(map(int, t["shape"])) for n, t in head.items() if n != "__metadata__"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"model file {str(path)!r}: is no safetensors file ({error})") from None


@dataclass(frozen=True)
class RewardShape:
    """A reward model's sizes: all parameters, and those that every token meets in a product."""

    parameters: int = 0
    linear: int = 0


_REWARDS = {
    "packaged:complied": RewardShape(22_713_601, 10_616_832),  # BERT: 6 layers, width 384
    "packaged:harmless": RewardShape(22_713_601, 10_616_832),
    "Ray2333/gpt2-large-helpful-reward_model": RewardShape(774_031_360, 707_788_800),
    "Ray2333/gpt2-large-harmless-reward_model": RewardShape(774_031_360, 707_788_800),
    "Tristan/gpt2_reward_summarization": RewardShape(124_440_576, 84_934_656),
    "OpenAssistant/reward-model-deberta-v3-large-v2": RewardShape(435_062_785, 301_989_888),
}


def reward_shape(source: str) -> RewardShape | None:
    """Give the shape of an objective's reward model; None where it is not known here.

    Functions, servers and worlds have no parameters here.
    """
    name = source.partition("?")[0]
    if name in _REWARDS:
        return _REWARDS[name]
    if is_outside(source) or source.startswith(WORLDS):
        return RewardShape()
    folder = Path(name) if os.path.isdir(name) else _of_hub(name)
    shapes = [item for f in sorted(folder.glob("*.safetensors")) for item in _shapes(f).items()]
    if not shapes:
        return None
    inner = [math.prod(s) for n, s in shapes if len(s) == 2 and re.search(r"\.\d+\.", n)]
    return RewardShape(sum(math.prod(s) for _, s in shapes), sum(inner))
