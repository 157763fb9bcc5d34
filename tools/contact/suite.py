"""`pytest -m gpu` on all cores: kernels are compiled by the CPU, and most of the time is that."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tools.contact import reports
from tools.contact.here import Cases, Here

ROOT = Path(__file__).resolve().parents[2]
# Of tests on a card: marked, or with a fixture that is.
ON_A_CARD = re.compile(r"mark\.gpu|^def test_\w+\([^)]*\bdevice\b", re.MULTILINE)
# In a rehearsal: of the shortest files a few tests that also run on the CPU.
FEW = "nothing_to_do or two_runs_give_the_same_bits or of_float64"
LAST = 3.0  # seconds kept for the counts
A_TEST = 100  # seconds, where pytest-timeout is installed


def cases(here: Here) -> Cases:
    given = files(ROOT / "tests")
    return {"pytest -m gpu": functools.partial(run, here, given[-2:] if here.rehearsal else given)}


def files(folder: Path) -> list[Path]:
    """Those that have tests for a card, the largest first; no other is imported."""
    found = [p for p in folder.rglob("test_*.py") if ON_A_CARD.search(p.read_text())]
    return sorted(found, key=lambda p: -p.stat().st_size)


def commands(here: Here, given: Sequence[Path]) -> list[list[str]]:
    """One pytest over all cores where pytest-xdist is installed, or else one for each core."""
    cores = len(os.sched_getaffinity(0))
    which = ["-k", FEW] if here.rehearsal else ["-m", "gpu"]
    common = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    common += ["-p", "tools.contact.reports", *which]
    if importlib.util.find_spec("pytest_timeout"):
        common += [f"--timeout={A_TEST}"]
    if importlib.util.find_spec("xdist"):
        workers = str(min(cores, 16))
        return [[*common, "-n", workers, "--dist", "worksteal", *map(str, given)]]
    lanes: list[list[Path]] = [[] for _ in range(min(cores, len(given)))]
    for path in given:  # the largest first, each to the lane that has least
        min(lanes, key=lambda lane: sum(p.stat().st_size for p in lane)).append(path)
    return [[*common, *map(str, lane)] for lane in lanes]


def run(here: Here, given: Sequence[Path]) -> None:
    """Every failure as it comes; counts of each file at the end, or when time is up."""
    told = here.folder / "reports"
    told.mkdir(exist_ok=True)
    # Where a test calls this, it may be in a worker of pytest-xdist: these pytests are in none.
    ours = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    environment = {**ours, reports.VARIABLE: str(told), "OMP_NUM_THREADS": "1"}
    started = commands(here, given)
    logs = [told / f"{i}.txt" for i, _ in enumerate(started)]
    ran = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log.open("w"),
                         stderr=subprocess.STDOUT)
        for command, log in zip(started, logs, strict=True)
    ]  # fmt: skip
    counts: dict[str, Counter[str]] = {}
    reader = lines(told)
    while any(process.poll() is None for process in ran) and here.left() > LAST:
        take(here, reader, counts)
        time.sleep(0.2)
    late = [process.poll() is None for process in ran]
    for process in ran:
        process.kill()
        process.wait()
    take(here, reader, counts)
    for file, found in counts.items():
        said = ", ".join(f"{n} {outcome}" for outcome, n in sorted(found.items()))
        here.row(file, found["passed"], "passed", note=said)
    total = sum(counts.values(), Counter())
    ok = None if total else False  # a pytest that is not there, or does not get as far as a test
    here.row("all files", total["passed"], "passed", ok=ok, note=f"{total['failed']} failed, "
             f"{total['skipped']} skipped")  # fmt: skip
    for process, log, was_late in zip(ran, logs, late, strict=True):
        # 0: all passed; 1: some failed, which is told already; 5: none was selected.
        if was_late or process.returncode not in (0, 1, 5) or not total:
            why = "not finished in time" if was_late else f"exit status {process.returncode}"
            here.row("pytest", why, ok=False)
            here.fail(f"pytest: {why}\n{log.read_text()[-reports.TEXT :]}")


def lines(folder: Path) -> Iterator[list[dict[str, Any]]]:
    """What the plugins have written since the last time."""
    read: dict[Path, int] = {}
    while True:
        new: list[dict[str, Any]] = []
        for path in sorted(folder.glob("*.jsonl")):
            text = path.read_text()
            whole = text[: text.rfind("\n") + 1]
            new += map(json.loads, whole[read.get(path, 0) :].splitlines())
            read[path] = len(whole)
        yield new


def take(
    here: Here, reader: Iterator[list[dict[str, Any]]], counts: dict[str, Counter[str]]
) -> None:
    for line in next(reader):
        file, _, test = line["test"].partition("::")
        counts.setdefault(file, Counter())[line["outcome"]] += 1
        if line["outcome"] == "failed":
            here.fail(f"{file}::{test}\n{line['text']}")
