"""A part of the cache: a folder that is either whole or absent.

It is made under a temporary name and renamed when its manifest is written, so an interrupted build
leaves nothing that looks finished. The manifest holds the key (see `keys`) that the part was made
from, and the size of every file: both are checked without reading the files.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from meal_fast.common import cache_folder

MANIFEST = "manifest.json"
fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None


def worlds_dir() -> Path:
    """`$MEAL_FAST_WORLDS`, or `worlds/` in the cache folder; tests have a new one each session."""
    return Path(os.environ.get("MEAL_FAST_WORLDS") or cache_folder() / "worlds")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a part, or None when the folder has no readable one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    if not isinstance(manifest, dict):
        return None
    tables = (manifest.get("key"), manifest.get("files"))
    return manifest if all(isinstance(table, dict) for table in tables) else None


def is_complete(folder: Path, key: Mapping[str, Any] | None = None) -> bool:
    """Whether every file of the manifest is there at its size (and, given one, the key agrees)."""
    manifest = read_manifest(folder)
    if manifest is None or (key is not None and manifest["key"] != dict(key)):
        return False
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == size
        for name, size in manifest["files"].items()
    )


def build_part(folder: Path, key: Mapping[str, Any], make: Callable[[Path], None]) -> bool:
    """Fill `folder` with `make(temporary folder)` unless it is complete with the same key.

    Returns whether anything was made. When `make` raises, `folder` stays as it was. One process at
    a time: another that wants the same part waits, and then finds it. Raises ValueError where the
    cache cannot be written.
    """
    if is_complete(folder, key):
        return False
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"MEAL_FAST_CACHE: {str(folder.parent)!r} cannot be made ({error.strerror}); name a "
            "folder that can be written"
        ) from None
    with _alone(folder):
        return not is_complete(folder, key) and _build(folder, key, make)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process of this machine's user at a time; elsewhere than on Unix nobody waits.

    The lock's file lies among the temporary ones, where nobody minds that it stays.
    """
    if fcntl is None:
        yield
        return
    digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"meal-fast-{os.getuid()}-{digest}.lock"
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(folder: Path, key: Mapping[str, Any], make: Callable[[Path], None]) -> bool:
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        make(work)
        files = {
            str(path.relative_to(work)): path.stat().st_size
            for path in sorted(work.rglob("*"))
            if path.is_file()
        }
        manifest = {"key": dict(key), "files": files}
        (work / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for path in work.rglob("*"):
            if path.is_file():
                _flush(path)
        work.chmod(0o755)  # mkdtemp's 0700 would hide the cache from other users
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            folder.rename(old / folder.name)
            work.rename(folder)
            shutil.rmtree(old)
        else:
            work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return True


def _flush(path: Path) -> None:
    """Force a file to the disk: a rename must not become durable before what it names."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
