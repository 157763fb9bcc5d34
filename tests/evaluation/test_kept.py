"""An evaluation that is broken off goes on where it was; a run that is not finished says so."""

import json
import shutil

import pytest
import torch

from meal_fast import chat, evaluate, export
from meal_fast.config.config import from_dict
from meal_fast.config.presets import preset
from meal_fast.evaluation import evaluator
from meal_fast.evaluation.kept import FOLDER
from meal_fast.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {
    "meta": {"steps": 3, "tasks": 1},
    "rollout": {"prompts": 1, "samples": 4},
    "score": {"calibration": 4},
    "warmup": {"steps": 2, "draws": 8},
    "evaluation": {"prompts": 3, "grid": 3, "ask": "Why?", "benign": "world:tiny",
                   "marks": ["refuses"]},
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run, evaluated in one go, and one that stopped after a third of its updates."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    config = from_dict(OPTIONS, preset("tiny"))
    assert Trainer(config, folder / "whole").train()
    evaluate.main([str(folder / "whole"), "--no-report"])
    trainer = Trainer(config, folder / "third")
    trainer.on_update = lambda metrics: setattr(trainer, "stop_requested", True)
    assert not trainer.train()
    return folder


def timeless(run):
    """evaluation.json without what a clock measured."""

    def without(value):
        if isinstance(value, dict):
            return {k: without(v) for k, v in value.items() if "second" not in k or k == "second"}
        return [without(v) for v in value] if isinstance(value, list) else value

    return without(json.loads((run / "evaluation.json").read_text()))


@pytest.fixture
def run(runs, tmp_path):
    shutil.copytree(runs / "whole", tmp_path / "run")
    (tmp_path / "run" / "evaluation.json").unlink()
    return tmp_path / "run"


def broken_off(monkeypatch, run, after):
    """Evaluate until so many of its nine parts are answered."""
    calls, real = [0], evaluator.answers

    def answers(*args, **options):
        calls[0] += 1
        if calls[0] > after:
            raise KeyboardInterrupt
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "answers", answers)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            evaluate.main([str(run), "--no-report"])
    return calls[0]


def counted(monkeypatch, *argv):
    """Evaluate to the end; how many parts were answered anew."""
    calls, real = [0], evaluator.answers
    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "answers", lambda *a, **k: (calls.append(1), real(*a, **k))[1])
        evaluate.main([*map(str, argv), "--no-report"])
    return len(calls) - 1


@pytest.mark.reliability("lost", "an evaluation broken off after each of its parts")
@pytest.mark.parametrize("after", [0, 1, 4, 8])
def test_it_goes_on_where_it_was(runs, run, monkeypatch, after):
    broken_off(monkeypatch, run, after)
    assert not (run / "evaluation.json").exists()
    assert len(list((run / FOLDER).glob("*"))) == after if after else not (run / FOLDER).exists()
    assert counted(monkeypatch, run) == 9 - after
    assert timeless(run) == timeless(runs / "whole")
    assert not (run / FOLDER).exists()


@pytest.mark.reliability("silent", "parts of a broken evaluation that are damaged or of another")
def test_what_is_damaged_or_of_something_else_is_answered_anew(runs, run, monkeypatch):
    broken_off(monkeypatch, run, 4)
    cut, empty, changed, _ = sorted((run / FOLDER).iterdir())
    cut.write_bytes(cut.read_bytes()[:-9])
    empty.write_bytes(b"")
    values = json.loads(changed.read_text())
    next(iter(values["sweeps"].values()))["rows"][0][0] = "another text"
    changed.write_text(json.dumps(values))
    kept = {p: p.read_bytes() for p in (run / FOLDER).iterdir()}
    assert counted(monkeypatch, run) == 8
    assert timeless(run) == timeless(runs / "whole")
    for options in (["--seed", "5"], ["--grid", "5"], ["--samples", "7"]):
        (run / FOLDER).mkdir(exist_ok=True)
        for path, content in kept.items():
            path.write_bytes(content)
        assert counted(monkeypatch, run, *options) == 9


def test_into_another_folder_it_keeps_there(runs, run, tmp_path, monkeypatch):
    assert counted(monkeypatch, run, "--out", tmp_path / "other") == 9
    assert not (run / FOLDER).exists() and not (tmp_path / "other" / FOLDER).exists()
    assert timeless(tmp_path / "other") == timeless(runs / "whole")


@pytest.mark.reliability("silent", "a run stopped at a third is asked, measured and exported")
def test_a_run_that_is_not_finished_says_so(runs, tmp_path, capsys):
    run = tmp_path / "third"
    shutil.copytree(runs / "third", run)
    line = f"{run} is not finished (stopped at 33 % of its updates); go on with `python -m "
    chat.main([str(run), "--prompt", "Write a note."])
    assert line in capsys.readouterr().err
    evaluate.main([str(run)])
    out, err = capsys.readouterr()
    assert line in err and "The run is not finished: it stopped at 33 % of its updates." in out
    report = (run / "report.html").read_text()
    assert "it stopped at 33 % of its updates" in report
    export.main([str(run)])
    assert line in capsys.readouterr().err
    card = (run / "export" / "third" / "README.md").read_text()
    assert "stopped at 33 % of its updates" in card
    chat.main([str(runs / "whole"), "--prompt", "Write a note."])
    assert "not finished" not in capsys.readouterr().err
