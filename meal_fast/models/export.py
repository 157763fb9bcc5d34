"""A policy as a folder that transformers loads."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meal_fast.common import as_umask_says, quiet
from meal_fast.data.preferences import Goals

from .preference_template import preference_template

if TYPE_CHECKING:
    from .policies.base import Policy

ADAPTER, GUIDE = "adapter", "guide.safetensors"  # in the policy's folder
PREFERENCE = "preference.json"  # in the policy's folder: of which objectives, how they are said


@quiet()
def save_policy(policy: Policy, folder: Path) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads, safetensors, whole.

    LoRA: the merged weights, and the factors in `adapter/`, PEFT's own format. A guide: merged at
    equal weights, and its factors in `guide.safetensors`. The tokenizer's chat template takes
    `preference`, the text `policy.said(w)` or a mapping of the objectives to numbers, unless the
    style is none. The folder appears at once, complete, or not at all.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    policy.causal_lm.save_pretrained(temporary, state_dict=policy.merged_state())
    policy.save_factors(temporary)
    conditioning: dict[str, Any] = {"objectives": policy.names, "style": policy.style}
    if policy.goals is not None:
        conditioning["goals"] = asdict(policy.goals)
    (temporary / PREFERENCE).write_text(json.dumps(conditioning))
    _save_tokenizer(copy.deepcopy(policy.tokenizer), temporary)
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
    shutil.copytree(policy / ADAPTER, folder, dirs_exist_ok=True)
    shutil.copy2(policy / PREFERENCE, folder)
    _save_tokenizer(_tokenizer(policy), folder)
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text(encoding="utf-8")) | {"base_model_name_or_path": base}
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _tokenizer(policy: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(policy, trust_remote_code=False)


@quiet()
def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write it with a chat template that takes what `preference.json` there says."""
    said = json.loads((folder / PREFERENCE).read_text(encoding="utf-8"))
    goals = Goals(**{k: tuple(v) for k, v in said["goals"].items()}) if "goals" in said else None
    tokenizer.chat_template = preference_template(
        tokenizer.chat_template, said["objectives"], said["style"], goals
    )
    tokenizer.save_pretrained(folder)
