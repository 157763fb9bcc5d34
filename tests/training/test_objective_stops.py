"""A run whose objective hangs: told in time, or stopped by a signal, in a process of its own."""

import json
import os
import shlex
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
             "CHECKPOINT": str(tmp_path / "run/ckpt/LATEST")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


SLOW = """
import time
def hangs(prompts, responses):
    time.sleep(1.5)
    return [float(len(r)) for r in responses]
"""


def command(tmp_path: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {**ENVIRONMENT, "PYTHONPATH": path}
    argv = (sys.executable, "-m", *argv)
    return subprocess.run(
        argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


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
    assert (tmp_path / "run/ckpt/LATEST").is_file()


@pytest.mark.reliability("lost", "a run whose objective hangs beyond objectives_timeout")
def test_a_late_objective_ends_the_run_with_one_line(tmp_path: Path) -> None:
    process = start(tmp_path, "--recipe", "weighted-grpo", "--objectives_timeout", "1")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2, said
    line = next(line for line in said.splitlines() if line.startswith("meal-fast: error:"))
    assert "objective 'long' has not come back within 1 seconds for" in line
    assert "--objectives_timeout SECONDS" in line and "the last checkpoint is good" in line
    assert (tmp_path / "run/ckpt/LATEST").is_file()


@pytest.mark.reliability("message", "what a late objective's message advises: resume, evaluate")
def test_more_time_is_given_on_resume_and_in_evaluation(tmp_path: Path) -> None:
    size = ["--meta.steps", "2", "--evaluation.prompts", "1", "--evaluation.grid", "2"]
    argv = ["--recipe", "weighted-grpo", "--objectives_timeout", "1", *size]
    _, said = start(tmp_path, *argv).communicate(timeout=120)
    (tmp_path / "hanging_judge.py").write_text(SLOW)
    (tmp_path / "run/cost.json").write_text('{"peak_bytes": "much"}')
    printed = shlex.split(said.rpartition("go on with ")[2])
    assert printed[:3] == ["python", "-m", "meal_fast.train"] and "--trust-run" in printed, said
    more = [*printed[3:], "--objectives_timeout", "60", "--no-report"]
    ran = command(tmp_path, "meal_fast.train", *more)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "run/evaluation.json").is_file()
    assert json.loads((tmp_path / "run/cost.json").read_text())["peak_bytes"] > 0
    again = [str(tmp_path / "run"), "--trust-run", "--no-report"]
    late = command(tmp_path, "meal_fast.evaluate", *again)
    assert late.returncode == 2 and "has not come back within 1 seconds" in late.stderr
    done = command(tmp_path, "meal_fast.evaluate", *again, "--objectives-timeout", "60")
    assert done.returncode == 0, done.stderr
    assert "as it was answered before" in done.stderr
