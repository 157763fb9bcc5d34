"""Several runs, so many at a time, each in a process of its own; or one by one in this one."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Job:
    """`python -m meal_fast.PROGRAM ARGV…`"""

    program: Literal["train", "evaluate"]
    argv: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `failed` says why, or is None."""

    failed: str | None


def run_all(
    work: Mapping[str, Callable[[], Job | None]],
    *,
    jobs: int,
    logs: Path,
    ready: Callable[[], bool],
    started: Callable[[str, Job], None],
    ended: Callable[[str, Outcome], None],
    say: Callable[[str], None],
) -> bool:
    """Does the jobs of each name until it has none left; returns whether it was asked to stop.

    `work` gives a name's next job, or None. Until `ready` says that what the first run makes for
    all is there, runs start one by one. What a run prints goes to a file of `logs`; one that fails
    is left as it is and the others go on. Ctrl-C lets the runs under way save, and stops.
    """
    waiting = [name for name, job in work.items() if job() is not None]
    say(f"{len(work) - len(waiting)} of {len(work)} runs are finished")
    logs.mkdir(parents=True, exist_ok=True)
    tries = dict.fromkeys(work, 0)
    active: dict[str, Child] = {}
    try:
        while waiting or active:
            room = max(1, jobs) if ready() else 1
            while waiting and len(active) < room:
                name = waiting.pop(0)
                job = work[name]()
                if job is None:
                    continue
                tries[name] += 1
                started(name, job)
                say(f"{name}: {job.program}")
                log = logs / f"{name.replace('/', '_')}.log"
                active[name] = (Child if jobs else Here)(job, log)
            for name, child in list(active.items()):
                code = child.poll()
                if code is None:
                    continue
                del active[name]
                if code == 130:
                    raise KeyboardInterrupt
                # a resumed run may have been evaluated as it was first asked for
                if code == 0 and work[name]() is not None and tries[name] < 2:
                    waiting.insert(0, name)
                else:
                    ended(name, Outcome(child.reason(code) if code else None))
            if active:
                time.sleep(0.1)
    except KeyboardInterrupt:
        for child in active.values():
            child.stop()
        return True
    return False


class Child:
    """A process. In a session of its own, so that Ctrl-C reaches it once and through us."""

    def __init__(self, job: Job, log: Path) -> None:
        self.log = log
        self.start = log.stat().st_size if log.exists() else 0
        with open(log, "ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", f"meal_fast.{job.program}", *job.argv],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def poll(self) -> int | None:
        return self.process.poll()

    def stop(self) -> None:
        """Lets a training run save, and waits for it; a second Ctrl-C does not wait."""
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
            self.process.wait()
        except KeyboardInterrupt:
            self.process.kill()

    def reason(self, code: int) -> str:
        """What it said last."""
        with open(self.log, "rb") as file:
            file.seek(self.start)
            lines = [x for x in file.read().decode(errors="replace").splitlines() if x.strip()]
        said = lines[-1].removeprefix("meal-fast: error: ") if lines else "said nothing"
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        return f"{how}: {said} ({self.log})"


class Here(Child):
    """The same in this process, done when made. Memory and a crash are then everyone's."""

    def __init__(self, job: Job, log: Path) -> None:
        self.log = log
        self.start = log.stat().st_size if log.exists() else 0
        main = import_module(f"meal_fast.{job.program}").main
        self.code = 0
        with open(log, "a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
            try:
                main(list(job.argv))
            except SystemExit as stop:
                self.code = stop.code if isinstance(stop.code, int) else 1
            except RuntimeError as error:  # as torch's of a full memory
                print(" ".join(str(error).split()), file=file)
                self.code = 1

    def poll(self) -> int | None:
        return self.code

    def stop(self) -> None:
        """Nothing is under way between two calls."""
