"""Training in processes of its own, to be signalled, killed, and gone on with."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from meal_fast import train
from meal_fast.config import Config
from meal_fast.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
# The world is so small that threads only wait for each other; and bits must not depend on them.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

# The tiny preset at its cheapest: updates of a few hundredths of a second.
SMALL = ["--rollout.prompts", "1", "--rollout.samples", "4", "--score.calibration", "2"]


def start(*argv: str) -> subprocess.Popen[str]:
    """`python -m meal_fast.train` with `argv`, left to run."""
    return subprocess.Popen(
        [sys.executable, "-m", "meal_fast.train", *argv],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_updates(process: subprocess.Popen[str], run: Path, count: int) -> None:
    """Returns when the run has logged `count` updates, or its process has ended."""
    path, give_up = run / "metrics.jsonl", time.monotonic() + 120
    while process.poll() is None:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        assert time.monotonic() < give_up, "no update within two minutes"
        time.sleep(0.002)


def train_here(*argv: str) -> int:
    """The train command line in this process: its exit code."""
    try:
        train.main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def updates(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock measured."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        assert row.pop("seconds")["rollout"] > 0
    return rows


def stopped(config: Config, run: Path, after: int = 0) -> Trainer:
    """Train until update `after` is logged and its meta-step done, as a signal stops a run."""
    trainer = Trainer(config, run)
    trainer.on_update = lambda metrics: setattr(
        trainer, "stop_requested", metrics["update"] >= after
    )
    assert not trainer.train()
    return trainer


def assert_same_runs(one: Path, other: Path) -> None:
    """The same updates, and the same policy in the end: every tensor of every file."""
    assert updates(one) == updates(other)
    files = [sorted((run / "policy").rglob("*.safetensors")) for run in (one, other)]
    assert files[0] and [path.relative_to(one) for path in files[0]] == [
        path.relative_to(other) for path in files[1]
    ]
    for mine, theirs in zip(*files, strict=True):
        first, second = load_file(mine), load_file(theirs)
        assert first.keys() == second.keys(), mine
        assert all(torch.equal(first[name], second[name]) for name in first), mine


def assert_one_line(err: str, *words: str) -> None:
    """`err` is the one line that a mistake leaves on stderr, and has each of `words`."""
    assert err.startswith("meal-fast: error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err, err


def refused(capfd: pytest.CaptureFixture[str], argv: list[str], *words: str) -> None:
    """Training with `argv` ends with exit code 2 and one line that has `words`.

    Before it there may be what the run would have done, where what is wrong is found out later.
    """
    assert train_here(*argv) == 2
    out, err = capfd.readouterr()
    plan, _, error = err.rpartition("meal-fast: error: ")
    assert out == "" and "Traceback" not in plan and "error" not in plan
    assert not plan or plan.startswith("meal-fast trains ") or plan.startswith("meal-fast goes on")
    assert_one_line(f"meal-fast: error: {error}", *words)
