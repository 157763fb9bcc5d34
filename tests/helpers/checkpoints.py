"""What a run's checkpoints hold, and such as earlier versions wrote."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import torch

from meal_fast.config.run_dir import CHECKPOINTS, LATEST, OLD_CHECKPOINTS
from meal_fast.training.checkpoint_files import _digest
from meal_fast.training.checkpoint_saved import Saved, read_sound


def latest(run: Path) -> Path:
    """The folder of the last checkpoint."""
    return run / CHECKPOINTS / (run / CHECKPOINTS / LATEST).read_text().strip()


def saved(run: Path) -> Saved:
    """The last checkpoint, with all its digests looked at."""
    return read_sound(latest(run))


def every_file(run: Path) -> list[str]:
    """The files of all checkpoints, the last ones first, by their names in the run's folder."""
    files = [p for p in (run / CHECKPOINTS).rglob("*") if p.is_file()]
    return sorted((str(p.relative_to(run)) for p in files), reverse=True)


def old_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's state, as a version before ckpt/ had it in a file."""
    found = read_sound(folder)
    names = ("version", "step", "tokens", "metrics_bytes", "completions_bytes", "files", "config")
    state = {**{name: found.said[name] for name in names}, **found.load()}
    return {**state, "digest": _digest(state)}


def as_old(run: Path) -> None:
    """Make a run's two last checkpoints those that an earlier version would have written."""
    newest = latest(run)
    others = [p for p in newest.parent.glob("step-*") if p != newest]
    for folder, name in zip([newest, *others], OLD_CHECKPOINTS, strict=False):
        torch.save(old_state(folder), run / name)
    shutil.rmtree(run / CHECKPOINTS)


def part_size(run: Path, rank: int) -> int:
    """Bytes of a process's part of a checkpoint, while the run goes on; 0: none is there."""
    for part in run.glob(f"{CHECKPOINTS}/step-*/rank-{rank:05}.safetensors"):
        with contextlib.suppress(FileNotFoundError):  # just removed
            return part.stat().st_size
    return 0
