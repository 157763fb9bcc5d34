"""A run's checkpoints: written whole, the one before kept, and read back only as they were written.

`checkpoint.pt` holds everything that the rest of the run depends on, and three kinds of seals: a
digest of all its own values, of the run's other files, and the configuration. What is damaged is
named; then `checkpoint.previous.pt` is gone on with, which loses its meta-steps' work and nothing
else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meal_fast import __version__
from meal_fast.common import replacing, write_atomic
from meal_fast.config.config import Config, to_dict
from meal_fast.config.recipes import spec_of
from meal_fast.config.run_dir import changed_options
from meal_fast.config.sealed import TEMPLATE, WARMED, seal_policy, sha256
from meal_fast.data.preferences import Preference
from meal_fast.models.model_soup import FILE, Family
from meal_fast.models.policy import Policy

CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
LOGS = {"metrics.jsonl": "metrics_bytes", "completions.jsonl": "completions_bytes"}
SEALED = ("statistics.json", TEMPLATE, WARMED)  # beside the logs
_NEEDED = {"step", "tokens", "metrics_bytes", "outer", "experience"}
_KNOWN = _NEEDED | {"version", "completions_bytes", "files", "config", "digest"}


def open_run(config: Config, out: Path, resume: bool) -> dict[str, Any] | None:
    """Read the checkpoint to go on from; None: a new run. `check_folder` has passed.

    One that is damaged is named in a warning, and the one before it is taken. Raises ValueError
    where neither can be gone on from, or another file of the run is not what it was.
    """
    if not resume:
        return None
    there = [name for name in (CHECKPOINT, PREVIOUS) if os.path.lexists(out / name)]
    if not there:
        warnings.warn(f"{out} has no checkpoint yet: it starts from the first update", stacklevel=3)
        return None
    reasons = []
    for name in there:
        try:
            state = read_checkpoint(out / name)
            _check_logs(out, state)
        except ValueError as error:
            reasons.append(f"{name} {error}")
            continue
        _check_rest(config, out, state)
        if name == PREVIOUS:
            why = "; ".join(reasons) or f"{CHECKPOINT} is missing"
            said = f"{out}: {why}; going on from {PREVIOUS}, meta-step {state['step']}"
            warnings.warn(said, stacklevel=3)
            _linked(out / PREVIOUS, out / CHECKPOINT)  # so that it is kept when the next is written
        elif "digest" not in state:
            version = state.get("version", "?")
            said = f"{out}: {name} is of version {version}, without a digest: taken as it is"
            warnings.warn(said, stacklevel=3)
        return state
    raise ValueError(
        f"out={str(out)!r}: nothing to go on from: {'; '.join(reasons)}; restore one of these "
        "files from a copy, or start anew in another --out"
    )


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


def write_checkpoint(out: Path, state: Mapping[str, Any], config: Config) -> None:
    """Write everything that the rest of a run depends on, in one file that is replaced whole.

    The one before stays as `checkpoint.previous.pt`. `state["files"]` has the logs' digests. Raises
    ValueError for parameters or an optimizer that are not finite: the files then stay as they are.
    """
    whole = _on_the_host({"version": __version__, **state})
    trained = [whole["outer"], whole["experience"].get("net", {})]
    if not all(bool(x.isfinite().all()) for x in _tensors(trained)):
        raise ValueError(
            f"meta-step {state['step']}: parameters or Adam's state are not finite; the checkpoint "
            "before it is kept; start anew with a lower grpo.lr"
        )
    whole["files"] |= {name: _sha256(out / name) for name in SEALED if (out / name).is_file()}
    whole["config"] = json.dumps(to_dict(config))
    whole["digest"] = _digest(whole)
    path = out / CHECKPOINT
    with replacing(path) as file:
        torch.save(whole, file)
        file.flush()
        os.fsync(file.fileno())
        if path.is_file():  # it stays in its place until the new one takes it
            _linked(path, out / PREVIOUS)


def _check_logs(out: Path, state: Mapping[str, Any]) -> None:
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


def _check_rest(config: Config, out: Path, state: Mapping[str, Any]) -> None:
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


def _sha256(path: Path) -> str:
    """Give a file's digest, computed again where it has changed: these are written once."""
    at = path.stat()
    return _sha256_of(path, at.st_size, at.st_mtime_ns)


@lru_cache(4)
def _sha256_of(path: Path, size: int, changed: int) -> str:
    return sha256(path)


def _linked(path: Path, to: Path) -> None:
    """Make `to` the same file as `path`, at once; where there are no links, a copy of it."""
    temporary = to.with_name(to.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        try:
            os.link(path, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(path, temporary)
        os.replace(temporary, to)
    finally:
        temporary.unlink(missing_ok=True)


def _on_the_host(value: Any) -> Any:
    """Give nested values with their tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {name: _on_the_host(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_the_host(part) for part in value)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


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


def check_space(out: Path, policy: Policy, models: int) -> None:
    """Raise ValueError without room for three checkpoints: two are kept while one is written."""
    place = next(p for p in (out, *out.absolute().parents) if p.exists())
    trained = sum(p.numel() for p in policy.trainable) * models
    merged = 4 if policy.rank or policy.adapter is not None else 0  # float32, whatever the base is
    saved = sum(p.numel() * max(p.element_size(), merged) for p in policy.model.parameters())
    family = 4 * trained if models > 1 else 0
    need = 3 * 3 * 4 * trained + 2 * saved + family
    # What an earlier start has written takes the place of what is counted here.
    there = [p for name in (CHECKPOINT, PREVIOUS, FILE) if (p := out / name).is_file()]
    there += [p for p in (out / "policy").rglob("*") if p.is_file()]
    sizes = {(at := p.stat()).st_ino: at.st_size for p in there}  # linked ones once
    free = shutil.disk_usage(place).free + sum(sizes.values())
    if free < need:
        raise ValueError(
            f"out={str(out)!r}: {free / 1e6:,.1f} MB free, checkpoints and the policy need "
            f"{need / 1e6:,.1f} MB; make room, or name a folder with more space"
        )


def write_config(out: Path, config: Config) -> None:
    """Write config.json."""
    write_atomic(out / "config.json", json.dumps(to_dict(config), indent=1))


def note_threads(out: Path, saved: Config, threads: int) -> None:
    """Write into config.json how many threads a run has, where an older version did not."""
    if not saved.threads:
        write_config(out, dataclasses.replace(saved, threads=threads))


def write_policy(
    out: Path,
    policy: Policy,
    config: Config,
    models: Mapping[Preference, Sequence[Tensor]],
    progress: float,
) -> None:
    """Write `policy/`; of several models the one for equal weights, after a file with them all.

    Then `policy.json` says how far the run was, with digests of all that is served.
    """
    served: AbstractContextManager[None] = nullcontext()
    between = spec_of(config).between
    if between:
        named = [dict(zip(policy.named, theta, strict=True)) for theta in models.values()]
        family = Family(tuple(models), tuple(named), between)
        write_atomic(out / FILE, family.to_bytes(config.names))
        served = family.at(policy, (1.0 / len(config.names),) * len(config.names))
    with served:
        policy.save(out / "policy")
    seal_policy(out, progress)
