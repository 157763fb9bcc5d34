"""What a run's folder holds: checkpoints, of earlier versions too, and metrics.jsonl in order."""

import copy
import dataclasses
import os
import shutil
import threading

import pytest
import torch

from meal_fast.config.config import from_dict
from meal_fast.config.presets import preset
from meal_fast.config.run_dir import read_metrics
from meal_fast.training.checkpoint_saved import read_sound
from meal_fast.training.checkpoint_state import sound, taken_apart
from meal_fast.training.metrics import MetricsLog
from meal_fast.training.trainer import Trainer
from tests.helpers.checkpoints import latest, old_state, saved
from tests.helpers.processes import assert_same_runs, stopped


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("recipe", "more"),
    [
        ("meal", {"update": 8}),
        ("ric", {"updates": 8, "tokens": 999}),
        ("weighted-meta-grpo", {}),
    ],
)
def test_a_checkpoint_of_an_earlier_version_goes_on(tmp_path, recipe, more):
    """Under the key "experience", and with the counts that its collectors kept themselves."""
    config = from_dict({"recipe": recipe, "meta": {"steps": 3}}, preset("tiny"))
    config = dataclasses.replace(config, checkpoint_every=1)
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    assert Trainer(config, straight).train()
    assert stopped(config, halves, after=7).step == 2
    held = old_state(latest(halves))
    for newer in ("completions_bytes", "files", "config", "digest"):
        del held[newer]
    assert held["experience"].get("update", 8) == 8
    held["experience"] |= more
    shutil.rmtree(halves / "ckpt")
    torch.save(held, halves / "checkpoint.pt")
    with pytest.warns(UserWarning, match="without a digest: taken as it is"):
        assert Trainer(config, halves, resume=True).train()
    assert_same_runs(halves, straight)


def test_lines_are_written_in_the_order_of_updates_and_the_last_waits(tmp_path):
    told = []
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, written=0, first=4, in_step=4, told=lambda x: told.append(x["update"]))
    log.add([{"update": 4}, {"update": 6}])
    assert told == [4]
    log.add([{"update": 5}, {"update": 7}])
    assert told == [4, 5, 6]
    log.end_step({"delta_norm": 1.0})
    assert told == [4, 5, 6, 7]
    kept = log.sync()
    log.add([{"update": 8}])  # after the checkpoint: lost with the process
    log.close()
    again = MetricsLog(path, written=kept, first=8, in_step=4, told=told.append)
    again.close()
    rows = read_metrics(tmp_path)
    assert [row["update"] for row in rows] == [4, 5, 6, 7] and rows[-1]["delta_norm"] == 1.0


@pytest.fixture
def slow_disk(monkeypatch):
    """A disk that takes a checkpoint's tensors when it is told to, and not before."""
    ready, real = threading.Event(), os.fsync

    def fsync(number):
        if os.readlink(f"/proc/self/fd/{number}").endswith(".safetensors"):
            assert ready.wait(60)
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    yield ready
    ready.set()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("adam", ["persist_v", "per_preference"])
def test_the_training_goes_on_while_a_checkpoint_is_written(tmp_path, slow_disk, adam):
    config = from_dict({"meta": {"adam": adam}}, preset("tiny"))
    trainer = Trainer(config, tmp_path / "run")
    trainer.meta_step()
    trainer.step += 1
    want = copy.deepcopy(trainer.outer.state())
    trainer.save_checkpoint()
    trainer.meta_step()  # it moves parameters and Adam's state
    trainer.step += 1
    assert not torch.equal(trainer.outer.state()["theta"][0], want["theta"][0])
    assert not (tmp_path / "run/ckpt/LATEST").exists() and trainer.checkpoints.latest == 1
    threading.Timer(0.2, slow_disk.set).start()
    trainer.save_checkpoint()  # waits for the one before
    assert slow_disk.is_set() and saved(tmp_path / "run").step in (1, 2)
    trainer.checkpoints.finish()
    assert saved(tmp_path / "run").step == 2
    found = read_sound(tmp_path / "run/ckpt/step-1").load()["outer"]
    assert_equal(found, want)
    assert_equal(saved(tmp_path / "run").load()["outer"], trainer.outer.state())
    if adam == "per_preference":
        assert len(found["by_preference"]) == 2
    trainer.checkpoints.close()


def assert_equal(one, other):
    """Nested values are the same, and of the same kinds."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        assert_equal(list(one.values()), list(other.values()))
    elif isinstance(one, list | tuple):
        for mine, theirs in zip(one, other, strict=True):
            assert_equal(mine, theirs)
    else:
        assert one == other


@pytest.mark.usefixtures("one_thread")
def test_two_are_kept_and_no_remains(tmp_path):
    config = dataclasses.replace(
        from_dict({"meta": {"steps": 4}}, preset("tiny")), checkpoint_every=1
    )
    run = tmp_path / "run"
    assert stopped(config, run, after=7).step == 2
    for name in ("step-9.tmp", "step-2.tmp", "step-9", "step-0"):  # of killed processes, of others
        shutil.rmtree(run / "ckpt" / name, ignore_errors=True)
        (run / "ckpt" / name).mkdir()
        (run / "ckpt" / name / "rank-00000.safetensors").write_bytes(b"half")
    assert Trainer(config, run, resume=True).train()
    assert {p.name for p in (run / "ckpt").iterdir()} == {"LATEST", "step-3", "step-4"}


def test_what_cannot_be_given_back_is_refused():
    for value in (object(), torch.zeros(1, dtype=torch.complex64), {1, 2}, b"bytes"):
        with pytest.raises(TypeError, match=r"(outer/theta/0: a|a tensor of) .* cannot be kept"):
            taken_apart({"outer": {"theta": [value]}})


def test_a_sum_that_overflows_is_finite():
    large = torch.full((4,), 3e38)
    assert sound([large, torch.tensor(3)]) and not sound([large, torch.tensor([1.0, float("nan")])])
    assert not sound([torch.tensor([float("inf"), float("-inf")])])
