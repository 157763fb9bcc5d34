"""The processes of one run, each started, signalled and awaited by itself: no launcher beside."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers.processes import ENVIRONMENT, ROOT

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> int:
    """A port that nobody listens at, now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    """What a process of a run is started in, without what a launcher has set here."""
    kept = {name: value for name, value in ENVIRONMENT.items() if name not in LAUNCHED}
    return kept | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | more


class Ranks:
    """`python -m meal_fast.train ARGV`, `world` times; what each says is in a file of its own."""

    def __init__(self, folder: Path, *argv: str, world: int = 2, **more: str) -> None:
        self.folder, self.argv, self.world = folder, argv, world
        self.module = "meal_fast.train"
        self.environment = environment(
            **more, WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()

    def start(self, *ranks: int) -> "Ranks":
        """Start these, or all of them."""
        for rank in ranks or range(self.world):
            place = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(self.world),
            }
            with open(self.folder / f"rank{rank}.txt", "ab") as file:
                self.processes[rank] = subprocess.Popen(
                    [sys.executable, "-m", self.module, *self.argv],
                    cwd=ROOT, env=self.environment | place, stdout=file, stderr=file,
                )  # fmt: skip
        return self

    def send(self, rank: int, number: signal.Signals) -> float:
        """Signal one of them; give when."""
        self.processes[rank].send_signal(number)
        return time.monotonic()

    def until(self, due, limit: float = 120.0) -> None:
        """Wait for a moment of a run in which all of them live."""
        give_up = time.monotonic() + limit
        while not due():
            ended = {rank: p.poll() for rank, p in self.processes.items() if p.poll() is not None}
            assert not ended, (ended, self.said())
            assert time.monotonic() < give_up, self.said()
            time.sleep(0.002)

    def wait(self, limit: float) -> list[int]:
        """Their exit codes, of all that were started; who is not gone by then fails the test."""
        give_up = time.monotonic() + limit
        for rank, process in self.processes.items():
            try:
                process.wait(max(give_up - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"rank {rank} after {limit} s: {self.said()}") from None
        return [process.returncode for _, process in sorted(self.processes.items())]

    def said(self, rank: int | None = None) -> str:
        """What one, or all, have written."""
        ranks = range(self.world) if rank is None else [rank]
        texts = []
        for number in ranks:
            path = self.folder / f"rank{number}.txt"
            texts.append(path.read_text(errors="replace") if path.exists() else "")
        return "\n----\n".join(texts)


def lines(run: Path) -> int:
    """The updates that a run has logged."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    with contextlib.suppress(OSError, IndexError), open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"
    return False


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    found, todo = [], [pid]
    while todo:
        parent = todo.pop()
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError, IndexError), open(f"/proc/{entry}/stat") as file:
                    if file.read().rpartition(")")[2].split()[1] == str(parent):
                        found.append(int(entry))
                        todo.append(int(entry))
    return found
