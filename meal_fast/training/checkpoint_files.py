"""What stands in a run's folder beside a checkpoint, and checkpoints as versions before wrote them.

A checkpoint goes with the logs up to it, with files that are written once, and with a
configuration. `checkpoint.pt`, and `checkpoint.previous.pt`, the one before, are read and gone on
with; what is written afterwards is a folder of `ckpt/`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meal_fast.config.config import Config, to_dict
from meal_fast.config.run_dir import changed_options
from meal_fast.config.sealed import TEMPLATE, WARMED, sha256

LOGS = {"metrics.jsonl": "metrics_bytes", "completions.jsonl": "completions_bytes"}
SEALED = ("statistics.json", TEMPLATE, WARMED)  # beside the logs
_NEEDED = {"step", "tokens", "metrics_bytes", "outer", "experience"}
_KNOWN = _NEEDED | {"version", "completions_bytes", "files", "config", "digest"}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in it is run.

    Raises ValueError, which begins with a verb, for one that is not what was written.
    """
    try:
        with open(path, "rb") as file:
            if not file.read(1):
                raise ValueError("is empty")
    except OSError as error:
        raise ValueError(f"is not to be read ({error.strerror or error})") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # of a damaged archive or pickle, whatever comes to its readers' mind
        raise ValueError("is damaged, cut short, or no checkpoint of a run") from None
    if not isinstance(state, dict) or not state.keys() >= _NEEDED:
        raise ValueError("is no checkpoint of a run")
    digest = state.get("digest")
    if digest != _digest(state) if digest is not None else not state.keys() <= _KNOWN:
        raise ValueError("is damaged: its values are not those that were written")
    return state


def check_logs(out: Path, state: Mapping[str, Any]) -> None:
    """Raise ValueError where a log of the run lacks what was in it at this checkpoint."""
    for name, key in LOGS.items():
        path, length = out / name, int(state.get(key, 0))
        if name == "completions.jsonl" and not path.exists():
            continue  # who needed the room has removed it
        size = path.stat().st_size if path.is_file() else 0
        more = "; remove it to go on without the earlier answers" if "completions" in name else ""
        if size < length:
            raise ValueError(f"goes with a {name} of {length} bytes, here are {size}{more}")
        sealed = state.get("files", {}).get(name)
        if sealed is not None and sealed != sha256(path, length):
            raise ValueError(f"goes with another {name}: what it held then has changed{more}")


def check_rest(config: Config, out: Path, state: Mapping[str, Any]) -> None:
    """Raise ValueError where another file is not what it was when the run was saved."""
    for name in SEALED:
        sealed = state.get("files", {}).get(name)
        if sealed is None:
            continue
        found = sha256(out / name) if (out / name).is_file() else "missing"
        if found != sealed:
            what = (
                "is missing" if found == "missing" else "is not what it was when the run was saved"
            )
            raise ValueError(
                f"out={str(out)!r}: {name} {what}; restore it from a copy, or start anew in "
                "another --out"
            )
    if "config" in state:
        changed = changed_options(json.loads(state["config"]), to_dict(config))
        if changed:
            raise ValueError(
                f"out={str(out)!r}: config.json is not what it was when the run was saved: "
                f"{', '.join(changed)}; restore it from a copy"
            )


def sealed(out: Path) -> dict[str, str]:
    """Give the digests of the files that are written once: computed again where one changed."""
    return {name: _sha256(out / name) for name in SEALED if (out / name).is_file()}


def _sha256(path: Path) -> str:
    """Give a file's digest, computed again where it has changed: these are written once."""
    at = path.stat()
    return _sha256_of(path, at.st_size, at.st_mtime_ns)


@lru_cache(4)
def _sha256_of(path: Path, size: int, changed: int) -> str:
    return sha256(path)


def _digest(state: Mapping[str, Any]) -> str:
    """Give the SHA-256 of all values but `digest`, of their types, shapes and names."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            found.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            found.update(f"table {len(value)} ".encode())
            for name, part in value.items():
                add(name)
                add(part)
        elif isinstance(value, list | tuple):
            found.update(f"{type(value).__name__} {len(value)} ".encode())
            for part in value:
                add(part)
        else:
            found.update(f"{type(value).__name__} {value!r} ".encode("utf-8", "backslashreplace"))

    add({name: value for name, value in state.items() if name != "digest"})
    return found.hexdigest()
