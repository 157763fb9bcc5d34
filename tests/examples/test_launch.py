"""The launch files start what they say: real launchers, two processes, two "nodes" of a machine."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from meal_fast.config.cli import parse_train
from tests.helpers.processes import ROOT, assert_same_runs, train_here
from tests.helpers.ranks import environment, free_port

LAUNCH = ROOT / "examples" / "launch"
SCRIPTS = ("one_node.sh", "two_nodes.sh", "slurm.sbatch")
TINY = [
    "tiny", "--no-evaluate", "--rollout.prompts", "2", "--rollout.samples", "4",
    "--score.calibration", "2", "--meta.steps", "2", "--mesh.virtual", "2",
]  # fmt: skip


def test_each_is_told_of_and_can_be_read():
    page = (LAUNCH / "README.md").read_text(encoding="utf-8")
    files = sorted(p.name for p in LAUNCH.iterdir() if p.name != "README.md")
    assert {*SCRIPTS, "ray_train.py", "skypilot.yaml"} == set(files)
    for name in files:
        assert f"`{name}" in page
    for name in SCRIPTS:
        subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)
    ast.parse((LAUNCH / "ray_train.py").read_text(encoding="utf-8"))
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text(encoding="utf-8"))
    subprocess.run(["bash", "-n", "-c", task["run"]], check=True)
    assert "examples/launch/two_nodes.sh" in task["run"] and task["num_nodes"] == 1


def test_a_command_without_what_it_needs_says_so(tmp_path):
    for script, argv, word in (
        ("one_node.sh", [], "number of processes"),
        ("two_nodes.sh", ["2"], "HOST:PORT"),
        ("one_node.sh", ["2"], "torchrun or accelerate"),
    ):
        ran = subprocess.run(
            [str(LAUNCH / script), *argv], cwd=tmp_path, capture_output=True, text=True,
            env=environment(LAUNCHER="mpirun"),
        )  # fmt: skip
        assert ran.returncode != 0 and word in ran.stderr, ran.stderr


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The run of one process."""
    run = tmp_path_factory.mktemp("straight") / "run"
    assert train_here(*TINY, "--out", str(run)) == 0
    return run


def started(folder: Path, script: str, processes: int, **more: str) -> subprocess.Popen[bytes]:
    with open(folder / f"said-{len(list(folder.iterdir()))}.txt", "wb") as said:
        return subprocess.Popen(
            [str(LAUNCH / script), str(processes), *TINY, "--out", str(folder / "run")],
            cwd=ROOT, env=environment(PYTHON=sys.executable, **more), stdout=said, stderr=said,
            start_new_session=True,
        )  # fmt: skip


def ended(folder: Path, *launchers: subprocess.Popen[bytes]) -> None:
    try:
        codes = [launcher.wait(300) for launcher in launchers]
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGTERM)  # it takes its processes with it
                launcher.wait()
    said = "\n".join(p.read_text() for p in sorted(folder.glob("said-*.txt")))
    assert codes == [0] * len(launchers), said


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_one_node(tmp_path, straight, launcher):
    ended(tmp_path, started(tmp_path, "one_node.sh", 2, LAUNCHER=launcher))
    assert_same_runs(tmp_path / "run", straight)
    # The same command goes on: there is nothing left to train.
    ended(tmp_path, started(tmp_path, "one_node.sh", 2, LAUNCHER=launcher))
    assert_same_runs(tmp_path / "run", straight)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_nodes_on_the_loopback(tmp_path, straight):
    more = {"HEAD": f"127.0.0.1:{free_port()}", "LOCAL_ADDR": "127.0.0.1"}
    nodes = [started(tmp_path, "two_nodes.sh", 1, **more) for _ in range(2)]
    ended(tmp_path, *nodes)
    assert_same_runs(tmp_path / "run", straight)


def test_the_command_of_a_job_is_understood(tmp_path):
    """What slurm.sbatch gives to each task; the script itself was run under SLURM 22.05."""
    text = (LAUNCH / "slurm.sbatch").read_text(encoding="utf-8")
    assert '"$@" --out "$RUN" --resume-or-start' in text
    config, args = parse_train([*TINY, "--out", str(tmp_path / "run"), "--resume-or-start"])
    assert config.mesh.virtual == 2 and not args.resume
