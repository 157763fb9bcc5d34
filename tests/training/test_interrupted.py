"""Ctrl-C, full disks and folders that cannot be written: one line, and the truth."""

import errno
import gc
import importlib
import os

import pytest

from meal_fast import chat, evaluate, export, report, serve
from meal_fast.config.presets import preset
from meal_fast.config.resume import resume_command
from meal_fast.training import trainer as module
from meal_fast.training.trainer import Trainer
from tests.helpers.processes import SMALL, assert_one_line, train_here

pytestmark = pytest.mark.usefixtures("one_thread")

STAGES = {
    "loading": "load_policy",
    "the reward models": "load_objectives",
    "the warm start": "warm_up",
    "calibrating": "calibrate",
}


def raising(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def argv(run):
    return ["tiny", *SMALL, "--meta.steps", "2", "--warmup.steps", "1", "--warmup.draws", "4",
            "--evaluation.prompts", "1", "--out", str(run)]  # fmt: skip


def said(capfd):
    err = capfd.readouterr().err
    assert "Traceback" not in err
    return err


@pytest.mark.reliability("message", "Ctrl-C before the first update, at each stage")
@pytest.mark.parametrize("stage", STAGES)
def test_interrupted_before_the_first_update(tmp_path, capfd, monkeypatch, stage):
    monkeypatch.setattr(module, STAGES[stage], raising(KeyboardInterrupt()))
    assert train_here(*argv(tmp_path / "run")) == 130
    err = said(capfd)
    assert err.endswith("\n") and "stopped before the first update; " in err
    assert not (tmp_path / "run" / "run.lock").exists()
    monkeypatch.undo()
    held = (tmp_path / "run" / "config.json").exists()
    assert held == (f"go on with {resume_command(tmp_path / 'run')}" in err)
    assert held != err.endswith("; start again\n")
    assert train_here(*argv(tmp_path / "run"), *(["--resume"] if held else [])) == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train_here(*argv(folder)) == 0
    return folder


@pytest.mark.reliability("message", "Ctrl-C in evaluate, chat, serve, export and report")
@pytest.mark.parametrize(
    ("command", "where", "arguments"),
    [
        (evaluate, "meal_fast.evaluation.evaluator.run_evaluation", ["{run}"]),
        (evaluate, "meal_fast.evaluation.report.write_report", ["{run}"]),
        (chat, "meal_fast.models.model_soup.load_served", ["{run}", "--prompt", "Hi"]),
        (serve, "meal_fast.serving.run.load_served", ["{run}", "--port", "0"]),
        (export, "meal_fast.export.check_policy", ["{run}", "--out", "{tmp}/e"]),
        (report, "meal_fast.evaluation.report.write_report", ["{run}"]),
    ],
)
def test_interrupted_in_a_command(run, tmp_path, capfd, monkeypatch, command, where, arguments):
    name, _, attribute = where.rpartition(".")
    importlib.import_module(name)
    monkeypatch.setattr(where, raising(KeyboardInterrupt()))
    if hasattr(command, attribute):
        monkeypatch.setattr(command, attribute, raising(KeyboardInterrupt()))
    filled = [x.format(run=run, tmp=tmp_path) for x in arguments]
    with pytest.raises(SystemExit) as stop:
        command.main(filled)
    assert stop.value.code == 130
    err = said(capfd)
    assert err.splitlines()[-1].startswith("meal-fast: stopped")
    assert not (run / "run.lock").exists()


@pytest.mark.reliability("message", "a disk that is full before the first checkpoint, and after")
@pytest.mark.parametrize("after", [0, 1])
def test_a_full_disk_says_what_is_saved(tmp_path, capfd, monkeypatch, after):
    full, calls, real = OSError(errno.ENOSPC, "No space left on device"), [0], os.fsync

    def fsync(number):
        name = os.readlink(f"/proc/self/fd/{number}")
        if name.endswith(".safetensors") and "/ckpt/" in name:
            calls[0] += 1
            if calls[0] > after:
                raise full
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)  # what a disk may first say of a file that is written
    more = ["--checkpoint_every", "1", "--no-evaluate"]
    assert train_here(*argv(tmp_path / "run"), *more) == 2
    err = said(capfd)
    last = err[err.rindex("meal-fast: error") :]
    assert_one_line(
        last, "No space left", "make room, then go on with python -m meal_fast.train --resume"
    )
    assert ("the last checkpoint is good" in last) == bool(after)
    assert ("there is no checkpoint yet" in last) == (not after)
    assert not list((tmp_path / "run").rglob("*.tmp"))
    monkeypatch.undo()
    assert train_here(*argv(tmp_path / "run"), *more, "--resume") == 0


@pytest.mark.reliability("message", "folders that cannot be written or are files")
def test_where_nothing_can_be_written(run, tmp_path, capfd, monkeypatch):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert train_here(*argv(out)) == 2
        err = said(capfd)
        assert_one_line(err[err.rindex("meal-fast: error") :], str(out))
        with pytest.raises(SystemExit) as stop:
            evaluate.main([str(run), "--out", str(out)])
        assert stop.value.code == 2
        assert_one_line(said(capfd), str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"
    # A file system that is mounted for reading: root may write anywhere else.
    read_only = OSError(errno.EROFS, "Read-only file system", str(tmp_path / "run"))
    monkeypatch.setattr("pathlib.Path.mkdir", raising(read_only))
    assert train_here(*argv(tmp_path / "run")) == 2
    err = said(capfd)
    assert_one_line(err[err.rindex("meal-fast: error") :], "Read-only", "can be read and written")


def test_a_trainer_gives_its_lock_back_when_it_is_dropped(tmp_path):
    trainer = Trainer(preset("tiny"), tmp_path / "run")
    assert (tmp_path / "run" / "run.lock").exists()
    del trainer
    gc.collect()
    assert not (tmp_path / "run" / "run.lock").exists()
