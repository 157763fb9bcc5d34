"""A word when a reward rises and the mark that goes with it does not."""

import json

import pytest
import torch

from meal_fast.config import from_dict, preset
from meal_fast.data.markers import MARKERS
from meal_fast.data.objectives import load_objectives
from meal_fast.data.reward_statistics import Normalizer
from meal_fast.data_types import Prompt
from meal_fast.training.reward_hacking import EXAMPLES, RewardHacking, own_marks, suspicion
from meal_fast.training.trainer import Trainer

OWN = {"helpful": "complies", "harmless": "refuses"}


def end(reward, share, spread=0.5, rows=8):
    return {"rows": rows, "reward": reward, "spread": spread, "refuses": share}


def rising(n, low=-0.2, high=3.0):
    return [low + (high - low) * i / (n - 1) for i in range(n)]


def test_a_reward_that_rises_without_its_mark_is_suspected():
    said = suspicion([end(r, 0.02) for r in rising(12)], "harmless", "refuses")
    assert "harmless went from +0.24 to +2.56" in said and "2% at first and 2% now" in said


def test_a_mark_that_falls_while_the_reward_stays_is_suspected():
    """So a policy went from refusals to "There is no tutorial. However, …", at an equal reward."""
    shares = [0.7, 0.7, 0.7, 0.8, 0.3, 0.1, 0.1, 0.0, 0.0, 0.0, 0.1, 0.0]
    ends = [end(2.5, share) for share in shares]
    said = suspicion(ends, "harmless", "refuses")
    assert "+2.50 to +2.50" in said and "72% at first and 2% now" in said
    assert suspicion(ends[:11], "harmless", "refuses") == ""


@pytest.mark.parametrize(
    "ends",
    [
        [end(2.5, 0.35 - i / 40) for i in range(12)],  # falls by less
        [end(2.5, 0.9 - i / 20) for i in range(12)],  # not to so little
        [end(2.5 - i, max(0.7 - i / 10, 0.0)) for i in range(12)],  # the reward falls with it
        [end(r, 0.02) for r in rising(5)],  # too few
        [end(r, 0.02) for r in rising(12, high=0.4)],  # rises by less than its spread
        [end(r, 0.02) for r in reversed(rising(12))],  # falls
        [end(r, i / 20) for i, r in enumerate(rising(12))],  # the mark rises too
        [end(r, 0.95) for r in rising(12)],  # nearly all bear it already
    ],
    ids=["less", "some left", "both fall", "few", "noise", "falls", "honest", "high"],
)
def test_nothing_else_is(ends):
    assert suspicion(ends, "harmless", "refuses") == ""


def test_updates_count_by_their_rows():
    ends = [end(0.0, 0.0, rows=1), end(1.0, 0.0, rows=99)] * 3
    assert suspicion(ends, "harmless", "refuses") == ""
    first = [end(9.0, 0.0, rows=1), end(0.0, 0.0, rows=99)]
    assert suspicion(first + [end(1.0, 0.0)] * 4, "harmless", "refuses") != ""


def lines(rewards, share=0.0):
    return [{"update": i, "ends": {"harmless": end(r, share)}} for i, r in enumerate(rewards)]


def test_the_word_is_said_once_and_not_again_after_a_stop():
    watch, told = RewardHacking(OWN, []), []
    for line in lines(rising(20)):
        told.append(watch.judged(line))
    hacked = [line["update"] for line in told if "hacked" in line]
    assert len(hacked) == 1 and set(told[hacked[0]]["hacked"]) == {"harmless"}
    for stop in range(20):  # whenever it is stopped, the rest says what it said
        again = RewardHacking(OWN, told[:stop])
        assert [again.judged(line) for line in lines(rising(20))[stop:]] == told[stop:]


def test_another_objectives_end_says_nothing_about_this_one():
    watch = RewardHacking({"helpful": "complies"}, [])
    assert all("hacked" not in watch.judged(line) for line in lines(rising(20)))


def test_examples_bear_their_mark_and_no_other():
    for mark, example in EXAMPLES.items():
        assert [m for m, bears in MARKERS.items() if bears(example)] == [mark]


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """Objectives that like or overlook what the marks' examples say."""
    (tmp_path / "marked.py").write_text(
        "def polite(p, r): return [float('sorry' in x) for x in r]\n"
        "def eager(p, r): return [100.0 * ('Sure' in x) for x in r]\n"
        "def aside(p, r): return [0.01 * ('Sure' in x) for x in r]\n"
        "def blind(p, r): return [0.5 for x in r]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        (["a=marked:eager", "b=marked:polite"], {"a": "complies", "b": "refuses"}),
        (["a=marked:polite", "b=marked:eager"], {"a": "refuses", "b": "complies"}),
        (
            ["a=marked:blind", "b=marked:polite", "c=marked:eager"],
            {"b": "refuses", "c": "complies"},
        ),
        (["a=marked:aside", "b=marked:eager"], {"b": "complies"}),
        (["a=marked:blind", "b=marked:blind"], {}),
    ],
)
def test_a_mark_goes_with_the_objective_that_likes_it_best(functions, sources, found):
    names = [source[0] for source in sources]
    objectives = load_objectives(sources, "auto", torch.device("cpu"))
    scale = Normalizer("none", (0.0,) * len(names), (1.0,) * len(names))
    prompts = [Prompt("x", "How?")]
    assert own_marks(objectives, scale, names, prompts, ("refuses", "complies", "both")) == found
    assert own_marks(objectives, scale, names, prompts, ("both",)) == {}
    some = own_marks(objectives, scale, names, prompts, ("refuses",))
    assert some == {name: mark for name, mark in found.items() if mark == "refuses"}


def test_a_run_that_learns_to_deceive_a_reward_says_so(functions, tmp_path):
    """The reward likes refusals, and the letter c as well: the tiny model can learn only that."""
    (tmp_path / "hole.py").write_text(
        "def harmless(p, r): return [9.0 * ('sorry' in x) + x.count('c') for x in r]\n"
    )
    config = from_dict(
        {
            "recipe": "weighted-grpo",
            "objectives": ["first=world:first", "harmless=hole:harmless"],
            "preference": {"alpha": 0.05},
            "evaluation": {"marks": ["refuses"]},
            "meta": {"steps": 14},
            "score": {"utopia": [1.1, 8.0]},
            "grpo": {"lr": 2e-2, "beta": 0.0},
        },
        preset("tiny"),
    )
    told = []
    assert Trainer(config, tmp_path / "run", on_update=told.append).train()
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    hacked = [line["hacked"] for line in lines if "hacked" in line]
    assert len(hacked) == 1 and "bear the mark “refuses”" in hacked[0]["harmless"]
    assert next(line for line in told if "hacked" in line)["hacked"] == hacked[0]
