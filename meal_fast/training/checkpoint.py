"""A run's folder: opened, started, resumed, and what is written into it. Files that are whole."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meal_fast import __version__
from meal_fast.common import replacing, write_atomic
from meal_fast.config.config import Config, to_dict
from meal_fast.config.recipes import spec_of
from meal_fast.config.run_dir import check_folder
from meal_fast.data.preferences import Preference
from meal_fast.models.model_soup import FILE, Family
from meal_fast.models.policy import Policy


def open_run(config: Config, out: Path, resume: bool) -> dict[str, Any] | None:
    """Read the checkpoint to go on from; None: a new run. Refuse a folder that does not fit."""
    check_folder(config, out, resume)
    if not resume:
        return None
    path = out / "checkpoint.pt"
    if not path.exists():
        return None  # stopped before its first checkpoint: starts again
    return torch.load(path, map_location="cpu", weights_only=True)


def check_space(out: Path, policy: Policy, models: int) -> None:
    """Raise ValueError without room for two checkpoints, of which the old one goes last."""
    place = next(p for p in (out, *out.absolute().parents) if p.exists())
    trained = sum(p.numel() for p in policy.trainable) * models
    saved = sum(p.numel() * p.element_size() for p in policy.model.parameters())
    family = 4 * trained if models > 1 else 0
    need = 2 * 3 * 4 * trained + 2 * saved + family
    free = shutil.disk_usage(place).free
    if free < need:
        raise ValueError(
            f"out={str(out)!r}: {free / 1e6:,.1f} MB free, checkpoints and the policy need "
            f"{need / 1e6:,.1f} MB; name a folder with more space"
        )


def write_config(out: Path, config: Config) -> None:
    """Write config.json."""
    write_atomic(out / "config.json", json.dumps(to_dict(config), indent=1))


def note_threads(out: Path, saved: Config, threads: int) -> None:
    """Write into config.json how many threads a run has, where an older version did not."""
    if not saved.threads:
        write_config(out, dataclasses.replace(saved, threads=threads))


def write_checkpoint(out: Path, state: Mapping[str, Any]) -> None:
    """Write everything that the rest of a run depends on, in one file that is replaced whole."""
    with replacing(out / "checkpoint.pt") as file:
        torch.save({"version": __version__, **state}, file)


def write_policy(
    out: Path, policy: Policy, config: Config, models: Mapping[Preference, Sequence[Tensor]]
) -> None:
    """Write `policy/`; of several models the one for equal weights, after a file with them all."""
    served: AbstractContextManager[None] = nullcontext()
    between = spec_of(config).between
    if between:
        named = [dict(zip(policy.named, theta, strict=True)) for theta in models.values()]
        family = Family(tuple(models), tuple(named), between)
        write_atomic(out / FILE, family.to_bytes(config.names))
        served = family.at(policy, (1.0 / len(config.names),) * len(config.names))
    with served:
        policy.save(out / "policy")
