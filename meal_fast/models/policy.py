"""The policy and its frozen reference: any `AutoModelForCausalLM`, with LoRA or all parameters.

The one file that knows model classes. Hidden states and the head's weight are taken apart, so that
logits (rows x vocabulary) are never built whole.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from meal_fast.common import quiet
from meal_fast.config.config import PolicyConfig
from meal_fast.data.assets import asset
from meal_fast.data.devices import DTYPES, device_of, exact_angles, prepare, settled
from meal_fast.data.preferences import Goals, preference_text
from meal_fast.data.toy import build_world
from meal_fast.ops.gemm import accelerate

from . import multi_lora, shared_prefix
from .network import Network, cut
from .pblora import Adapter
from .reference_offload import FrozenCopy
from .served import Served
from .sizes import Sizes, sizes_of

GUIDE = "guide.safetensors"  # in the policy's folder
_MARK = "\u241f"  # stands for the user's text while the chat template is cut in two


class Policy:
    """A steerable policy: `network`, its frozen `reference()`, its tokenizer and its parameters."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        names: Sequence[str],
        frozen: FrozenCopy | None = None,
        style: str = "bar",
        adapter: Adapter | None = None,
        goals: Goals | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.names = tuple(names)
        self.style = style
        self.goals = goals  # of style `scores`; None in training, whose requests hold rewards
        self.lora = hasattr(model, "peft_config")
        self._base: Any = model.get_base_model() if self.lora else model
        self._frozen = frozen
        self.adapter = adapter  # of a guide: the policy then is the base model, guided by it
        self.served: Network | None = None  # what it samples from, where a guide is put to it
        self._copy: Served | None = None  # the same, where weights are copied: see `merged`
        self.kept: Any = None  # what a sampler keeps for as long as the copy stays
        self.trainable = list(self.named.values())
        self._before, self._after = split_template(tokenizer)
        self.encode_prompt = lru_cache(maxsize=4096)(self._encode_prompt)
        self._encode_said = lru_cache(maxsize=4096)(self._encode_said_text)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def causal_lm(self) -> Any:
        """Give transformers' causal LM, with whatever adapters are in it."""
        return self._base

    @property
    def reference_lm(self) -> Any:
        """Give the causal LM whose network `reference` gives: the policy's own, but for full
        tuning."""
        return self._base if self._frozen is None else self._frozen.model

    @property
    def network(self) -> Network:
        return cut(self._base)

    @cached_property
    def sizes(self) -> Sizes:
        """How much goes at once; decided once, when it is first asked for."""
        return sizes_of(self.network)

    @contextmanager
    def reference(self) -> Iterator[Network]:
        """The frozen base model: adapters off, or the copy made before full-parameter training."""
        if self.lora:
            with self.model.disable_adapter():
                yield cut(self._base)
        elif self.adapter is not None:
            with self.adapter.at(None):
                yield cut(self._base)
        elif self._frozen is None:
            yield cut(self._base)
        else:
            try:
                yield cut(self._frozen.model)
            finally:
                self._frozen.release()

    @contextmanager
    def merged(self) -> Iterator[Network]:
        """The policy for passes without gradients; in float32 with LoRA's factors multiplied out.

        That saves two of the three products of each layer. On a CPU the sums take the weights'
        place as long as it lasts. On a GPU, and in bfloat16, where the factors stay apart, there is
        a copy whose tensors stay where they are: `models.served`. Tasks' adapters (`stacked`) stay
        apart. With a guide it is what `guide.guided` put here, and a ValueError outside of
        that: each preference has its own.
        """
        if self.adapter is not None:
            if self.served is None:
                raise ValueError("policy: its guide answers at one preference; see guide.guided")
            yield self.served
            return
        layers = [m for m in self.model.modules() if hasattr(m, "get_delta_weight")]
        if not all(multi_lora.mergeable(m) for m in layers):
            yield self.network
            return
        weight = self.network.weight
        if weight.is_cuda or weight.dtype != torch.float32:
            yield self._written_copy()
            return
        if not layers:
            yield self.network
            return
        kept = [m.base_layer.weight.data for m in layers]
        try:
            for m in layers:
                m.base_layer.weight.data = m.base_layer.weight + m.get_delta_weight("default")
            with self.model.disable_adapter():
                yield self.network
        finally:
            for m, weight in zip(layers, kept, strict=True):
                m.base_layer.weight.data = weight

    def _written_copy(self) -> Network:
        rank = self.model.peft_config["default"].r if self.lora else 0
        if self._copy is None or rank > self._copy.rank:
            self._copy = self.kept = None  # before there is another
            self._copy = Served(self._base)
        else:
            self._copy.write()
        return self._copy.network or self.network

    def stays(self, network: Network) -> bool:
        """Whether the tensors of `network` keep their addresses for as long as the policy lives."""
        return self._copy is not None and network is self._copy.network

    @property
    def named(self) -> dict[str, nn.Parameter]:
        """What is trained, by name, in the order of `trainable`."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Within it, the trained parameters are `values`, all of them, by name.

        LoRA's factors may be of a multiple of its rank: alpha goes with it, so the scale stays.
        """
        kept = [(p, p.data) for p in self.trainable]
        lora = self.model.peft_config["default"] if self.lora else None
        rank, alpha = (lora.r, lora.lora_alpha) if lora else (1, 1)
        try:
            for name, p in self.named.items():
                p.data = values[name].to(p.device, p.dtype)
            if lora:
                lora.r = next(len(v) for name, v in values.items() if ".lora_A." in name)
                lora.lora_alpha = alpha * lora.r // rank
            yield
        finally:
            for p, data in kept:
                p.data = data
            if lora:
                lora.r, lora.lora_alpha = rank, alpha

    def check_stackable(self) -> None:
        """Raises ValueError where `stacked` would."""
        multi_lora.layers_of(self.model, self.network.body, self.trainable)

    def stacked(self, tasks: multi_lora.Tasks) -> AbstractContextManager[None]:
        """Within it every token goes through its own task's adapter: see `models.multi_lora`.

        `tasks[t]` stand in for `trainable`. Without tasks nothing changes.
        """
        if not tasks:
            return nullcontext()
        return multi_lora.stacked(self.model, self.network.body, self.trainable, tasks)

    @contextmanager
    def recomputing(self, on: bool) -> Iterator[None]:
        """Forward passes in it keep each layer's input alone, and make the rest again going back.

        The layers are told that they train, which is what switches it on; what is in them is not,
        so that no dropout comes on.
        """
        layers = [m for m in self._base.modules() if isinstance(m, GradientCheckpointingLayer)]
        if on and layers and not layers[0].gradient_checkpointing:
            settings = {"use_reentrant": False, "preserve_rng_state": False}
            if hasattr(self._base, "activation_checkpointing_enable"):  # its newer name
                self._base.activation_checkpointing_enable(settings)
            else:
                self._base.gradient_checkpointing_enable(settings)
        for layer in layers:
            layer.training = on
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    @property
    def context(self) -> int:
        """Tokens that the model can see."""
        text = self._base.config.get_text_config()
        return int(getattr(text, "max_position_embeddings", None) or 1 << 30)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a response."""
        ids = {self.tokenizer.eos_token_id}
        configured = getattr(self._base.generation_config, "eos_token_id", None)
        ids.update(configured if isinstance(configured, list) else [configured])
        return frozenset(int(i) for i in ids if i is not None)

    def _encode_prompt(self, text: str) -> tuple[int, ...]:
        """Tokens of everything before the preference: template, system line, the user's text."""
        ids = self.tokenizer(self._before + text, add_special_tokens=False)["input_ids"]
        return tuple(ids)

    def said(self, w: tuple[float, ...] | None) -> str:
        """The text by which it reads a preference; none: no text."""
        if w is None:
            return ""
        read = w if self.goals is None else self.goals.of(w)
        return preference_text(read, self.names, self.style)

    def encode_suffix(self, w: tuple[float, ...] | None) -> tuple[int, ...]:
        """Tokens of the preference (none: no preference text) and of the assistant's header."""
        return self._encode_said(self.said(w))

    def _encode_said_text(self, said: str) -> tuple[int, ...]:
        text = (f" {said}" if said else "") + self._after
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    @quiet()
    def save(self, folder: Path) -> None:
        """Writes a folder that `AutoModelForCausalLM.from_pretrained` loads, safetensors, whole.

        LoRA: the merged weights, and the factors in `adapter/`, PEFT's own format. A guide: merged
        at equal weights, and its factors in `guide.safetensors`. The tokenizer's chat template
        takes `preference=policy.said(w)`, unless the style is none. The folder appears at once,
        complete, or not at all.
        """
        temporary = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        self._base.save_pretrained(temporary, state_dict=self._merged())
        if self.lora:
            self.model.save_pretrained(str(temporary / "adapter"))
        if self.adapter is not None:
            self.adapter.save(temporary / GUIDE)
        tokenizer = copy.deepcopy(self.tokenizer)
        if self.style != "none":
            tokenizer.chat_template = preference_template(self.tokenizer.chat_template)
        tokenizer.save_pretrained(temporary)
        conditioning: dict[str, Any] = {"objectives": self.names, "style": self.style}
        if self.goals is not None:
            conditioning["goals"] = asdict(self.goals)
        (temporary / "preference.json").write_text(json.dumps(conditioning))
        if folder.exists():
            stale = folder.with_name(folder.name + ".old")
            shutil.rmtree(stale, ignore_errors=True)
            folder.rename(stale)
            temporary.rename(folder)
            shutil.rmtree(stale)
        else:
            temporary.rename(folder)

    def _merged(self) -> dict[str, Tensor]:
        """The base's state with alpha/rank * B A added; the model in use is not touched."""
        if self.adapter is not None:
            equal = torch.full((len(self.names),), 1 / len(self.names), device=self.device)
            return self.adapter.state(self._base.state_dict(), equal)
        state = {
            name.replace(".base_layer.", "."): value
            for name, value in self._base.state_dict().items()
            if ".lora_" not in name
        }
        for name, module in self._base.named_modules():
            if hasattr(module, "get_delta_weight"):
                delta = module.get_delta_weight("default")
                state[f"{name}.weight"] = state[f"{name}.weight"] + delta
        return state


def resolve(path: str) -> str:
    """The folder (or hub name) behind `policy.path`. Raises ValueError for anything else."""
    kind, _, name = path.partition(":")
    if kind == "packaged" and name:
        return str(asset(name))
    if kind == "world" and name:
        return str(build_world(name))
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise ValueError(f"policy.path={path!r}: has no config.json; not a transformers model")
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
    """Loads the policy; `trained`: the `policy/` folder of a run to continue from or evaluate.

    LoRA factors and a guide's start with B = 0, A drawn from `seed`. Raises ValueError where the
    path is not a model, or the model is one that the shared-prefix attention cannot run.
    """
    path, config = resolve(config.path), settled(config)
    device = device_of(config.device)
    prepare(device, config.dtype)
    model, tokenizer = _load(path, config)
    frozen = adapter = None
    if config.tuning == "lora":
        model = _with_lora(model, config, seed, trained)
    elif config.tuning == "bilinear":
        if cut(model).softcap is not None:
            raise ValueError(
                f"policy.path={config.path!r}: caps its logits, so those of base and guide do not "
                "add up; recipe 'parm' needs another model"
            )
        adapter = Adapter(model, len(names), config.lora_rank, config.lora_alpha, seed)
        if trained is not None:
            adapter.load(trained / GUIDE)
    else:
        frozen = FrozenCopy(accelerate(model).to(device).eval(), path)
        if trained is not None:
            model, _ = _load(str(trained), config)
        embedding = model.get_input_embeddings()
        # Tied to the head, it gets a dense gradient there: no second one for a few of its rows.
        embedding.sparse = embedding.weight is model.get_output_embeddings().weight
    # eval: no dropout anywhere, so that log-probabilities are comparable
    accelerate(model).to(device).eval()
    style, goals = config.preference_text, None
    if trained is not None and style == "scores":
        goals = Goals.load(trained / "preference.json", len(names))
    policy = Policy(model, tokenizer, names, frozen, style, adapter, goals)
    _check_head(policy)
    return policy


def _with_lora(model: Any, config: PolicyConfig, seed: int, trained: Path | None) -> Any:
    # Here, not above: whoever trains all parameters needs none of its memory.
    from peft import LoraConfig, PeftModel, get_peft_model

    model.requires_grad_(False)
    if trained is not None:
        model = PeftModel.from_pretrained(model, trained / "adapter", is_trainable=True)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            settings = LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_alpha,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            )
            model = get_peft_model(model, settings)
    return multi_lora.fuse(model)


def _load(path: str, config: PolicyConfig) -> tuple[Any, Any]:
    try:
        settings = AutoConfig.from_pretrained(path)
        shared_prefix.check_supported(settings)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=DTYPES[config.dtype], attn_implementation=shared_prefix.ATTENTION
        )
        tokenizer = AutoTokenizer.from_pretrained(path)
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
    whole = policy._base(input_ids=ids, use_cache=False).logits[0].float()
    network = policy.network
    apart = network.logits(network.body(input_ids=ids, use_cache=False).last_hidden_state[0])
    if not torch.allclose(whole, apart, atol=1e-2, rtol=1e-2):
        name = type(policy._base).__name__
        raise ValueError(f"policy: {name} does more than a linear head and softcap to its logits")


def split_template(tokenizer: Any) -> tuple[str, str]:
    """The chat template's text before and after the user's text (one turn, assistant's header)."""
    messages = [{"role": "user", "content": _MARK}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, mark, after = whole.partition(_MARK)
    if not mark or _MARK in after:
        raise ValueError("the tokenizer's chat template does not hold the user's text exactly once")
    return before, after


def preference_template(template: str) -> str:
    """`template` with an optional argument `preference`, a text put at the end of the last turn."""
    if template.startswith("{%- if preference is defined"):
        return template
    return (
        "{%- if preference is defined and preference -%}"
        "{%- set messages = messages[:-1] + [{'role': messages[-1]['role'], "
        "'content': messages[-1]['content'] | trim + ' ' + preference}] -%}"
        "{%- endif -%}" + template
    )
