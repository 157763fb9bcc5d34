"""A policy as a folder that transformers loads."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meal_fast.common import quiet

from .prompt_format import preference_template

if TYPE_CHECKING:
    from .policies.base import Policy


@quiet()
def save_policy(policy: Policy, folder: Path) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads, safetensors, whole.

    LoRA: the merged weights, and the factors in `adapter/`, PEFT's own format. A guide: merged at
    equal weights, and its factors in `guide.safetensors`. The tokenizer's chat template takes
    `preference=policy.said(w)`, unless the style is none. The folder appears at once, complete, or
    not at all.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    policy.causal_lm.save_pretrained(temporary, state_dict=policy.merged_state())
    policy.save_factors(temporary)
    tokenizer = copy.deepcopy(policy.tokenizer)
    if policy.style != "none":
        tokenizer.chat_template = preference_template(policy.tokenizer.chat_template)
    tokenizer.save_pretrained(temporary)
    conditioning: dict[str, Any] = {"objectives": policy.names, "style": policy.style}
    if policy.goals is not None:
        conditioning["goals"] = asdict(policy.goals)
    (temporary / "preference.json").write_text(json.dumps(conditioning))
    if folder.exists():
        stale = folder.with_name(folder.name + ".old")
        shutil.rmtree(stale, ignore_errors=True)
        folder.rename(stale)
        temporary.rename(folder)
        shutil.rmtree(stale)
    else:
        temporary.rename(folder)
