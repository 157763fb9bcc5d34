"""What goes to loggers: every update's numbers, and some of the answers as text."""

import json

import pytest

from meal_fast.training.loggers import ANSWERS, ANSWERS_EVERY, Loggers
from tests.helpers.processes import train_here, updates


def row(update, response="text"):
    return {
        "update": update,
        "task": 0,
        "prompt": "Say.",
        "asked": {"first": 0.9, "second": 0.1},
        "response": response,
        "rewards": {"first": 1.0, "second": -1.0},
        "score": 0.5,
        "marks": {"refuses": True},
        "finish": "stop",
    }


def feed(loggers, count=2 * ANSWERS_EVERY + 1):
    """An update's answers come before its metrics, and of tasks at once before earlier metrics."""
    for update in range(count):
        loggers.answers([row(update, f"{update}-{i}\x1b[2J") for i in range(20)])
    for update in range(count):
        loggers.update({"update": update, "w": [0.9, 0.1], "kl": update / 10, "hacked": {"a": "!"}})
    loggers.close()


def test_tensorboard_has_some_answers_of_some_updates_as_text(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    argv = ["tiny", "--out", str(run), "--no-evaluate", "--logger", "tensorboard"]
    assert train_here(*argv, "--meta.steps", "2") == 0
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    texts = events.Tensors("completions/text_summary")
    assert [event.step for event in texts] == [0, ANSWERS_EVERY]
    kept = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    for event in texts:
        (text,) = event.tensor_proto.string_val
        blocks = text.decode().split("\n---\n")
        own = [r for r in kept if r["update"] == event.step]
        assert len(blocks) == ANSWERS and len(own) > ANSWERS
        assert len({block.strip().splitlines()[2] for block in blocks}) == 2  # of both prompts
        for block in blocks:
            assert any(f"    {r['prompt']}" in block for r in own)
    assert len(events.Scalars("kl")) == len(updates(run))


def test_wandb_takes_tables_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    feed(Loggers("wandb", tmp_path, {"seed": 0}))
    tables = list(tmp_path.rglob("completions_*.table.json"))
    assert len(tables) == 3
    for table in tables:
        held = json.loads(table.read_text())
        assert len(held["data"]) == ANSWERS and "response" in held["columns"]


def test_trackio_takes_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))  # read when it is imported
    pytest.importorskip("trackio")
    feed(Loggers("trackio", tmp_path, {"seed": 0}))
    assert list((tmp_path / "kept").glob("*.db"))


def test_without_a_logger_nothing_is_kept(tmp_path):
    loggers = Loggers("none", tmp_path, {})
    feed(loggers)
    assert not loggers._rows and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_what_they_are_called_with(tmp_path, monkeypatch, kind):
    """Both have the same few functions; here their calls are written down."""
    import sys
    import types

    said = []
    module = types.ModuleType(kind)
    run = types.SimpleNamespace(
        log=lambda values, step: said.append((step, values)),
        finish=lambda: said.append(("finish", None)),
    )
    module.init = lambda **how: said.append(("init", how["project"])) or run
    module.Table = lambda columns, data: (columns, data)
    monkeypatch.setitem(sys.modules, kind, module)
    feed(Loggers(kind, tmp_path, {}))
    assert said[0] == ("init", "meal-fast") and said[-1] == ("finish", None)
    steps = [step for step, _ in said[1:-1]]
    assert steps == list(range(11))  # in order: what comes late is dropped
    assert {s for s, values in said[1:-1] if "completions" in values} == {0, 5, 10}
    columns, data = said[1][1]["completions"]
    response = data[0][columns.index("response")]
    assert len(data) == ANSWERS and response == "0-0\ufffd[2J"
    assert said[3][1]["kl"] == pytest.approx(0.2) and "hacked.a" not in said[3][1]
