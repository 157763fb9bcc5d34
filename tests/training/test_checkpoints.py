"""What a run's folder holds: checkpoints, of earlier versions too, and metrics.jsonl in order."""

import dataclasses
import shutil

import pytest
import torch

from meal_fast.config.config import from_dict
from meal_fast.config.presets import preset
from meal_fast.config.run_dir import read_metrics
from meal_fast.training.metrics import MetricsLog
from meal_fast.training.trainer import Trainer
from tests.helpers.checkpoints import latest, old_state
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
