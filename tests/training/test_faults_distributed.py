"""Faults of one process among several: all leave, with a message, and the run goes on.

Real processes that speak over gloo; each test has a time limit, within which all are gone.
"""

import contextlib
import itertools
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.checkpoints import part_size
from tests.helpers.processes import ROOT, assert_same_runs, train_here, updates
from tests.helpers.ranks import Ranks, alive, descendants, environment, free_port, lines

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
SHARDS = {"shards": ["--mesh.groups", "1", "--mesh.shard", "2"]}
STOPS = (signal.SIGTERM, signal.SIGUSR1)
GONE = 60  # seconds until the last process has left, on a machine that is busy with other tests


def cases(*quick, of):
    """Parameters of which but the `quick` ones are for the slow suite."""
    every = list(itertools.product(*of)) if len(of) > 1 else [(x,) for x in of[0]]
    return [pytest.param(*x, marks=[] if x in quick else [pytest.mark.slow]) for x in every]


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


def goes_on(tmp_path: Path, run: Path, straight: Path, *options: str) -> str:
    """Several processes go on with the run, and end it as the undisturbed one; what rank 0 says."""
    with Ranks(tmp_path / "again", *TINY, *options, "--resume", "--out", str(run)) as ranks:
        assert ranks.start().wait(120) == [0, 0], ranks.said()
    assert_same_runs(run, straight)
    assert not list(run.glob("*.tmp*")) and not (run / "run.lock").exists()
    return ranks.said(0)


def first_update(said: str) -> int:
    """The first update that a run has shown."""
    found = re.search(r"^update +(\d+)/", said, re.M)
    assert found is not None, said
    return int(found[1])


@pytest.mark.reliability("fault", "kill -9 of one process of two, in mid-run")
@pytest.mark.parametrize(("layout", "killed"), cases(("groups", 1), of=(LAYOUTS | SHARDS, (0, 1))))
def test_a_killed_process_takes_the_others_with_it(
    tmp_path, straight, layout, killed, record_property
):
    run, options = tmp_path / "run", (LAYOUTS | SHARDS)[layout]
    with Ranks(tmp_path / "first", *TINY, *options, "--out", str(run)) as ranks:
        ranks.start().until(lambda: lines(run) >= 4 * IN_STEP)
        sent = ranks.send(killed, signal.SIGKILL)
        codes = ranks.wait(GONE)
        took = time.monotonic() - sent
    left = 1 - killed
    assert codes[killed] == -signal.SIGKILL and codes[left] not in (0, -signal.SIGABRT), codes
    said = error(ranks.said(left))
    assert "another process has ended" in said and "--resume" in said, said
    record_property("seconds from kill -9 of one process to the end of all", f"{took:.1f}")
    there = lines(run)
    assert first_update(goes_on(tmp_path, run, straight, *options)) > there - IN_STEP


@pytest.mark.reliability("fault", "SIGTERM or SIGUSR1 to one process of two")
@pytest.mark.parametrize(("layout", "number"), cases(("data", signal.SIGTERM), of=(LAYOUTS, STOPS)))
def test_a_signal_to_one_stops_all_after_the_same_update(
    tmp_path, straight, layout, number, record_property
):
    run, options = tmp_path / "run", LAYOUTS[layout]
    with Ranks(tmp_path / "first", *TINY, *options, "--out", str(run)) as ranks:
        ranks.start().until(lambda: lines(run) >= 3 * IN_STEP)
        sent = ranks.send(1, number)
        assert ranks.wait(GONE) == [130, 130], ranks.said()
        took = time.monotonic() - sent
    assert "stopped after meta-step" in ranks.said(0) and "Traceback" not in ranks.said()
    done = lines(run)
    assert 3 * IN_STEP <= done < 12 * IN_STEP and done % IN_STEP == 0  # nothing is lost
    record_property("seconds from a signal to one process to the end of all", f"{took:.1f}")
    goes_on(tmp_path, run, straight, *options)


@pytest.mark.slow
@pytest.mark.reliability("fault", "a process that starts three seconds after the others")
def test_a_late_process_is_waited_for(tmp_path, straight):
    run = tmp_path / "run"
    with Ranks(tmp_path / "first", *TINY, *LAYOUTS["groups"], "--out", str(run)) as ranks:
        ranks.start(1)
        time.sleep(3)
        assert ranks.start(0).wait(120) == [0, 0], ranks.said()
    assert_same_runs(run, straight)


@pytest.mark.reliability("fault", "a process that never starts")
@pytest.mark.parametrize("missing", cases((1,), of=((0, 1),)))
def test_a_missing_process_is_waited_for_no_longer_than_said(tmp_path, missing, record_property):
    run, there = tmp_path / "run", 1 - missing
    argv = [*TINY, *LAYOUTS["groups"], "--mesh.timeout", "3", "--out", str(run)]
    with Ranks(tmp_path / "first", *argv) as ranks:
        began = time.monotonic()
        (code,) = ranks.start(there).wait(GONE)
        record_property("seconds to the end, of mesh.timeout=3", f"{time.monotonic() - began:.1f}")
    assert code not in (0, -signal.SIGABRT)
    assert "mesh.timeout=3" in error(ranks.said(there))
    assert not (run / "config.json").exists()


FAULTY = """
import os, time
def score(prompts, responses):
    if os.environ.get("RANK") == "1" and os.path.exists(os.environ["FAULT"]):
        if os.environ["KIND"] == "hangs":
            time.sleep(1000)
        return [float("nan")] * len(responses)
    return [float(len(r)) for r in responses]
"""


@pytest.mark.reliability("fault", "an objective that hangs, or gives NaN, on one process of two")
@pytest.mark.parametrize(
    ("layout", "kind"), cases(("data", "hangs"), of=(LAYOUTS, ("hangs", "nan")))
)
def test_an_objective_that_fails_on_one_ends_all(tmp_path, layout, kind, record_property):
    (tmp_path / "faulty_judge.py").write_text(FAULTY)
    run, fault = tmp_path / "run", tmp_path / "fault"
    objectives = ["--objectives", "long=faulty_judge:score", "first=world:first"]
    argv = [*TINY, *LAYOUTS[layout], *objectives, "--objectives_timeout", "2", "--out", str(run)]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    with Ranks(tmp_path / "first", *argv, PYTHONPATH=path, FAULT=str(fault), KIND=kind) as ranks:
        ranks.start().until(lambda: lines(run) >= 2 * IN_STEP)
        fault.touch()
        began = time.monotonic()
        assert ranks.wait(GONE) == [2, 2], ranks.said()
        took = time.monotonic() - began
    said = error(ranks.said(0))
    assert "objective 'long'" in said and "the last checkpoint is good" in said, said
    record_property(f"seconds from an objective that {kind} on one to the end", f"{took:.1f}")


HANGING_SERVER = """
import os, time
def score(prompts, responses):
    if os.path.exists(os.environ["FAULT"]):
        time.sleep(1000)
    return [float(len(r)) for r in responses]
"""


@pytest.mark.slow
@pytest.mark.reliability("fault", "a reward server that answers no more, two processes asking it")
def test_a_reward_server_that_hangs_ends_all(tmp_path, record_property):
    (tmp_path / "hanging_server.py").write_text(HANGING_SERVER)
    run, fault = tmp_path / "run", tmp_path / "fault"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "examples/reward_server.py"), "hanging_server:score",
         "--port", "0"],
        env=environment(PYTHONPATH=path, FAULT=str(fault)), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        objectives = ["--objectives", f"long={address}?timeout=1&retries=1", "first=world:first"]
        argv = [*TINY, *LAYOUTS["data"], *objectives, "--out", str(run)]
        with Ranks(tmp_path / "first", *argv) as ranks:
            ranks.start().until(lambda: lines(run) >= 2 * IN_STEP)
            fault.touch()
            began = time.monotonic()
            assert ranks.wait(GONE) == [2, 2], ranks.said()
            took = time.monotonic() - began
    finally:
        server.kill()
        server.communicate()
    said = error(ranks.said(0))
    assert "objective 'long'" in said and "the last checkpoint is good" in said, said
    record_property("seconds from the server's last answer to the end of all", f"{took:.1f}")


@pytest.mark.slow
@pytest.mark.reliability("fault", "a gradient that is NaN on one process of two")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_broken_gradient_on_one_is_skipped_on_all(tmp_path, layout):
    """As one process skips it that has the same fault; and all go on from the same parameters,
    which each checkpoint compares."""
    one, several = tmp_path / "one", tmp_path / "several"
    broken = {"BREAK_UPDATE": "10", "BREAK_PART": "1"}
    for run, world, options in ((one, 1, []), (several, 2, LAYOUTS[layout])):
        argv = [*TINY, *options, "--out", str(run)]
        with Ranks(tmp_path / f"of{world}", *argv, world=world, **broken) as ranks:
            ranks.module = "tests.helpers.broken_part"
            assert ranks.start().wait(120) == [0] * world, ranks.said()
    skipped = [row["update"] for row in updates(several) if row.get("skipped")]
    assert skipped == [10]
    assert_same_runs(several, one)


@pytest.mark.slow
@pytest.mark.reliability("fault", "a disk that is full at a checkpoint, two processes")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_full_disk_ends_all(tmp_path, straight, layout):
    run, options = tmp_path / "run", LAYOUTS[layout]
    with Ranks(tmp_path / "first", *TINY, *options, "--out", str(run)) as ranks:
        ranks.start().until(lambda: lines(run) >= 3 * IN_STEP and part_size(run, 1) > 0)
        limit = part_size(run, 1) // 2  # of the one that writes nothing else
        resource.prlimit(ranks.processes[1].pid, resource.RLIMIT_FSIZE, (limit, limit))
        assert ranks.wait(GONE) == [2, 2], ranks.said()
    said = error(ranks.said(0))
    assert "last checkpoint is good" in said and "make room" in said, said
    there = lines(run)
    assert first_update(goes_on(tmp_path, run, straight, *options)) > there - 2 * IN_STEP


@pytest.mark.slow
@pytest.mark.reliability("fault", "a process that stands still, without a word")
def test_a_stopped_process_is_waited_for_no_longer_than_said(tmp_path, straight, record_property):
    run, options = tmp_path / "run", LAYOUTS["data"]
    argv = [*TINY, *options, "--mesh.timeout", "4", "--out", str(run)]
    with Ranks(tmp_path / "first", *argv) as ranks:
        ranks.start().until(lambda: lines(run) >= 2 * IN_STEP)
        sent = ranks.send(1, signal.SIGSTOP)
        ranks.processes[0].wait(GONE)
        took = time.monotonic() - sent
        ranks.send(1, signal.SIGCONT)
        assert all(code not in (0, -signal.SIGABRT) for code in ranks.wait(GONE)), ranks.said()
    assert "mesh.timeout=4" in error(ranks.said(0)) and "another process" in error(ranks.said(1))
    record_property(
        "seconds from its last word to the other's end, of mesh.timeout=4", f"{took:.1f}"
    )
    goes_on(tmp_path, run, straight, *options)


def launcher(*argv: str, restarts: int = 0) -> list[str]:
    """torchrun with two processes."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--master-addr", "127.0.0.1", "--master-port", str(free_port()),
        "--max-restarts", str(restarts), "-m", "meal_fast.train", *argv, "--resume-or-start",
    ]  # fmt: skip


def rank_of(pid: int) -> str:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/environ") as file:
        given = dict(item.partition("=")[::2] for item in file.read().split("\0"))
        return given.get("RANK", "")
    return ""


def until(due, limit=120.0):
    give_up = time.monotonic() + limit
    while not due():
        assert time.monotonic() < give_up
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.reliability("fault", "kill -9 of a process that torchrun starts again")
def test_torchrun_starts_again_from_the_last_checkpoint(tmp_path, straight, record_property):
    run = tmp_path / "run"
    with open(tmp_path / "said.txt", "wb") as file:
        agent = subprocess.Popen(
            launcher(*TINY, "--out", str(run), restarts=1),
            cwd=ROOT, env=environment(), stdout=file, stderr=file,
        )  # fmt: skip
    try:
        until(lambda: lines(run) >= 4 * IN_STEP)
        (killed,) = [pid for pid in descendants(agent.pid) if rank_of(pid) == "1"]
        os.kill(killed, signal.SIGKILL)
        began = time.monotonic()
        assert agent.wait(120) == 0, (tmp_path / "said.txt").read_text()
        record_property(
            "seconds from kill -9 to the end of the run", f"{time.monotonic() - began:.1f}"
        )
    finally:
        left = descendants(agent.pid)
        agent.kill()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        agent.wait()
    assert_same_runs(run, straight)


@pytest.mark.slow
@pytest.mark.reliability("fault", "SIGTERM to torchrun: its processes save and leave")
def test_a_signal_to_torchrun_saves_the_run(tmp_path, straight, record_property):
    run = tmp_path / "run"
    with open(tmp_path / "said.txt", "wb") as file:
        agent = subprocess.Popen(
            launcher(*TINY, "--out", str(run)),
            cwd=ROOT, env=environment(), stdout=file, stderr=file,
        )  # fmt: skip
    pids: list[int] = []
    try:
        until(lambda: lines(run) >= 3 * IN_STEP)
        pids = descendants(agent.pid)
        agent.terminate()
        began = time.monotonic()
        assert agent.wait(60) != 0
        until(lambda: not any(map(alive, pids)), GONE)
        record_property(
            "seconds from SIGTERM to torchrun to the end", f"{time.monotonic() - began:.1f}"
        )
    finally:
        agent.kill()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        agent.wait()
    said = (tmp_path / "said.txt").read_text()
    assert "stopped after meta-step" in said and lines(run) % IN_STEP == 0, said
    goes_on(tmp_path, run, straight, *LAYOUTS["groups"])
