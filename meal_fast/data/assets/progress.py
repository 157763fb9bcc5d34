"""What a build is doing: bars on a terminal, elsewhere a plain line every ten seconds."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TextIO

from meal_fast.common import printable

INTERVAL = 10.0  # seconds between two plain lines


@dataclass
class _Part:
    what: str
    start: float
    done: int = 0
    steps: int | None = None  # None: not known
    bar: Any = None  # the terminal's own task


class Display(AbstractContextManager["Display"]):
    """Shows the parts under way; may be told of them from any thread.

    stream: where to; a terminal has bars that redraw themselves, anything else plain lines.
    """

    def __init__(self, stream: TextIO | None = None, interval: float = INTERVAL) -> None:
        self._stream = stream or sys.stdout
        self._start = time.monotonic()
        self._parts: dict[str, _Part] = {}
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._bars = _bars(self._stream) if self._stream.isatty() else None
        self._ticker = threading.Thread(target=self._tick, args=(interval,), daemon=True)

    def __enter__(self) -> Display:
        if self._bars:
            self._bars.start()
        else:
            self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._bars:
            self._bars.stop()
        else:
            self._ticker.join()

    def say(self, text: str) -> None:
        """Print a line that stays, with the time."""
        self.write(f"assets [{time.monotonic() - self._start:5.1f} s] {text}")

    def write(self, line: str) -> None:
        """Print a line that stays."""
        line = printable(line)
        if self._bars:
            self._bars.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=self._stream, flush=True)

    def begin(self, name: str, what: str) -> None:
        """Show a part as under way; `what`: what is done to it, and about how long that takes."""
        with self._lock:
            part = self._parts[name] = _Part(what, time.monotonic())
            if self._bars:
                part.bar = self._bars.add_task(name, total=None)
        self.say(f"{name}: {what}")

    def step(self, name: str, done: int, steps: int) -> None:
        """Say how far a part is; one that has ended is past that."""
        with self._lock:
            part = self._parts.get(name)
            if part is None:
                return
            part.done, part.steps = done, steps
            if self._bars:
                self._bars.update(part.bar, completed=done, total=steps)

    def end(self, name: str, text: str) -> None:
        """Take a part off the screen and print what became of it."""
        with self._lock:
            part = self._parts.pop(name)
            if self._bars:
                self._bars.remove_task(part.bar)
        self.say(f"{name}: {text}")

    def _tick(self, interval: float) -> None:
        while not self._over.wait(interval):
            with self._lock:
                lines = [_line(name, part) for name, part in self._parts.items()]
            for line in lines:
                self.say(line)


def _line(name: str, part: _Part) -> str:
    spent = time.monotonic() - part.start
    if not part.steps or not part.done:
        return f"{name}: {spent:.0f} s so far"
    left = spent * (part.steps - part.done) / part.done
    return (
        f"{name}: step {part.done} of {part.steps}, {spent:.0f} s so far, about {left:.0f} s left"
    )


def _bars(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description:12}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(file=stream),
        transient=True,
    )
