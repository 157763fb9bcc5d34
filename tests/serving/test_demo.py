"""`meal-fast demo`: what it trains, and that a run which is there is served at once."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from meal_fast.config.presets import preset
from meal_fast.data.objectives import load_objectives
from meal_fast.demo import PARTS

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
ROOT = Path(__file__).resolve().parents[2]


def test_it_needs_no_more_than_it_builds():
    """The preset's model, prompts and objectives, without a reward model."""
    config = preset("demo")
    sources = [config.policy.path, config.prompts.train, *config.objectives]
    packaged = {s.partition("packaged:")[2] for s in sources if "packaged:" in s}
    assert packaged == {"smollm2-135m", "benign"} and set(PARTS) == {"smollm2-135m", "prompts"}
    assert load_objectives(config.objectives).names == ("brief", "detailed")


def test_a_run_that_is_there_is_served(run):
    (run.folder / "evaluation.json").write_text("{}")
    command = [sys.executable, "-m", "meal_fast.demo", "--out", str(run.folder)]
    command += ["--port", "0", "--no-open"]
    started = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    try:
        lines = iter(started.stderr.readline, "")
        url = next(m[1] for line in lines if (m := re.search(r"playground at (\S+)/,", line)))
        assert httpx.get(url, timeout=60).status_code == 200
    finally:
        started.send_signal(signal.SIGINT)
        started.wait(timeout=30)
        (run.folder / "evaluation.json").unlink()
