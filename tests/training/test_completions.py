"""completions.jsonl: every row of every update once, whatever happens to the process."""

import dataclasses
import json
import signal

import pytest
import torch

from meal_fast.config import from_dict, preset
from meal_fast.data.markers import MARKERS
from meal_fast.training.completions import at_ends
from meal_fast.training.loggers import markdown, table
from meal_fast.training.metrics import LinesFile
from meal_fast.training.trainer import Trainer
from tests.helpers.processes import SMALL, start, stopped, train_here, updates, wait_for_updates

NAMES = ("first", "second")


def small(**changes):
    values = {
        "meta": {"steps": 2},
        "rollout": {"samples": 4},
        "score": {"calibration": 4},
        "checkpoint_every": 1,
    }
    return from_dict(changes, from_dict(values, preset("tiny")))


def rows(run):
    return [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]


def test_every_response_is_kept_with_what_was_asked_and_what_it_got(tmp_path):
    config, told = small(evaluation={"marks": ["refuses", "complies"]}), []
    trainer = Trainer(config, tmp_path / "run", on_answers=told.extend)
    assert trainer.train()
    found, lines = rows(tmp_path / "run"), updates(tmp_path / "run")
    assert found == json.loads(json.dumps(told))
    assert len(found) == len(lines) * 2 * 4
    prompts = {prompt.id: prompt.text for prompt in trainer.prompts}
    for line in lines:
        own = [row for row in found if row["update"] == line["update"]]
        assert len(own) == 8 and {row["task"] for row in own} == {line["task"]}
        assert all(list(row["asked"].values()) == pytest.approx(line["w"]) for row in own)
        for name in NAMES:  # the rewards are of these very texts, recomputed and as logged
            mean = sum(row["rewards"][name] for row in own) / len(own)
            assert mean == pytest.approx(line["rewards"][name], abs=1e-6)
        assert sum(row["score"] for row in own) / 8 == pytest.approx(line["score"], abs=1e-6)
        assert sum(row["finish"] == "stop" for row in own) / 8 == pytest.approx(line["stopped"])
    again = trainer.objectives.rewards(
        [row["prompt"] for row in found], [row["response"] for row in found]
    )
    assert again.flatten().tolist() == pytest.approx(
        [value for row in found for value in row["rewards"].values()], abs=1e-6
    )
    for row in found:
        assert row["prompt"] == prompts[row["prompt_id"]]
        assert row["marks"] == {m: MARKERS[m](row["response"]) for m in ("refuses", "complies")}


@pytest.mark.parametrize(
    "changes",
    [
        {"meta": {"parallel": True}},
        {"preference": {"per_prompt": 2}},
        {"recipe": "weighted-grpo"},
        {"recipe": "meal"},
        {"recipe": "meal", "meal": {"rho": 1.0}},
        {"recipe": "mo-odpo"},
        {"recipe": "rewarded-soups"},
        {"recipe": "ric"},
        {"recipe": "parm", "policy": {"tuning": "bilinear"}},
    ],
    ids=lambda changes: "-".join(f"{key}" for key in changes) + str(changes.get("recipe", "")),
)
def test_every_recipe_leaves_its_rows(tmp_path, changes):
    config = small(**changes)
    trainer = Trainer(config, tmp_path / "run")
    assert trainer.train()
    found, lines = rows(tmp_path / "run"), updates(tmp_path / "run")
    assert {row["update"] for row in found} <= {line["update"] for line in lines} and found
    for row in found:
        assert list(row["asked"]) == list(row["rewards"]) == list(NAMES)
    if config.recipe == "meal":  # asked for, not relabelled: those are the net's or drawn ones
        for line in lines:
            own = [row["asked"]["first"] for row in found if row["update"] == line["update"]]
            assert not own or sum(own) / len(own) == pytest.approx(line["w"][0], abs=1e-5)
    if "per_prompt" in changes.get("preference", {}):
        asked = {round(row["asked"]["first"], 3) for row in found if row["update"] == 0}
        assert len(asked) == 2 and sum(asked) == pytest.approx(1.0)


def test_a_run_that_is_stopped_and_goes_on_keeps_each_row_once(tmp_path):
    config = small(meta={"steps": 3}, checkpoint_every=10)
    assert Trainer(config, tmp_path / "whole").train()
    run = tmp_path / "run"
    stopped(config, run)
    with open(run / "completions.jsonl", "a") as file:  # what a kill after the checkpoint leaves
        file.write(json.dumps(rows(run)[0]) + '\n{"update": 4, "respo')
    assert Trainer(config, run, resume=True).train()
    assert rows(run) == rows(tmp_path / "whole")


def test_a_killed_process_that_goes_on_keeps_each_row_once(tmp_path):
    run, whole = tmp_path / "run", tmp_path / "whole"
    argv = ["tiny", *SMALL, "--no-evaluate", "--checkpoint_every", "2"]
    process = start(*argv, "--out", str(run))
    wait_for_updates(process, run, 6)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert train_here("--resume", "--out", str(run), "--no-evaluate") == 0
    assert train_here(*argv, "--out", str(whole)) == 0
    assert rows(run) == rows(whole) and len(rows(run)) == 16 * 4


def test_turned_off_there_is_no_file_and_the_run_is_the_same(tmp_path):
    assert Trainer(small(), tmp_path / "on").train()
    assert Trainer(small(completions=False), tmp_path / "off").train()
    assert not (tmp_path / "off" / "completions.jsonl").exists()
    assert updates(tmp_path / "off") == updates(tmp_path / "on")


def test_turned_off_or_removed_between_two_starts(tmp_path):
    run = tmp_path / "run"
    config = small(meta={"steps": 3})
    stopped(config, run)
    kept = rows(run)
    off = dataclasses.replace(config, completions=False)
    trainer = Trainer(off, run, resume=True)
    trainer.on_update = lambda metrics: setattr(trainer, "stop_requested", True)
    assert not trainer.train()
    assert rows(run) == kept
    (run / "completions.jsonl").unlink()
    assert Trainer(config, run, resume=True).train()
    assert {row["update"] for row in rows(run)} == set(range(8, 12))


def test_lines_behind_those_that_are_kept_are_gone(tmp_path):
    path = tmp_path / "lines"
    file = LinesFile(path, 0)
    file.write(b"one")
    kept = file.sync()
    file.write(b"two")
    file.close()
    again = LinesFile(path, kept)
    again.write(b"three")
    again.close()
    assert path.read_bytes() == b"one\nthree\n"


def answer(first, rewards, marks, response="text"):
    return {
        "prompt_id": "a",
        "prompt": "Say.",
        "asked": {"first": first, "second": 1 - first},
        "rewards": dict(zip(NAMES, rewards, strict=True)),
        "response": response,
        "marks": marks,
        "finish": "stop",
    }


def test_the_ends_by_hand():
    found = at_ends(
        [
            answer(0.9, (1.0, -9.0), {"refuses": True}),
            answer(0.7, (3.0, -9.0), {"refuses": False}),
            answer(0.5, (50.0, 50.0), {"refuses": True}),
        ],
        NAMES,
    )
    assert found == {"first": {"rows": 2, "reward": 2.0, "spread": 1.0, "refuses": 0.5}}
    rows = [answer(0.9, (1.0, -9.0), {}) | {"prompt_id": name} for name in ("a", "b")]
    assert at_ends(rows, NAMES, {"a"})["first"]["rows"] == 1
    assert at_ends(rows, NAMES, {"a", "b"}) == {}


def test_answers_for_loggers_are_inert():
    hostile = "# head\n![x](http://a/b.png)\n</pre><script>1</script>\x1b[2J\n```"
    said = markdown([answer(0.9, (1.0, -2.0), {"refuses": True, "complies": False}, hostile)])
    head, *block = said.strip().splitlines()
    assert head == "**asked first 0.90, second 0.10** got first +1.00, second -2.00, refuses"
    assert all(line.startswith("    ") for line in block if line) and "\x1b" not in said
    columns, data = table([answer(0.9, (1.0, -2.0), {"refuses": True}, hostile)])
    assert len(columns) == len(data[0]) and data[0][columns.index("refuses")] is True
    assert "\x1b" not in data[0][columns.index("response")]
    assert dict(zip(columns, data[0], strict=True))["asked second"] == pytest.approx(0.1)


def test_half_a_surrogate_pair_does_not_end_a_run(tmp_path, monkeypatch):
    trainer = Trainer(small(meta={"steps": 1}), tmp_path / "run")
    decode = trainer.policy.decode
    monkeypatch.setattr(trainer.policy, "decode", lambda tokens: decode(tokens) + "\ud83d")
    assert trainer.train()
    assert all(row["response"].endswith("?") for row in rows(tmp_path / "run"))


def test_marks_of_the_ends_are_in_the_metrics(tmp_path):
    config = small(preference={"alpha": 0.05}, evaluation={"marks": ["refuses"]})
    assert Trainer(config, tmp_path / "run").train()
    ends = [line["ends"] for line in updates(tmp_path / "run") if "ends" in line]
    assert ends
    for end in ends:
        for values in end.values():
            assert set(values) == {"rows", "reward", "spread", "refuses"}
            assert torch.isfinite(torch.tensor(list(map(float, values.values())))).all()
