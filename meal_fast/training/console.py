"""What a person sees of a run while it goes. Importing it imports no torch."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from meal_fast.common import printable

ANSWERS_EVERY = 5  # updates between those whose answers are shown, and of short ones more:
ANSWERS_SECONDS = 5.0  # as many seconds at least
TIMED = 2  # updates, behind the first, which warms up, before the time left is said
STAGE_EVERY = 10.0  # seconds between two lines of one stage, where there is no terminal
PLAIN_WIDTH = 120  # of a line of an answer there


class Display:
    """Show a live line on a terminal, one plain line an update elsewhere.

    From the start it shows the stages before the first update (`stage`); then how far the run is,
    the last update's metrics, and every few updates one answer at each end of the simplex.

    Args:
        console: default: that of stderr, live where it is a terminal.
        quiet: show nothing: another process of the run does.
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self._console, self._quiet = console or Console(stderr=True, quiet=quiet), quiet
        self._live = self._console.is_terminal and not self._console.is_dumb_terminal
        self._live &= not quiet
        whole = Column(no_wrap=True)
        self._bar = Progress(
            TextColumn("[bold]{task.description}", table_column=whole),
            BarColumn(bar_width=20, table_column=whole),
            TimeElapsedColumn(table_column=whole),
            TextColumn("{task.fields[left]}", table_column=whole),
            auto_refresh=False,
        )
        self._task = self._bar.add_task("starting", total=1.0, left="")
        self._line = Text("starting")
        self._screen = Live(
            console=self._console, refresh_per_second=4, transient=True, get_renderable=self._shown
        )
        self._updates: int | None = None
        self._told = ("", -STAGE_EVERY)  # the last stage that was printed, and when
        self._pace = Pace()
        self._ends: dict[str, Mapping[str, Any]] = {}
        self._answered = -ANSWERS_SECONDS  # when answers were shown

    def __enter__(self) -> Display:
        if self._live:
            self._screen.start()
        self._warn, warnings.showwarning = warnings.showwarning, self._warned
        return self

    def __exit__(self, *_: object) -> None:
        warnings.showwarning = self._warn
        if self._live:
            self._screen.stop()

    def _warned(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """Say a run's own warning in one line; whatever shows warnings shows the others."""
        if category is UserWarning and "meal_fast" in filename:
            self.note(str(message))
        else:
            self._warn(message, category, filename, lineno, file, line)

    def begin(self, updates: int | None, done: int, progress: float) -> None:
        """Take what the run's length is; None: a budget of tokens ends it. From here it trains."""
        self._updates = updates
        self._pace = Pace(progress)
        self._screen.transient = False
        self._advance(done, progress)

    def stage(self, text: str) -> None:
        """Show what is being done before the first update; of one stage, each of its steps."""
        if self._quiet:
            return
        text = printable(text)
        self._line = Text(text)
        name, now = text.partition(":")[0], time.monotonic()
        if not self._live and (name != self._told[0] or now - self._told[1] >= STAGE_EVERY):
            self._told = name, now
            print(f"meal-fast: {text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Show a line that stays."""
        if self._quiet:
            return
        self._say(f"meal-fast: {text}", whole=True)

    def answers(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take an update's answers, rows of completions.jsonl."""
        self._ends |= extremes([*self._ends.values(), *rows])

    def update(self, metrics: dict[str, Any]) -> None:
        """Show an update that is done."""
        done, progress = metrics["update"] + 1, metrics["progress"]
        left = self._pace.left(metrics)
        self._line = Text(printable(describe(metrics)))
        self._advance(done, progress, left)
        if not self._live:
            counted = self._counted(done, progress)
            line = f"update {counted}  {self._line.plain}" + (f"  {left}" if left else "")
            print(line, file=sys.stderr, flush=True)
        waited = time.monotonic() - self._answered
        if done == 1 or (done % ANSWERS_EVERY == 0 and waited >= ANSWERS_SECONDS):
            self._answered = time.monotonic()
            told: list[Mapping[str, Any]] = []
            for name, row in self._ends.items():
                if not any(row is other for other in told):  # all were asked for one preference
                    self._say(in_one_line(name, row))
                told.append(row)
            self._ends = {}
        for warning in metrics.get("hacked", {}).values():
            self._say(f"meal-fast: update {done}: {warning}", whole=True)

    def stopping(self) -> None:
        """Say that a stop was asked for. The next one may end the process: the cursor is back."""
        print("meal-fast: finishing this meta-step, then saving", file=sys.stderr)
        if self._live:
            self._console.show_cursor(True)

    def _advance(self, done: int, progress: float, left: str = "") -> None:
        said = f"update {self._counted(done, progress)}"
        self._bar.update(self._task, description=said, completed=progress, left=left)

    def _counted(self, done: int, progress: float) -> str:
        return f"{progress:.0%}" if self._updates is None else f"{done}/{self._updates}"

    def _shown(self) -> Group:
        return Group(self._bar.get_renderable(), self._line)

    def _say(self, line: str, whole: bool = False) -> None:
        """Print a line that stays: above the live one, cut to the width unless it is to be whole.

        It is no markup: an answer may hold what looks like some.
        """
        text = Text(printable(line))
        if not whole:
            width = self._console.width if self._live else PLAIN_WIDTH
            text.truncate(width, overflow="ellipsis")
        if self._live:
            self._console.print(text)
        else:
            print(text.plain, file=sys.stderr, flush=True)


class Pace:
    """Tell how long a run will still take, from what its updates took.

    The first update of a process is not counted: its kernels are built and its caches are empty.
    """

    def __init__(self, progress: float = 0.0) -> None:
        self._progress, self._seconds, self._updates = progress, 0.0, -1

    def left(self, metrics: Mapping[str, Any]) -> str:
        """Take an update's metrics; give the time left in words, empty before it is known."""
        self._updates += 1
        if self._updates == 0:
            self._progress = metrics["progress"]
            return ""
        self._seconds += sum(metrics["seconds"].values())
        made = metrics["progress"] - self._progress
        if self._updates < TIMED or made <= 0 or metrics["progress"] >= 1:
            return ""
        return about(self._seconds / made * (1.0 - metrics["progress"])) + " left"


def extremes(rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Choose for each objective the first row of the last update that asks for most of it."""
    chosen: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        for name, w in row["asked"].items():
            best = chosen.get(name)
            most = None if best is None else best["asked"][name]
            later = best is not None and row["update"] > best["update"]
            if most is None or w > most or (w == most and later):
                chosen[name] = row
    return chosen


def in_one_line(name: str, row: Mapping[str, Any]) -> str:
    """Write an answer in one line: what was asked for, what was answered."""
    response = " ".join(printable(row["response"]).split())
    return f"  {name} {row['asked'][name]:.2f} | {response or '(nothing)'}"


def describe(metrics: dict[str, Any]) -> str:
    """Describe an update in one line: preference, rewards, KL, the meta-update, speed."""
    w = "/".join(f"{x:.2f}" for x in metrics["w"])
    rewards = "  ".join(
        f"{name} {value:+.2f}" for name, value in metrics["rewards"].items() if value is not None
    )
    delta = f"  |Δ| {metrics['delta_norm']:.3f}" if "delta_norm" in metrics else ""
    kl = f"  KL {metrics['kl']:.4f}" if "kl" in metrics else ""
    kept = f"  kept {metrics['acceptance']:.0%}" if "acceptance" in metrics else ""
    speed = metrics["tokens"] / sum(metrics["seconds"].values())
    return f"w {w}  {rewards}{kl}{kept}{delta}  {speed:.0f} tok/s"


def clock(seconds: float) -> str:
    """Write seconds as h:mm:ss or m:ss."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


def about(seconds: float) -> str:
    """Write seconds no more exactly than an estimate is: "about 3 min"."""
    if seconds < 90:
        return f"about {max(5 * round(seconds / 5), 5)} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"about {minutes} min"
    hours, minutes = divmod(5 * round(minutes / 5), 60)
    return f"about {hours} h {minutes} min" if minutes else f"about {hours} h"
