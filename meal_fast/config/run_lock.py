"""One writer a run folder: `run.lock`, which names the process that works in it. No torch.

The file appears at once with its content (a link to a temporary file, which network file systems
make one at a time), and says host, boot, process and since when. Its holder keeps an flock on it
where the file system has them, and touches it every minute. Who finds one

    of this boot of this host    takes it over where that process is gone (a kill -9 leaves it so)
    of an earlier boot           takes it over
    of another host, or of a container whose processes it cannot see
                                 takes it over when it has not been touched for 10 minutes

and is refused otherwise. One process may hold it more than once.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import socket
import threading
import time
import warnings
from pathlib import Path
from typing import Any

fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None
FILE = "run.lock"
HEARTBEAT, STALE = 60.0, 600.0  # seconds between touches; without one before it is given up

_held: dict[Path, RunLock] = {}  # by this process
_mutex = threading.RLock()


def process_start(pid: int) -> str:
    """Tell when a process was started, in the system's ticks; "" where there is none, or no /proc.

    With its number that tells a process from a later one of the same number.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def this_process(what: str) -> dict[str, Any]:
    """Say who is at work: what stands in the lock file."""
    pid = os.getpid()
    return {
        "what": what,
        "host": socket.gethostname(),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "namespace": _namespace(),
        "pid": pid,
        "started": process_start(pid),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


class RunLock:
    """Hold a run's folder for writing, until `release` or the end of the process."""

    def __init__(self, run: Path, what: str) -> None:
        self.path, self._times = run.resolve() / FILE, 1
        self._mine = this_process(what)
        self._made = _first_missing(self.path.parent)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._file = self._take()
        except BaseException:
            self._unmake()
            raise
        self._end = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="meal-fast-lock", daemon=True)
        self._beating.start()

    def _take(self) -> int:
        temporary = self.path.with_name(f"{FILE}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self._mine))
        try:
            for _ in range(10):
                try:
                    _appear(temporary, self.path)
                except FileExistsError:
                    _remove_stale(self.path)
                    continue
                file = os.open(self.path, os.O_RDONLY)
                with contextlib.suppress(OSError):  # a file system without locks
                    _flock(file)
                return file
        finally:
            temporary.unlink(missing_ok=True)
        raise ValueError(f"out={str(self.path.parent)!r}: several processes want it; try again")

    def _beat(self) -> None:
        while not self._end.wait(HEARTBEAT):
            with contextlib.suppress(OSError):
                if self._is_mine():
                    os.utime(self.path)

    def _is_mine(self) -> bool:
        """Whether the file is still this one, and not another process's by now."""
        return os.fstat(self._file).st_ino == self.path.stat().st_ino

    def _unmake(self) -> None:
        """Remove the folders that were made for the lock, where nothing else is in them."""
        folder = self.path.parent
        while self._made and (folder == self._made or self._made in folder.parents):
            try:
                folder.rmdir()
            except OSError:
                return
            folder = folder.parent

    def release(self) -> None:
        """Give the folder back; one that was made for it and has nothing else in it is removed."""
        with _mutex:
            self._times -= 1
            if self._times or _held.get(self.path) is not self:
                return
            del _held[self.path]
            self._end.set()
            self._beating.join()
            with contextlib.suppress(OSError):
                if self._is_mine():
                    self.path.unlink()
            os.close(self._file)
            self._unmake()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock(run: Path, what: str) -> RunLock:
    """Take a run's folder for writing; this process may have it already.

    Raises ValueError, which names the process, where another one has it.
    """
    path = run.resolve() / FILE
    with _mutex:
        held = _held.get(path)
        if held is not None and held._mine["pid"] == os.getpid():
            held._times += 1
            return held
        _held[path] = taken = RunLock(run, what)
        return taken


def check_free(run: Path) -> None:
    """Raise ValueError where another process works in a run's folder."""
    path = run.resolve() / FILE
    held = _held.get(path)
    if (held is None or held._mine["pid"] != os.getpid()) and os.path.lexists(path):
        _stale(path)


def _stale(path: Path) -> str:
    """Say why a lock holds no more; raise ValueError where it does."""
    try:
        content = path.read_text()
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return "is gone"
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"out={str(path.parent)!r}: {FILE} cannot be read ({error})") from None
    try:
        other = json.loads(content)
        host, pid, since, what = (other[x] for x in ("host", "pid", "since", "what"))
        pid = int(pid)
    except (ValueError, KeyError, TypeError):
        if age > STALE:
            return "is damaged, and old"
        raise ValueError(
            f"out={str(path.parent)!r}: {FILE} is no lock of this program; remove it if no other "
            "process works in this folder"
        ) from None
    mine = this_process("")
    who = f"{what} by process {pid} on {host} since {since}"
    seen = all(other.get(x) == mine[x] for x in ("host", "boot", "namespace")) and mine["started"]
    if seen:
        if process_start(pid) != other.get("started"):
            return f"was left by process {pid}, which is gone"
        refusal = "stop that, or name another folder"
    elif other.get("host") == mine["host"] and other.get("boot") != mine["boot"]:
        return f"was left by process {pid}, before this machine was started anew"
    elif age > STALE:
        return f"of {who} has not been touched for {age / 60:.0f} minutes"
    else:
        refusal = (
            f"stop that; if it is gone, remove {FILE}, which is taken over by itself "
            f"{STALE / 60:.0f} minutes after it was touched last"
        )
    raise ValueError(f"out={str(path.parent)!r}: is in use ({who}); {refusal}")


def _remove_stale(path: Path) -> None:
    """Remove a lock that holds no more; raise ValueError where it does."""
    why = _stale(path)
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        try:
            _flock(file)
        except BlockingIOError:
            raise ValueError(
                f"out={str(path.parent)!r}: is in use: {FILE} {why}, but a process holds it open; "
                "stop that, or name another folder"
            ) from None
        except OSError:  # a file system without locks
            pass
        with contextlib.suppress(FileNotFoundError):  # who was faster has removed it
            if os.fstat(file).st_ino == path.stat().st_ino:
                path.unlink()
                if why != "is gone":
                    warnings.warn(f"{path} {why}: it is taken over", stacklevel=6)
    finally:
        os.close(file)


def _flock(file: int) -> None:
    """Lock an open file, or raise BlockingIOError where another process has it locked."""
    if fcntl is not None:  # Windows has none
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _appear(temporary: Path, path: Path) -> None:
    """Make the file appear with its content, or raise FileExistsError."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        os.write(file, temporary.read_bytes())
        os.close(file)


def _first_missing(folder: Path) -> Path | None:
    """Give the outermost of the folders that have to be made for `folder`."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    return missing[-1] if missing else None


@atexit.register
def _release_all() -> None:
    for held in list(_held.values()):
        if held._mine["pid"] == os.getpid():  # not those of the process that this one is a copy of
            held._times = 1
            held.release()
