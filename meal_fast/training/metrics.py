"""What a run says of its updates: metrics.jsonl, a line an update; and what it cost."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from meal_fast.common import write_atomic
from meal_fast.config.run_dir import read_json
from meal_fast.data.reward_statistics import Scales, constant

from .batch import Batch


class Clock:
    """Measure seconds between laps."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Give the seconds since the last lap."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds


class LinesFile:
    """Write lines to a file that a resumed run goes on with: its first `written` bytes are kept.

    Raises ValueError for a file that is shorter, which would otherwise be filled up with NULs.
    """

    def __init__(self, path: Path, written: int) -> None:
        size = path.stat().st_size if path.is_file() else 0
        if size < written:
            raise ValueError(f"{str(path)!r}: has {size} bytes, and had {written}; restore it")
        self._path, self._sha256 = path, hashlib.sha256()
        self._file = open(path, "r+b" if written else "w+b")
        self._file.truncate(written)
        while block := self._file.read(1 << 20):
            self._sha256.update(block)

    def write(self, line: bytes) -> None:
        """Write a line, or several, without the last newline; whoever reads the file sees it."""
        self._sha256.update(line + b"\n")
        self._file.write(line + b"\n")
        self._file.flush()

    @property
    def digest(self) -> dict[str, str]:
        """Give the SHA-256 of what is in the file, by its name."""
        return {self._path.name: self._sha256.hexdigest()}

    def sync(self) -> int:
        """Bring what was written to the disk; give the file's length."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def finite(value: Any) -> Any:
    """Give a line's values with null for each number that is not finite: JSON has none for it."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsLog:
    """Write metrics.jsonl in the order of the updates' numbers, which tasks at once mix up.

    The last update of a meta-step waits for what the meta-step itself has to say.

    Args:
        written: bytes to keep of the file; what a run did after its checkpoint is done again.
        first: the number of the next update.
        in_step: updates of a meta-step.
        told: called with each line.
    """

    def __init__(
        self,
        path: Path,
        *,
        written: int,
        first: int,
        in_step: int,
        told: Callable[[dict[str, Any]], None],
    ) -> None:
        self._file = LinesFile(path, written)
        self._due, self._in_step, self._told = first, in_step, told
        self._held: dict[int, dict[str, Any]] = {}

    def add(self, lines: Iterable[dict[str, Any]]) -> None:
        """Take the lines of updates, and write those whose turn it is."""
        self._held |= {line["update"]: line for line in lines}
        while self._due in self._held and (self._due + 1) % self._in_step:
            self._write({})

    def end_step(self, metrics: dict[str, Any]) -> None:
        """Write the last line of a meta-step, with the meta-step's own metrics."""
        self._write(metrics)

    def sync(self) -> int:
        """Bring what was written to the disk; give the file's length."""
        return self._file.sync()

    @property
    def digest(self) -> dict[str, str]:
        """Give the SHA-256 of the file, by its name."""
        return self._file.digest

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, more: dict[str, Any]) -> None:
        line = self._held.pop(self._due) | more
        self._due += 1
        self._file.write(json.dumps(finite(line), allow_nan=False).encode())
        self._told(line)


def note_cost(out: Path, device: torch.device) -> None:
    """Write cost.json: the most memory that training held, of the GPU or of the process."""
    status = Path("/proc/self/status")
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    elif status.is_file():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        peak = int(line.split()[1]) * 1024
    else:  # not Linux
        return
    cost = {"device": device.type, "peak_bytes": max(_peak_before(out), peak)}
    write_atomic(out / "cost.json", json.dumps(cost))


def _peak_before(out: Path) -> int:
    """Read what cost.json says; 0 where there is none, or it is damaged."""
    try:
        found = read_json(out, "cost.json").get("peak_bytes")
    except ValueError:
        return 0
    return found if isinstance(found, int) and found is not True and found > 0 else 0


def of_responses(
    batch: Batch, names: Sequence[str], scales: Scales, *, partial: bool = False
) -> dict[str, Any]:
    """Say what an update's responses are like: means over them.

    partial: whether a reward may be missing (NaN). A mean is then over those that are there, None
    where there is none, and `not_applicable` counts the others.
    """
    rolled, raw, kept = batch.rolled, batch.reward_RK, len(batch.rolled.group_R) > 0
    normal = scales.normalizer.apply(raw)
    above_R = (normal > constant(scales.utopia, normal)).any(1)
    measured = [
        raw.nanmean(0) if partial else raw.mean(0),
        normal.nanmean(0) if partial else normal.mean(0),
        *([raw.isnan().sum(0)] if partial else []),
        above_R.sum(),
        batch.scored.score_R.mean(),
        rolled.mask_RT.sum(1).float().mean(),
    ]
    values = torch.cat([value.float().view(-1) for value in measured]).tolist()  # one copy
    above, score, length = values[-3:]
    k, means = len(names), [None if x != x else x for x in values[:-3]]
    reward, normalized, absent = means[:k], means[k : 2 * k], values[2 * k : -3]
    return {
        "score": score if kept else None,
        "rewards": dict(zip(names, reward, strict=True)),
        "normalized": dict(zip(names, normalized, strict=True)),
        "above_utopia": int(above),
        **({"not_applicable": _counted(names, absent)} if partial and any(absent) else {}),
        "tokens": batch.tokens,
        "prefill_tokens": rolled.prefill_tokens,
        "length": length if kept else None,
        "stopped": sum(f == "stop" for f in rolled.finish) / max(len(rolled.finish), 1),
        **batch.counts,
        **batch.log,
    }


def _counted(names: Sequence[str], counts: Sequence[float]) -> dict[str, int]:
    return {name: int(n) for name, n in zip(names, counts, strict=True) if n}
