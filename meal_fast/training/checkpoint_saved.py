"""A checkpoint as it is read back: only where it is what was written, and by as many as like to.

`ckpt/step-N/` has a safetensors file of each process that wrote, and `manifest.json`: what the
checkpoint goes with, the state without its tensors' values, where these are, and the size and
SHA-256 of each file. The manifest ends with its own SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from meal_fast.common import opening, parse_json
from meal_fast.config.sealed import sha256

from .checkpoint_files import read_checkpoint
from .checkpoint_state import Where, dtype_of, put_together
from .checkpoint_store import load

MANIFEST = "manifest.json"
FORMAT = 1
# What a checkpoint says of itself, beside the state: whole numbers, none negative.
COUNTS = ("step", "tokens", "metrics_bytes", "completions_bytes")
_PART = re.compile(r"rank-[0-9]+\.safetensors")


class Like(Protocol):
    """Give the tensor that a value is read into, by its place, shape and type.

    A DTensor takes a process's own part of it and no more.
    """

    def __call__(self, where: Where, shape: torch.Size, dtype: torch.dtype) -> Tensor: ...


def plain(where: Where, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Read a value whole, into the host's memory."""
    return torch.empty(shape, dtype=dtype)


def everything(where: Where) -> bool:
    """Want every entry."""
    return True


class Saved:
    """A checkpoint that was found to be what was written."""

    def __init__(
        self,
        name: str,
        said: Mapping[str, Any],
        read: Callable[[Like, Callable[[Where], bool]], dict[str, Any]],
    ) -> None:
        self.name, self.said, self._read = name, said, read
        self.step, self.tokens = int(said["step"]), int(said["tokens"])
        self.metrics_bytes = int(said["metrics_bytes"])
        self.completions_bytes = int(said.get("completions_bytes", 0))

    def load(
        self, *, like: Like = plain, wanted: Callable[[Where], bool] = everything
    ) -> dict[str, Any]:
        """Read the state, `outer` and `experience`, as it was given to be saved.

        A process reads what it asks for, alone. like: into which tensors, where not into new ones
        on the host. wanted: which entries of tables. Raises ValueError where a tensor cannot be
        read so.
        """
        return self._read(like, wanted)


def read_old(path: Path) -> Saved:
    """Read what a version before wrote as one file. Raises ValueError, which begins with a verb."""
    state = read_checkpoint(path)
    return Saved(path.name, state, lambda like, wanted: state)


def read_folder(folder: Path, name: str) -> Saved:
    """Read what a checkpoint says; its parts' digests are not looked at.

    Raises ValueError, which begins with a verb, for one that is not what was written.
    """
    said = _manifest(folder)

    def read(like: Like, wanted: Callable[[Where], bool]) -> dict[str, Any]:
        tensors: dict[str, Tensor] = {}

        def place(held: str, where: Where) -> Tensor:
            table = said["tensors"][held]
            tensors[held] = like(where, torch.Size(table["shape"]), dtype_of(table["dtype"]))
            return tensors[held]

        with opening(f"RUN={str(folder.parent.parent)!r}: {name}"):
            state: dict[str, Any] = put_together(said["state"], place, wanted)
            load(tensors, folder, said["tensors"])
        return state

    return Saved(name, said, read)


def check_parts(folder: Path, saved: Saved, first: int = 0, every: int = 1) -> None:
    """Raise ValueError where a part is not what was written: those from the first, each so many."""
    for name in sorted(saved.said.get("parts", ()))[first::every]:
        if sha256(folder / name) != saved.said["parts"][name][1]:
            raise ValueError(f"is damaged: {name} is not what was written")


def manifest(said: Mapping[str, Any]) -> str:
    """Write a manifest, with its digest."""
    text = json.dumps(said, separators=(",", ":"), allow_nan=False)
    return json.dumps({**said, "digest": _digest(text)}, separators=(",", ":"), allow_nan=False)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except OSError as error:
        missing = "is missing" if not folder.is_dir() else f"is not whole: it has no {MANIFEST}"
        what = f"is not to be read: {MANIFEST} ({error.strerror})"
        raise ValueError(missing if not path.exists() else what) from None
    try:
        said = parse_json(data)
        digest = said.pop("digest")
        text = json.dumps(said, separators=(",", ":"), allow_nan=False)
    except (ValueError, AttributeError, KeyError):
        raise ValueError(f"is damaged: {MANIFEST} is not what was written") from None
    if digest != _digest(text):
        raise ValueError(f"is damaged: {MANIFEST} is not what was written")
    if said.get("format") != FORMAT:
        raise ValueError(f"is of another version, {said.get('version')!r:.40}")
    try:
        _check(folder, said)
        # The state can be put together: all tensors that it names are there.
        state = put_together(said["state"], lambda name, where: said["tensors"][name])
        if not {"outer", "experience"} <= state.keys():
            raise ValueError(f"is damaged: {MANIFEST} is no run's")
    except ValueError:
        raise
    except Exception:  # of one that was made up, whatever comes to mind
        raise ValueError(f"is damaged: {MANIFEST} is no run's") from None
    return dict(said)


def _check(folder: Path, said: Mapping[str, Any]) -> None:
    """Raise ValueError for a manifest that leads out of its folder, or asks for what it has not."""
    held: dict[str, int] = {}
    for name, (size, _) in said["parts"].items():
        if not _PART.fullmatch(name):
            raise ValueError(f"is damaged: {name!r:.40} is no part of a checkpoint")
        if not (folder / name).is_file():
            raise ValueError(f"is not whole: it has no {name}")
        if (folder / name).stat().st_size != size:
            raise ValueError(f"is damaged: {name} is not what was written")
        held[name] = size
    room = sum(held.values())
    for table in said["tensors"].values():
        room -= math.prod(table["shape"]) * dtype_of(table["dtype"]).itemsize
        covered = sum(math.prod(sizes) for _, _, sizes in table["chunks"])
        if room < 0 or covered != math.prod(table["shape"]):
            raise ValueError(f"is damaged: {MANIFEST} has more than its parts")
        if any(file not in held for file, _, _ in table["chunks"]):
            raise ValueError(f"is damaged: {MANIFEST} has more than its parts")
    if folder.name != f"step-{said['step']}":
        raise ValueError(f"is another one: it was written as step-{said['step']!r:.20}")
    if any(type(said.get(name, 0)) is not int or said.get(name, 0) < 0 for name in COUNTS):
        raise ValueError(f"is damaged: {MANIFEST} is no run's")


def read_sound(folder: Path) -> Saved:
    """Read a checkpoint's folder, with all digests. Raises ValueError as `read_folder` does."""
    saved = read_folder(folder, folder.name)
    check_parts(folder, saved)
    return saved


def is_name(name: str) -> bool:
    """Say whether a checkpoint may be named so."""
    return re.fullmatch(r"step-(0|[1-9][0-9]{0,17})", name) is not None


def names_in(ckpt: Path) -> list[str]:
    """Name the checkpoints in a folder, the last first, whatever is the matter with them."""
    found = [p.name for p in ckpt.glob("step-*") if is_name(p.name)]
    return sorted(found, key=lambda name: -int(name.removeprefix("step-")))
