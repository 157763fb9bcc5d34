"""Faults of one process among several: all leave, with a message, and the run goes on.

Real processes that speak over gloo; each test has a time limit, within which all are gone.
"""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT, assert_same_runs, train_here, updates
from tests.helpers.ranks import Ranks, alive, descendants, environment, lines

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = [
    "tiny", "--no-evaluate", "--rollout.prompts", "2", "--rollout.samples", "4",
    "--score.calibration", "2", "--meta.steps", "12", "--checkpoint_every", "1",
    "--mesh.virtual", "2",
]  # fmt: skip
IN_STEP = 4  # updates: two tasks' two
LAYOUTS = {
    "groups": ["--mesh.groups", "2", "--mesh.data", "1"],
    "data": ["--mesh.groups", "1", "--mesh.data", "2"],
}
GONE = 30  # seconds until the last process has left


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The run that nothing disturbs; one process has what several have."""
    run = tmp_path_factory.mktemp("straight") / "run"
    assert train_here(*TINY, "--out", str(run)) == 0
    return run


def error(said: str) -> str:
    """The one line that says what was wrong."""
    found = [line for line in said.splitlines() if line.startswith("meal-fast: error:")]
    assert len(found) == 1 and "Traceback" not in said, said
    return found[0]


def goes_on(tmp_path: Path, run: Path, straight: Path, *options: str) -> None:
    """Several processes go on with the run, and end it as the undisturbed one ended."""
    with Ranks(tmp_path / "again", *TINY, *options, "--resume", "--out", str(run)) as ranks:
        assert ranks.start().wait(120) == [0, 0], ranks.said()
    assert_same_runs(run, straight)
    assert not list(run.glob("*.tmp*")) and not (run / "run.lock").exists()
