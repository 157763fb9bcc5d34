"""Where a part of the check runs, and how it says what it found: JSON lines to its parent.

A part is a module of this folder with `cases(here)`: names and functions, run in that order in a
process of its own. `tools/first_contact.py` starts that process, reads the lines and writes the
files; after a case that fails, crashes or hangs it starts another one behind it.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

Cases = dict[str, Callable[[], None]]
OURS = "meal-fast"


@dataclass
class Here:
    """A part's surroundings."""

    device: str  # "cuda", or "cpu" in a rehearsal
    rehearsal: bool
    deadline: float  # of time.monotonic()
    folder: Path  # scratch space, shared by the parts of one run
    out: TextIO
    ceilings: dict[str, float] = field(default_factory=dict)  # bytes_per_s, flop_per_s, launch_s
    case: str = ""  # the one that runs

    def tell(self, **said: Any) -> None:
        self.out.write(json.dumps(said) + "\n")
        self.out.flush()

    def left(self) -> float:
        """Seconds until the part's process is ended."""
        return self.deadline - time.monotonic()

    def row(
        self,
        what: str,  # of the case, was measured
        figure: float | str | None,
        unit: str = "",
        *,
        floor: float | None = None,  # the least that `figure` could be, in its unit
        ok: bool | None = None,  # False counts as a failure
        note: str = "",
        who: str = OURS,
    ) -> None:
        """Say one measurement. `share` is floor / figure, where less is better."""
        row: dict[str, Any] = {"case": self.case, "what": what, "who": who}
        row |= {"figure": rounded(figure), "unit": unit}
        if floor is not None and isinstance(figure, float | int):
            row |= {"floor": rounded(floor), "share": rounded(floor / max(figure, 1e-12))}
        if ok is not None:
            row["ok"] = ok
        if note:
            row["note"] = note
        self.tell(row=row)

    def fail(self, text: str) -> None:
        """Add to the file of failures."""
        self.tell(fail=text)

    def median_s(self, work: Callable[[], object], rounds: int = 5) -> float:
        """Seconds that `work` takes, the card's included; it has been run before."""
        took = []
        for _ in range(1 if self.rehearsal else rounds):
            begin = time.perf_counter()
            work()
            if self.device == "cuda":
                torch.cuda.synchronize()
            took.append(time.perf_counter() - begin)
        return statistics.median(took)

    def floor_s(self, flops: float = 0, moved: float = 0, launches: float = 0) -> float:
        """Seconds that so much work takes at the measured ceilings."""
        return max(
            flops / self.ceilings["flop_per_s"],
            moved / self.ceilings["bytes_per_s"],
            launches * self.ceilings["launch_s"],
        )


def rounded(x: float | str | None) -> float | str | None:
    """Four digits: more than any of these figures has."""
    return float(f"{x:.4g}") if isinstance(x, float) else x
