"""The example runs as a script, learns what is asked for, and needs no trainer."""

import importlib.util
import os
import subprocess
import sys

import pytest

from tests.helpers.processes import ROOT

PATH = ROOT / "examples" / "minimal_loop.py"


def test_it_needs_ops_rollout_and_what_loads():
    source = PATH.read_text(encoding="utf-8")
    for room in ("training", "evaluation", "integrations"):
        assert f"meal_fast.{room} import" not in source and f"meal_fast import {room}" not in source
    assert len(source.splitlines()) <= 140


@pytest.mark.usefixtures("one_thread")
def test_each_preference_gets_more_of_what_it_asks_for():
    spec = importlib.util.spec_from_file_location("minimal_loop", PATH)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    before, after = example.main(steps=40)
    assert all(abs(before[0][k] - before[1][k]) < 0.1 for k in range(2))  # w says nothing yet
    for k in range(2):
        assert after[k][k] > before[k][k] + 0.1, (before, after)
        assert after[k][k] > after[1 - k][k] + 0.05, (before, after)


def test_it_runs_as_a_script_from_anywhere(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(PATH), "1"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("w=") == 4 and "step  0" in done.stdout
