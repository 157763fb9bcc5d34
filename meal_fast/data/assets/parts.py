"""A part of the cache: a folder that is either whole or absent.

It is made under a temporary name and renamed when its manifest is written, so an interrupted build
leaves nothing that looks finished. The manifest holds the key (see `keys`) that the part was made
from, and of every file its size and sha256, which is against damage. Against other users is whose
the folder is: see `common.own`.
"""

from __future__ import annotations

import functools
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

from meal_fast.common import as_umask_says, cache_folder, own, own_folder, write_atomic

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
    """Whether every file of the manifest is there as it was (and, given one, the key agrees).

    Raises ValueError where another user could have made it so.
    """
    manifest = read_manifest(folder)
    if manifest is None or (key is not None and manifest["key"] != dict(key)):
        return False
    digests = manifest.get("sha256")  # an older version noted none
    own(folder / MANIFEST)
    own(folder)  # a reader takes more than the files below, where there is more
    for name, size in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return False
        own(path)
        own(path.parent)
        if isinstance(digests, dict) and digests.get(name) != digest_of(path):
            return False
    return True


def digest_of(path: Path) -> str:
    """Give a file's sha256, in hexadecimal: read once, as long as the file is not touched."""
    found = path.stat()
    return _digest(path, found.st_size, found.st_mtime_ns, found.st_ino)


@functools.lru_cache(maxsize=1024)
def _digest(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """Note the digests of a part that an older version made, where it is complete and has none."""
    manifest = read_manifest(folder)
    if manifest is not None and "sha256" not in manifest and is_complete(folder):
        digests = {name: digest_of(folder / name) for name in manifest["files"]}
        write_atomic(folder / MANIFEST, _written(manifest | {"sha256": digests}))


def _written(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1) + "\n"


def build_part(folder: Path, key: Mapping[str, Any], make: Callable[[Path], None]) -> bool:
    """Fill `folder` with `make(temporary folder)` unless it is complete with the same key.

    Returns whether anything was made. When `make` raises, `folder` stays as it was. One process at
    a time: another that wants the same part waits, and then finds it. Raises ValueError where the
    cache cannot be written.
    """
    if is_complete(folder, key):
        return False
    own_folder(folder.parent)
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
    # No link, and no file that another user laid there.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    try:
        lock = os.open(path, flags, 0o600)
    except OSError as error:
        raise ValueError(f"{str(path)!r}: {error.strerror}; remove it") from None
    try:
        if os.fstat(lock).st_uid != os.getuid():
            raise ValueError(f"{str(path)!r}: is of another user; set TMPDIR to a folder of yours")
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _build(folder: Path, key: Mapping[str, Any], make: Callable[[Path], None]) -> bool:
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        make(work)
        files = {
            str(path.relative_to(work)): path.stat().st_size
            for path in sorted(work.rglob("*"))
            if path.is_file()
        }
        digests = {name: digest_of(work / name) for name in files}
        manifest = {"key": dict(key), "files": files, "sha256": digests}
        (work / MANIFEST).write_text(_written(manifest), encoding="utf-8")
        # What others may write is not trusted; what they cannot read, as mkdtemp's, they miss.
        mode = as_umask_says(work, without=0o022)
        work.chmod(mode | (mode & 0o444) >> 2)
        for path in work.rglob("*"):
            if path.is_file():
                _flush(path)
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
