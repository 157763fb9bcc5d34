"""A policy from a folder or a hub name: any causal LM of transformers' attention interface.

Hidden states and the head's weight are taken apart, so that logits (rows x vocabulary) are never
built whole; a model for which that is not the same is refused.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)

from meal_fast.common import first_line, quiet
from meal_fast.config.config import PolicyConfig
from meal_fast.config.model_files import check_model_files
from meal_fast.data.assets import asset
from meal_fast.data.devices import DTYPES, device_of, exact_angles, prepare, settled
from meal_fast.data.preferences import Goals
from meal_fast.data.toy import build_world
from meal_fast.ops.gemm import accelerate

from . import shared_prefix
from .network import cut
from .pblora import Adapter
from .policies.base import Policy
from .policies.full import FullPolicy
from .policies.lora import LoRAPolicy, with_lora
from .policies.pblora import GUIDE, PBLoRAPolicy
from .probe import INSTEAD, probe
from .probe_text import words_of
from .reference_offload import FrozenCopy


def resolve(path: str) -> str:
    """Find the folder (or hub name) behind `policy.path`. Raises ValueError for anything else."""
    kind, _, name = path.partition(":")
    if kind == "packaged" and name:
        return str(asset(name))
    if kind == "world" and name:
        return str(build_world(name))
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise ValueError(f"policy.path={path!r}: has no config.json; not a transformers model")
        check_model_files(Path(path), f"policy.path={path!r}")
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        raise ValueError(
            f"policy.path={path!r}: neither a folder, nor packaged:NAME, nor a hub name ORG/NAME"
        )
    return path


@quiet()
def load_policy(
    config: PolicyConfig,
    names: Sequence[str],
    *,
    seed: int = 0,
    trained: Path | None = None,
    template: str | None = None,
) -> Policy:
    """Load the policy; `trained`: the `policy/` folder of a run to continue from or evaluate.

    template: the chat template as the run has kept it; None: the model's own, as it is today.

    LoRA factors and a guide's start with B = 0, A drawn from `seed`. Raises ValueError where the
    path is not a model, or the model is one that the shared-prefix attention cannot run.
    """
    path, config = resolve(config.path), settled(config)
    device = device_of(config.device)
    prepare(device, config.dtype)
    said = f"policy.path={config.path!r}"
    model, tokenizer = _load(path, config, said)
    style, goals = config.preference_text, None
    if trained is not None and style == "scores":
        goals = Goals.load(trained / "preference.json", len(names))
    words = words_of(config, tokenizer, names, goals, template)

    def ready(model: Any) -> Any:
        # eval: no dropout anywhere, so that log-probabilities are comparable
        return accelerate(model).to(device).eval()

    policy: Policy
    if config.tuning == "full":
        frozen = FrozenCopy(ready(model), path)
        if trained is not None:
            model, _ = _load(str(trained), config, repr(str(trained)))
        policy = FullPolicy(ready(model), frozen, *words)
    elif config.tuning == "lora":
        with _one_line(f"{said}: LoRA's factors cannot be put on it"):
            model = with_lora(model, config, seed, trained)
        policy = LoRAPolicy(ready(model), *words)
    else:
        if cut(model).softcap is not None:
            raise ValueError(
                f"policy.path={config.path!r}: caps its logits, so those of base and guide do not "
                "add up; recipe 'parm' needs another model"
            )
        adapter = Adapter(model, len(names), config.lora_rank, config.lora_alpha, seed)
        if trained is not None:
            adapter.load(trained / GUIDE)
        policy = PBLoRAPolicy(ready(model), adapter, *words)
    policy.source = config.path
    probe(policy, config.path)
    return policy


def _load(path: str, config: PolicyConfig, said: str) -> tuple[Any, Any]:
    """The model and its tokenizer. Raises ValueError, one line that begins with `said`, for
    whatever cannot be loaded."""
    with _one_line(f"{said}: its config.json cannot be used"):
        settings = AutoConfig.from_pretrained(path, trust_remote_code=False)
        kind = settings.model_type
        if type(settings) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"{said}: {kind} is no causal language model; {INSTEAD}")
        try:
            shared_prefix.check_supported(settings)
        except shared_prefix.Refused as error:
            raise ValueError(f"{said}: {kind} {error}; {INSTEAD}") from None
    if getattr(settings, "quantization_config", None):
        raise ValueError(
            f"{said}: its weights are quantized, which no policy is trained from; name the folder "
            "of the whole weights"
        )
    own = f"{said}: {kind} has an attention of its own and is not supported; {INSTEAD}"
    if Path(path).is_dir() and not any(Path(path).glob("*.safetensors")):
        raise ValueError(f"{said}: has no *.safetensors; name a folder that save_pretrained wrote")
    with _one_line(f"{said}: its weights cannot be loaded", own), _unreported():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=DTYPES[config.dtype],
            attn_implementation=shared_prefix.ATTENTION,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    model, found = loaded
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(own)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{said}: its weights lack {missing[0]} and {len(missing) - 1} more of "
            f"{type(model).__name__}, which would be drawn at random; name a folder with a whole "
            "causal language model"
        )
    of_body = f"{model.base_model_prefix}."
    left = [n for n in sorted(found["unexpected_keys"]) if n.startswith(of_body)]
    if left := [name for name in left if not name.endswith("inv_freq")]:
        raise ValueError(
            f"{said}: its weights hold {left[0]} and {len(left) - 1} more, which its configuration "
            "leaves out; put config.json and weights of one model together"
        )
    if not isinstance(getattr(model.get_output_embeddings(), "weight", None), torch.Tensor):
        raise ValueError(f"{said}: {kind} has no linear head; {INSTEAD}")
    with _one_line(f"{said}: its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    rows = len(model.get_input_embeddings().weight)
    if (last := max(tokenizer.get_vocab().values(), default=0)) >= rows:
        raise ValueError(
            f"{said}: its tokenizer has a token of number {last}, its model embeddings for "
            f"{rows}; use the tokenizer that belongs to the model"
        )
    exact_angles(model)
    return model, tokenizer


@contextmanager
def _unreported() -> Iterator[None]:
    """Without transformers' table of weights that are missing or left over, which is refused, nor
    what it says of layers that are on one device all the same."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _one_line(what: str, own_attention: str = "") -> Iterator[None]:
    """Make one line of whatever transformers, or the files, raise: a ValueError that begins with
    `what` and gives a remedy."""
    try:
        yield
    except Exception as error:  # of other people's code and files: it may be anything
        text = str(error)
        if isinstance(error, ValueError) and text.startswith(("policy", what.partition(": ")[0])):
            raise
        if isinstance(error, ModuleNotFoundError) and error.name == "peft":
            raise  # a package of ours: commands say how to install it
        if isinstance(error, KeyError) and text == repr(shared_prefix.ATTENTION):
            raise ValueError(own_attention) from None
        raise ValueError(f"{what} ({first_line(error)}); {_remedy(error, text)}") from error


def _remedy(error: Exception, text: str) -> str:
    if "trust_remote_code" in text:
        return "it needs code of its own, which is never run; use a model that transformers knows"
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return f"transformers {transformers.__version__} does not know it; use another model"
    if isinstance(error, ImportError):
        return "install what it needs, or use another model"
    if isinstance(error, SafetensorError):
        return "a file is damaged or cut short; copy it again"
    if "tokenizer" in text.lower():
        return "save it beside the model: AutoTokenizer.from_pretrained(NAME).save_pretrained(…)"
    return f"see that it is whole: AutoModelForCausalLM.from_pretrained(…) must load it; {INSTEAD}"
