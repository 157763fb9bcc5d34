"""What an evaluation has answered already: kept on the disk, so that a killed one goes on.

`evaluation.part/` in the folder that is written to holds a file for each policy and each kind of
prompts, in both modes. It is read again only under the same key: the configuration, the policy's
and the reference's files, the prompts and weights, and the versions of what computes. It is removed
when evaluation.json is there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from meal_fast.common import write_atomic
from meal_fast.config.config import Config, to_dict
from meal_fast.config.sealed import served_digests

from .generate import Sweep

FOLDER = "evaluation.part"


class KeptSweeps:
    """Keep sweeps in `folder`; None: nowhere. key: what they depend on beside their own."""

    def __init__(self, folder: Path | None, key: str = "") -> None:
        self._folder, self._key = folder, key

    def swept(
        self, what: Sequence[Any], make: Callable[[], dict[str, Sweep]], say: Callable[[str], None]
    ) -> dict[str, Sweep]:
        """Give the sweeps that were kept of `what`, plain values; else make them, and keep them.

        One that is damaged, or of something else, is made anew.
        """
        if self._folder is None:
            return make()
        key = _digest([self._key, what])
        path = self._folder / f"{key[:16]}.json"
        found = _read(path, key)
        if found is not None:
            say(f"evaluation: {what[0]}: as it was answered before")
            return found
        made = make()
        sweeps = {mode: asdict(sweep) for mode, sweep in made.items()}
        self._folder.mkdir(exist_ok=True)
        content = {"key": key, "sweeps": sweeps, "sha256": _digest(sweeps)}
        write_atomic(path, json.dumps(content))
        return made


def kept_sweeps(run: Path, out: Path, config: Config, versions: dict[str, str]) -> KeptSweeps:
    """Give what an evaluation of `run` into `out` has kept there."""
    options = to_dict(config)
    del options["objectives_timeout"]  # no answer depends on it
    depends = [options, served_digests(run), _base_files(config), versions]
    return KeptSweeps(out / FOLDER, _digest(depends))


def _base_files(config: Config) -> list[tuple[str, int, int]]:
    """List the base model's files, with sizes and times; a hub's name has versions of its own."""
    from meal_fast.models.loading import resolve

    files = [p for p in Path(resolve(config.policy.path)).rglob("*") if p.is_file()]
    return sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read(path: Path, key: str) -> dict[str, Sweep] | None:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["key"] != key or held["sha256"] != _digest(held["sweeps"]):
            return None
        return {
            mode: Sweep(**sweep | {"rows": [tuple(row) for row in sweep["rows"]]})
            for mode, sweep in held["sweeps"].items()
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None
