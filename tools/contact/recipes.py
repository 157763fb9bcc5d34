"""A meta-step of the preset `tiny` with every recipe, and the same on the CPU beside it."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
from typing import Any

from meal_fast.config.config import Config
from meal_fast.config.presets import preset
from meal_fast.training.recipes import RECIPES
from meal_fast.training.trainer import Trainer
from tools.contact.here import Cases, Here


def cases(here: Here) -> Cases:
    made: Cases = {name: functools.partial(run, here, name, "float32") for name in RECIPES}
    made["weighted-meta-grpo, bfloat16"] = functools.partial(
        run, here, "weighted-meta-grpo", "bfloat16"
    )
    return made


def config_of(recipe: str, device: str, dtype: str) -> Config:
    tiny = preset("tiny")
    tuning = "bilinear" if recipe == "parm" else "lora"
    policy = dataclasses.replace(tiny.policy, tuning=tuning, device=device, dtype=dtype)
    meta = dataclasses.replace(tiny.meta, steps=1)
    return dataclasses.replace(tiny, recipe=recipe, policy=policy, meta=meta)


def run(here: Here, recipe: str, dtype: str) -> None:
    begin = time.perf_counter()
    lines = trained(here, recipe, here.device, dtype)
    took = time.perf_counter() - begin
    learned = [line for line in lines if not line.get("skipped")]
    finite = all(math.isfinite(line[k]) for line in learned for k in ("loss", "grad_norm"))
    here.row("a meta-step, start to policy", took, "s", ok=bool(learned) and finite)
    if not learned or here.left() < 5:
        return
    # Rounding may draw another token, and what follows is then another run: no verdict.
    beside = trained(here, recipe, "cpu", dtype, "-beside")
    first, same = learned[0], next(x for x in beside if x["update"] == learned[0]["update"])
    if not same.get("skipped"):
        apart = abs(first["grad_norm"] / same["grad_norm"] - 1)
        here.row("first gradient's norm, apart from the CPU's", apart, "relative")


def trained(
    here: Here, recipe: str, device: str, dtype: str, name: str = ""
) -> list[dict[str, Any]]:
    out = here.folder / f"{recipe}-{dtype}{name}"
    Trainer(config_of(recipe, device, dtype), out).train()
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
