"""One writer a run folder: who is refused, and what a process that is gone leaves behind."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
import warnings

import pytest

from meal_fast.config import run_lock
from meal_fast.config.run_lock import FILE, check_free, lock, this_process
from tests.helpers.processes import ENVIRONMENT, ROOT, SMALL, assert_one_line, start, updates

from tests.helpers.processes import train_here, wait_for_updates  # isort: skip

HOLD = """
import sys, time
from pathlib import Path
from meal_fast.config.run_lock import lock
held = lock(Path(sys.argv[1]), "training")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        cwd=ROOT, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield tmp_path / "run", process
    process.kill()
    process.wait()
    process.stdout.close()


def written(run, **changes):
    run.mkdir(exist_ok=True)
    (run / FILE).write_text(json.dumps(this_process("training") | changes))


@pytest.mark.reliability("fault", "a second process in a run's folder, and one after a kill -9")
def test_another_process_is_named_and_what_it_leaves_is_taken_over(holder):
    run, process = holder
    for take in (lambda: lock(run, "training"), lambda: check_free(run)):
        with pytest.raises(ValueError, match=f"is in use .training by process {process.pid} on "):
            take()
    process.kill()
    process.wait()
    assert (run / FILE).exists()
    check_free(run)
    with pytest.warns(UserWarning, match=f"left by process {process.pid}, which is gone"):
        held = lock(run, "training")
    assert json.loads((run / FILE).read_text())["pid"] == os.getpid()
    held.release()
    assert not (run / FILE).exists()


def test_the_same_process_may_hold_it_more_than_once(tmp_path):
    run, threads = tmp_path / "a" / "run", threading.active_count()
    first, second = lock(run, "training"), lock(run, "evaluation")
    check_free(run)
    first.release()
    assert (run / FILE).exists()
    second.release()
    assert not (tmp_path / "a").exists()  # it was made for the lock alone
    assert threading.active_count() == threads
    with lock(run, "training"):
        (run / "kept").write_text("x")
    assert [p.name for p in run.iterdir()] == ["kept"]


def test_a_copy_of_the_process_is_another_one(tmp_path):
    with lock(tmp_path / "run", "training"):
        context = multiprocessing.get_context("fork")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
            child = context.Process(target=_refused, args=(tmp_path / "run",))
            child.start()
        child.join(30)
        assert child.exitcode == 3 and (tmp_path / "run" / FILE).exists()


def _refused(run):
    try:
        lock(run, "training")
    except ValueError:
        sys.exit(3)


@pytest.mark.reliability("fault", "a lock of another host, of an earlier boot, damaged, or old")
@pytest.mark.parametrize(
    ("changes", "age", "words"),
    [
        ({"host": "elsewhere"}, 0, "on elsewhere since"),
        ({"host": "elsewhere"}, 300, "remove run.lock"),
        ({"host": "elsewhere"}, 700, None),
        ({"namespace": "pid:[1]"}, 0, "is in use"),
        ({"namespace": "pid:[1]"}, 700, None),
        ({"boot": "another"}, 0, None),
        ({"started": "1"}, 0, None),  # its number is another process's by now
        ({"pid": 2**22 + 1, "started": "7"}, 0, None),
        ({"pid": "no number"}, 0, "no lock of this program"),
        ({"pid": "no number"}, 700, None),
    ],
)
def test_whose_lock_holds(tmp_path, changes, age, words):
    run = tmp_path / "run"
    written(run, **changes)
    then = time.time() - age
    os.utime(run / FILE, (then, then))
    if words is None:
        check_free(run)
        with pytest.warns(UserWarning, match="taken over"), lock(run, "training"):
            assert json.loads((run / FILE).read_text()) == this_process("training")
    else:
        for take in (lambda: lock(run, "training"), lambda: check_free(run)):
            with pytest.raises(ValueError, match=words):
                take()
        assert (run / FILE).exists() and not list(run.glob("*.tmp"))


def test_a_lock_that_is_held_open_is_not_taken_over(holder):
    """As of a container that has the same name: its processes are not seen, but its flock is."""
    run, _ = holder
    values = json.loads((run / FILE).read_text())
    with open(run / FILE, "w") as file:  # the same file
        json.dump(values | {"pid": 2**22 + 1}, file)
    with pytest.raises(ValueError, match="a process holds it open"):
        lock(run, "training")


def test_of_many_at_once_one_gets_it(tmp_path):
    written(tmp_path / "run", pid=2**22 + 1)
    code = HOLD.replace("time.sleep(60)", "time.sleep(3)")
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    settings = {"env": {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, "cwd": ROOT, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [subprocess.Popen(command, **settings, **pipes) for _ in range(6)]
    said = [process.communicate() for process in started]
    assert sum(out == "held\n" for out, _ in said) == 1
    assert sum("is in use" in err for _, err in said) == 5
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_it_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "HEARTBEAT", 0.05)
    with lock(tmp_path / "run", "training"):
        os.utime(tmp_path / "run" / FILE, (1, 1))
        deadline = time.monotonic() + 10
        while (tmp_path / "run" / FILE).stat().st_mtime < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.mark.reliability("lost", "two trainers on one folder")
def test_a_second_trainer_is_refused_and_the_first_not_disturbed(tmp_path, capfd):
    argv = ["tiny", *SMALL, "--meta.steps", "60", "--checkpoint_every", "50", "--no-evaluate"]
    run = tmp_path / "run"
    process = start(*argv, "--out", str(run))
    wait_for_updates(process, run, 3)
    for more in ([], ["--resume"], ["--seed", "1"]):
        assert train_here(*argv, *more, "--out", str(run)) == 2
        err = capfd.readouterr().err
        assert_one_line(err, "is in use", f"training by process {process.pid} on ", "since ")
    assert process.poll() is None
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert len(updates(run)) == 240 and not (run / FILE).exists()
