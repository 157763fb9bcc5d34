"""A run whose objective hangs: told in time, or stopped by a signal, in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.processes import ENVIRONMENT, ROOT

HANGS = """
import os, time
from concurrent.futures import ThreadPoolExecutor
def hangs(prompts, responses):
    if os.path.exists(os.environ["CHECKPOINT"]):
        open(os.environ["HANGING"], "w").close()
        with ThreadPoolExecutor(2) as pool:  # as judges do that ask a service
            list(pool.map(time.sleep, [1000, 1000]))
    return [float(len(r)) for r in responses]
"""


def start(tmp_path: Path, *more: str) -> subprocess.Popen[str]:
    (tmp_path / "hanging_judge.py").write_text(HANGS)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    return subprocess.Popen(
        [
            sys.executable, "-m", "meal_fast.train", "tiny", "--out", str(tmp_path / "run"),
            "--objectives", "long=hanging_judge:hangs", "first=world:first",
            "--rollout.prompts", "1", "--rollout.samples", "4", "--checkpoint_every", "1", *more,
        ],
        cwd=ROOT,
        env={**ENVIRONMENT, "PYTHONPATH": path, "HANGING": str(tmp_path / "hanging"),
             "CHECKPOINT": str(tmp_path / "run/checkpoint.pt")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


@pytest.mark.reliability("lost", "SIGTERM and Ctrl-C to a run whose objective hangs")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("recipe", ["weighted-grpo", "meal"])
def test_a_signal_ends_a_run_whose_objective_hangs(
    number: signal.Signals, recipe: str, tmp_path: Path, record_property
) -> None:
    process = start(tmp_path, "--recipe", recipe)
    give_up = time.monotonic() + 120
    while not (tmp_path / "hanging").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < give_up, "it never came to the call that hangs"
        time.sleep(0.05)
    time.sleep(0.5)
    sent = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    took = time.monotonic() - sent
    record_property("from the signal to the end of the process", f"{took:.1f} s")
    assert process.returncode == 130, said
    assert took < 20
    assert "objective 'long' did not come back within 5 s" in said and "--resume" in said
    assert "Traceback" not in said
    assert (tmp_path / "run/checkpoint.pt").is_file()


@pytest.mark.reliability("lost", "a run whose objective hangs beyond objectives_timeout")
def test_a_late_objective_ends_the_run_with_one_line(tmp_path: Path) -> None:
    process = start(tmp_path, "--recipe", "weighted-grpo", "--objectives_timeout", "1")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2, said
    line = next(line for line in said.splitlines() if line.startswith("meal-fast: error:"))
    assert "objective 'long' has not come back within 1 seconds for" in line
    assert (tmp_path / "run/checkpoint.pt").is_file()
