"""A policy from a folder or a hub name: any causal LM of transformers' attention interface.

Hidden states and the head's weight are taken apart, so that logits (rows x vocabulary) are never
built whole; a model for which that is not the same is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from meal_fast.common import quiet
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
    config: PolicyConfig, names: Sequence[str], *, seed: int = 0, trained: Path | None = None
) -> Policy:
    """Load the policy; `trained`: the `policy/` folder of a run to continue from or evaluate.

    LoRA factors and a guide's start with B = 0, A drawn from `seed`. Raises ValueError where the
    path is not a model, or the model is one that the shared-prefix attention cannot run.
    """
    path, config = resolve(config.path), settled(config)
    device = device_of(config.device)
    prepare(device, config.dtype)
    model, tokenizer = _load(path, config)
    style, goals = config.preference_text, None
    if trained is not None and style == "scores":
        goals = Goals.load(trained / "preference.json", len(names))
    words = (tokenizer, names, style, goals)

    def ready(model: Any) -> Any:
        # eval: no dropout anywhere, so that log-probabilities are comparable
        return accelerate(model).to(device).eval()

    policy: Policy
    if config.tuning == "full":
        frozen = FrozenCopy(ready(model), path)
        if trained is not None:
            model, _ = _load(str(trained), config)
        policy = FullPolicy(ready(model), frozen, *words)
    elif config.tuning == "lora":
        policy = LoRAPolicy(ready(with_lora(model, config, seed, trained)), *words)
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
    _check_head(policy)
    return policy


def _load(path: str, config: PolicyConfig) -> tuple[Any, Any]:
    try:
        settings = AutoConfig.from_pretrained(path, trust_remote_code=False)
        shared_prefix.check_supported(settings)
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=DTYPES[config.dtype],
            attn_implementation=shared_prefix.ATTENTION,
            trust_remote_code=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except KeyError as error:
        if str(error) != repr(shared_prefix.ATTENTION):
            raise
        raise ValueError(
            f"policy.path={config.path!r}: {settings.model_type} has an attention of its own and "
            "is not supported; use a model of transformers' attention interface (Llama, Qwen, …)"
        ) from None
    except OSError as error:
        line = str(error).splitlines()[0]
        raise ValueError(
            f"policy.path={config.path!r}: no model could be loaded ({line})"
        ) from None
    exact_angles(model)
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"policy.path={config.path!r}: {type(model).__name__} has an attention of its own and "
            "is not supported; use a model of transformers' attention interface (Llama, Qwen, …)"
        )
    if tokenizer.chat_template is None:
        raise ValueError(f"policy.path={config.path!r}: its tokenizer has no chat template")
    return model, tokenizer


@torch.no_grad()
def _check_head(policy: Policy) -> None:
    """Refuses a model that scales or shifts what leaves its head: cut apart it is another."""
    ids = torch.tensor([policy.encode_prompt("a")[-3:]], device=policy.device)
    whole = policy.causal_lm(input_ids=ids, use_cache=False).logits[0].float()
    network = policy.network
    apart = network.logits(network.body(input_ids=ids, use_cache=False).last_hidden_state[0])
    if not torch.allclose(whole, apart, atol=1e-2, rtol=1e-2):
        name = type(policy.causal_lm).__name__
        raise ValueError(f"policy: {name} does more than a linear head and softcap to its logits")
