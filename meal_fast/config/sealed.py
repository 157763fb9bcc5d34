"""Digests of a run's files, by which damage is seen, and how far its saved policy is. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from meal_fast.common import write_atomic

from .resume import how_to_finish
from .run_dir import PREFERENCE_NET, policy_folder, read_json, read_metrics

SEAL = "policy.json"  # of a saved policy: how far the run was, and a digest of each file
FAMILY = "family.safetensors"  # of a run with several models
WARMED = "warmup/parameters.safetensors"  # what a supervised start ended with
TEMPLATE = "template.json"  # the chat template as the run settled it
MEASURING = ("config.json", "statistics.json", TEMPLATE)  # by which a policy is evaluated


def sha256(path: Path, length: int | None = None) -> str:
    """Give the SHA-256 of a file, or of its first `length` bytes, as hexadecimal digits."""
    found, left = hashlib.sha256(), length
    with open(path, "rb") as file:
        while left is None or left > 0:
            block = file.read(1 << 20 if left is None else min(1 << 20, left))
            if not block:
                break
            found.update(block)
            left = None if left is None else left - len(block)
    return found.hexdigest()


def _policy_files(run: Path) -> list[str]:
    files = [p for p in (run / "policy").rglob("*") if p.is_file()]
    others = (FAMILY, PREFERENCE_NET, WARMED, *MEASURING)
    files += [p for name in others if (p := run / name).is_file()]
    return sorted(str(p.relative_to(run)) for p in files)


def served_digests(run: Path) -> dict[str, str]:
    """Give the digest of each file of the policy, and of what is served with it, by its name."""
    return {name: sha256(run / name) for name in _policy_files(run)}


def break_seal(run: Path) -> None:
    """Say that the saved policy is about to change."""
    (run / SEAL).unlink(missing_ok=True)


def seal_policy(run: Path, progress: float) -> None:
    """Write how far the run was, and digests of the policy and of what is served with it."""
    seal = {"progress": progress, "files": served_digests(run)}
    write_atomic(run / SEAL, json.dumps(seal, indent=1))


def read_seal(run: Path) -> dict[str, Any]:
    """Read what was written with the policy; nothing: it is of an older version.

    Raises ValueError where that is damaged.
    """
    if not (run / SEAL).exists():
        return {}
    seal = read_written_anew(run, SEAL)
    files, progress = seal.get("files"), seal.get("progress")
    good = isinstance(files, dict) and all(isinstance(x, str) for x in files.values())
    if not good or not isinstance(progress, int | float):
        raise ValueError(f"RUN={str(run)!r}: {SEAL} is damaged; {_again(run)}")
    return seal


def read_written_anew(run: Path, name: str) -> dict[str, Any]:
    """Read a JSON file of a run that `--resume` writes anew. Raises ValueError, which says so."""
    try:
        return read_json(run, name)
    except ValueError as error:
        raise ValueError(f"{error}; {_again(run)}") from None


def check_policy(run: Path) -> None:
    """Raise ValueError where a saved policy is not what training wrote; reads all of it."""
    policy_folder(run)
    seal = read_seal(run).get("files", {})
    # No policy says anything without its template.
    _check(run, {n: digest for n, digest in seal.items() if n == TEMPLATE or n not in MEASURING})


def check_measuring(run: Path) -> None:
    """Raise ValueError where what a policy is evaluated by is not what it was in training."""
    seal = read_seal(run).get("files", {})
    _check(run, {name: seal[name] for name in MEASURING if name in seal})


def _check(run: Path, files: dict[str, str]) -> None:
    for name, digest in files.items():
        path = run / name
        remedy = "restore it" if name in (*MEASURING, WARMED) else _again(run)
        if not path.is_file():
            raise ValueError(f"RUN={str(run)!r}: {name} is missing; {remedy}")
        if sha256(path) != digest:
            raise ValueError(
                f"RUN={str(run)!r}: {name} is not what training wrote (another digest than in "
                f"{SEAL}); {remedy}, or remove {SEAL} if you changed it yourself"
            )


def policy_progress(run: Path) -> float:
    """Give the share of the run's updates that its saved policy has behind it; unknown: 1."""
    if seal := read_seal(run):
        return float(seal["progress"])
    lines = read_metrics(run)
    return float(lines[-1].get("progress", 1.0)) if lines else 1.0


def unfinished(run: Path) -> str:
    """Say how far the policy of a run is that stopped before its end; "" for one at its end."""
    progress = policy_progress(run)
    # Rounded down: 99.7 % is not all of it.
    return "" if progress >= 1 else f"stopped at {int(progress * 100)} % of its updates"


def warned_unfinished(run: Path, say: Callable[[str], None]) -> str:
    """Say, where a run is not finished, in one line how far it is and how to go on; give how far.

    Raises ValueError for a run without a policy.
    """
    policy_folder(run)
    if stopped := unfinished(run):
        say(f"meal-fast: {run} is not finished ({stopped}); go on with {how_to_finish(run)}")
    return stopped


def _again(run: Path) -> str:
    return f"write it anew with {how_to_finish(run)}"
