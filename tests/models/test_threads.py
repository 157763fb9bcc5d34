"""The number of threads is part of a run: neither the environment nor a busy machine changes it."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch

from meal_fast import evaluate
from meal_fast.config.config import from_dict
from meal_fast.config.presets import preset
from meal_fast.config.run_dir import read_config
from meal_fast.evaluation import comparison_spec
from meal_fast.models import threads
from meal_fast.training.trainer import Trainer
from tests.helpers.processes import ROOT, SMALL, refused, stopped, train_here, updates

TINY = ["tiny", *SMALL, "--meta.steps", "2", "--checkpoint_every", "1", "--no-evaluate"]
# Large enough that torch and MKL split the work, which they do not for the tiny preset itself.
WIDE = ["tiny", "--meta.steps", "1", "--meta.tasks", "1", "--rollout.prompts", "4",
        "--rollout.samples", "32", "--no-evaluate"]  # fmt: skip


def python(*argv, **environment):
    """A Python process; a variable that is None is not set in it."""
    # Threads that wait asleep, not spinning: a busy machine is shared with other tests.
    kept = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **environment}
    environment = {name: value for name, value in kept.items() if value is not None}
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def trained(run, *argv, **environment):
    done = python("-m", "meal_fast.train", *WIDE, "--out", run, *argv, **environment)
    assert done.returncode == 0, done.stderr
    return updates(run)


@pytest.mark.reliability("silent", "another number of threads by OMP_NUM_THREADS or a busy machine")
def test_neither_the_environment_nor_load_changes_a_run(tmp_path):
    options = ["--threads", "2"]
    want = trained(tmp_path / "plain", *options, OMP_NUM_THREADS=None)
    assert trained(tmp_path / "one", *options, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1") == want
    with ExitStack() as held:
        for _ in range(os.cpu_count() or 1):
            busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            held.callback(busy.wait)
            held.callback(busy.kill)
        assert trained(tmp_path / "busy", *options, OMP_NUM_THREADS=None) == want
    assert json.loads((tmp_path / "one" / "config.json").read_text())["threads"] == 2


def test_on_a_cpu_repeated_places_add_up_in_order(tmp_path):
    """As on one thread; otherwise two threads add in whatever order they come."""
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(0, 50, (4000,), generator=generator)
    value = torch.randn(4000, 64, generator=generator)

    def gradient():
        x = torch.zeros(50, 64, requires_grad=True)
        x[places].backward(value)
        return x.grad

    torch.set_num_threads(1)
    want = gradient()
    Trainer(from_dict({"threads": 2}, preset("tiny")), tmp_path / "run")
    assert torch.get_num_threads() == 2 and torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory  # that would cost time
    assert all(torch.equal(gradient(), want) for _ in range(10))


@pytest.mark.reliability("silent", "a resume with another number of threads")
def test_a_resumed_run_takes_its_own_number(tmp_path, capfd):
    run, straight = tmp_path / "run", tmp_path / "straight"
    assert train_here(*TINY, "--threads", "2", "--out", str(straight)) == 0
    assert stopped(read_config(straight), run).step == 1
    capfd.readouterr()
    other = ["--resume", "--no-evaluate", "--out", str(run), "--threads", "1"]
    refused(capfd, other, "--resume with a changed config: threads (2 -> 1)")
    torch.set_num_threads(1)  # as on a machine with fewer cores
    assert train_here("--resume", "--no-evaluate", "--out", str(run)) == 0
    assert torch.get_num_threads() == 2
    assert updates(run) == updates(straight)


def test_what_was_not_asked_for_is_settled_once(tmp_path):
    config = from_dict({"threads": 0, "meta": {"steps": 1}}, preset("tiny"))
    Trainer(config, tmp_path / "run")
    assert read_config(tmp_path / "run").threads == threads.automatic() == torch.get_num_threads()
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved | {"threads": 3}))
    assert Trainer(config, tmp_path / "run", resume=True).config.threads == 3
    del saved["threads"]  # a run of before the option
    (tmp_path / "run" / "config.json").write_text(json.dumps(saved))
    assert Trainer(config, tmp_path / "run", resume=True).train()
    torch.set_num_threads(3)
    evaluate.main([str(tmp_path / "run"), "--prompts", "1", "--no-report"])
    assert torch.get_num_threads() == threads.automatic()


def test_the_automatic_number_is_the_machine_s():
    code = "from meal_fast.models.threads import automatic; print(automatic())"
    said = {python("-c", code, OMP_NUM_THREADS=n).stdout for n in (None, "1", "7")}
    assert said == {f"{threads.automatic()}\n"}
    assert 1 <= threads.automatic() <= os.cpu_count()


@pytest.mark.reliability("silent", "OMP_DYNAMIC, which changes the threads during a run")
def test_omp_dynamic_is_refused(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("OMP_DYNAMIC", "true")
    refused(capfd, [*TINY, "--out", str(tmp_path / "run")], "OMP_DYNAMIC='true'", "unset it")


def test_the_runs_of_a_comparison_have_one_number(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison_spec, "automatic", lambda: 12)

    def number(jobs, *more):
        argv = ["concave-front", "--tokens", "9999", "--recipes", "grid-grpo,parm", "--seeds", "0"]
        asked, jobs = comparison_spec.parse(
            [*argv, "--jobs", str(jobs), "--out", str(tmp_path), *more], ""
        )
        runs = [
            comparison_spec.Run(comparison_spec.threaded(asked, jobs), m, 0) for m in asked.methods
        ]
        (said,) = {run.config.threads for run in runs}
        flags = [run.job().argv for run in runs]
        assert all(f"--threads={said}" in argv or "--resume" in argv or said == 1 for argv in flags)
        return said, runs

    assert number(2)[0] == 1  # as the preset says
    assert number(2, "--threads", "4")[0] == 4
    assert [number(jobs, "--threads", "0")[0] for jobs in (0, 1, 3, 99)] == [12, 12, 4, 1]
    _, (run, _) = number(3, "--threads", "0")
    run.folder.mkdir(parents=True)
    saved = json.dumps({"recipe": "grid-grpo", "threads": 5})
    (run.folder / "config.json").write_text(saved)
    with pytest.raises(ValueError, match="made with"):  # other options, but not its threads
        number(1, "--threads", "0")


def test_a_limit_below_the_threads_and_too_many_are_refused(tmp_path):
    """Under the limit oneDNN would get fewer threads than it divides its products among."""
    out = tmp_path / "run"
    command = ["-m", "meal_fast.train", *WIDE, "--out", out, "--threads"]
    done = python(*command, "2", OMP_THREAD_LIMIT="1")
    error = done.stderr.splitlines()[-1]  # behind what the run would have done
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "OMP_THREAD_LIMIT='1'" in error and "--threads 1" in error
    done = python(*command, "100000")
    assert done.returncode == 2 and "threads=100000" in done.stderr
    assert not out.exists()


def test_an_older_run_says_its_threads_from_its_next_resume_on(tmp_path):
    run = tmp_path / "run"
    trained(run, "--threads", "1")
    path = run / "config.json"
    values = json.loads(path.read_text())
    del values["threads"]
    path.write_text(json.dumps(values))
    for asked, code in (("1", 0), ("2", 2)):
        done = python("-m", "meal_fast.train", "--resume", "--out", run, "--threads", asked,
                      "--no-evaluate")  # fmt: skip
        assert done.returncode == code, done.stderr
        assert json.loads(path.read_text())["threads"] == 1
