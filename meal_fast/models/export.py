"""A policy as a folder that transformers loads."""

from __future__ import annotations

import copy
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from meal_fast.common import as_umask_says, printable, quiet
from meal_fast.data.assets.licences import Origin, origin
from meal_fast.data.preferences import Goals

from .chat_template import default_template, text_markers, with_default
from .preference_template import GLUE, preference_template, without_preference

if TYPE_CHECKING:
    from .policies.base import Policy

ADAPTER, GUIDE = "adapter", "guide.safetensors"  # in the policy's folder
PREFERENCE = "preference.json"  # in the policy's folder: of which objectives, how they are said


@quiet()
def save_policy(policy: Policy, folder: Path) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads, safetensors, whole.

    LoRA: the merged weights, float32 whatever the base's are (in bfloat16 half of what training did
    would be rounded away), and the factors in `adapter/`, PEFT's own format. A guide: merged at
    equal weights, and its factors in `guide.safetensors`. The tokenizer's chat template takes
    `preference`, the text `policy.said(w)` or a mapping of the objectives to numbers, unless the
    style is none. Generation stops at `policy.stop_ids`. The folder appears at once, complete, or
    not at all.
    """
    state = policy.merged_state()
    if policy.sharded is not None and not policy.sharded.first:
        return
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    policy.causal_lm.save_pretrained(temporary, state_dict=state)
    if any(value.dtype == torch.float32 for value in state.values()):
        _changed(temporary / "config.json", dtype="float32")
    stop = sorted(policy.stop_ids)
    if stop:
        ends = stop[0] if len(stop) == 1 else stop
        _changed(temporary / "generation_config.json", eos_token_id=ends)
    policy.save_factors(temporary)
    conditioning: dict[str, Any] = {"objectives": policy.names, "style": policy.style}
    if policy.goals is not None:
        conditioning["goals"] = asdict(policy.goals)
    if policy.glue != GLUE[0]:
        conditioning["glue"] = policy.glue
    (temporary / PREFERENCE).write_text(json.dumps(conditioning))
    words = copy.deepcopy(policy.tokenizer)
    words.chat_template = with_default(words, policy.base_template)
    _save_tokenizer(words, temporary)
    if (temporary / ADAPTER).is_dir():
        _whole_adapter(temporary, policy.source)
    as_umask_says(temporary)
    if folder.exists():
        stale = folder.with_name(folder.name + ".old")
        shutil.rmtree(stale, ignore_errors=True)
        folder.rename(stale)
        temporary.rename(folder)
        shutil.rmtree(stale)
    else:
        temporary.rename(folder)


def copy_model(policy: Path, folder: Path, *, linked: bool = False) -> None:
    """Copy the model that is saved in `policy` into `folder`, without its factors.

    linked: its weights, which are large, are links, for a folder that is only to be read.
    """
    ignored, copied = shutil.ignore_patterns(ADAPTER, GUIDE), _linked if linked else shutil.copy2
    shutil.copytree(policy, folder, dirs_exist_ok=True, ignore=ignored, copy_function=copied)
    _save_tokenizer(_tokenizer(policy), folder)


def _linked(source: str, to: str) -> None:
    if source.endswith(".safetensors"):
        Path(to).symlink_to(Path(source).resolve())
    else:
        shutil.copy2(source, to)


def copy_adapter(policy: Path, folder: Path, base: str) -> None:
    """Copy the LoRA factors that are saved in `policy` into `folder`, and the tokenizer with them.

    `base`: the name by which PEFT finds the model that they belong to.
    """
    if folder != policy / ADAPTER:
        shutil.copytree(policy / ADAPTER, folder, dirs_exist_ok=True)
    shutil.copy2(policy / PREFERENCE, folder)
    _save_tokenizer(_tokenizer(policy), folder)
    _changed(folder / "adapter_config.json", base_model_name_or_path=base)


def _whole_adapter(policy: Path, source: str) -> None:
    """Make `adapter/` a folder that says what it is, and names nothing of this machine."""
    known = base_of(source)
    base, folder = known.hub or known.about, policy / ADAPTER
    copy_adapter(policy, folder, base)
    said = json.loads((policy / PREFERENCE).read_text(encoding="utf-8"))
    (folder / "README.md").write_text(
        _CARD.format(
            base=base,
            yaml=f"base_model: {base}\n" * bool(known.hub),
            names=" and ".join(said["objectives"]),
            how=_HOW if said["style"] != "none" else "",
        ),
        encoding="utf-8",
    )


_CARD = """\
---
library_name: peft
pipeline_tag: text-generation
{yaml}tags:
- lora
- meal-fast
---

# LoRA factors, steered between {names}

For the model `{base}`, as it was loaded when they were trained: load that with transformers, then
`PeftModel.from_pretrained(model, FOLDER)`. The tokenizer here has the chat template that they were
trained with.
{how}
`meal-fast export RUN --to adapter` writes this folder with a card of what was measured.
"""
_HOW = """
The template takes `preference`, a number for each objective, which sum to 1:
`tokenizer.apply_chat_template(messages, preference={...}, add_generation_prompt=True)`.
"""


def base_of(path: str) -> Origin:
    """Tell what was trained. OWNER/NAME is a hub's where the hub's cache has it, else a folder."""
    known = origin(path)
    if known is not None:
        return known
    from huggingface_hub import try_to_load_from_cache

    hub = is_hub_name(path) and not Path(path).is_dir()
    if hub and isinstance(try_to_load_from_cache(path, "config.json"), str):
        return Origin(path, path, "")
    name = printable(Path(path.partition(":")[2] or path).name)
    return Origin(" ".join(name.split()), "", "")


def is_hub_name(name: str) -> bool:
    """Whether it is of the form OWNER/NAME."""
    return bool(re.fullmatch(r"(?!\.)[\w.-]+/[\w.-]+", name))


def _changed(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file, which is made where there is none."""
    held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(held | changes, indent=2) + "\n", encoding="utf-8")


def _tokenizer(policy: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(policy, trust_remote_code=False)


@quiet()
def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write it with a chat template that takes what `preference.json` there says."""
    said = json.loads((folder / PREFERENCE).read_text(encoding="utf-8"))
    goals = Goals(**{k: tuple(v) for k, v in said["goals"].items()}) if "goals" in said else None
    base = without_preference(default_template(tokenizer))
    markers = text_markers(tokenizer, base)
    how = (said["objectives"], said["style"], goals, markers, said.get("glue", GLUE[0]))
    template = preference_template(base, *how)
    tokenizer.chat_template = with_default(tokenizer, template)
    tokenizer.save_pretrained(folder)
