"""Objectives are somebody's code: what they may do, return and be called, and what is said."""

import sys
import threading
import time
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
import torch

from meal_fast.data import objective_calls
from meal_fast.data.objectives import ObjectiveError, Objectives, load_objectives

PROMPTS, RESPONSES = ["p", "q", "r"], ["Aa", "B", ""]


def length(prompts, responses):
    return [float(len(r)) for r in responses]


def column(objective, **options) -> list[float]:
    return (
        Objectives({"a": objective, "b": length}, **options)
        .rewards(PROMPTS, RESPONSES)[:, 0]
        .tolist()
    )


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a module of objectives where it can be imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names = []

    def write(name: str, text: str) -> Path:
        names.append(name)
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        sys.modules.pop(name, None)
        return path

    yield write
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.reliability("silent", "an objective that changes the lists that it is given")
def test_what_an_objective_does_to_its_lists_nobody_sees() -> None:
    def lowers(prompts, responses):
        for i, response in enumerate(responses):
            responses[i] = response.lower()
        prompts.clear()
        return [1.0] * len(responses)

    def capitals(prompts, responses):
        assert prompts == PROMPTS
        return [float(sum(c.isupper() for c in r)) for r in responses]

    prompts, responses = list(PROMPTS), list(RESPONSES)
    got = Objectives({"a": lowers, "b": capitals}).rewards(prompts, responses)
    assert got.tolist() == [[1, 1], [1, 1], [1, 0]]
    assert (prompts, responses) == (PROMPTS, RESPONSES)
    given: list[object] = []  # a tuple goes in as a list too: what it returns must not depend on it
    objectives = Objectives({"a": lambda p, r: given.append(type(r)) or [0.0] * 3, "b": length})
    objectives.rewards(tuple(PROMPTS), tuple(RESPONSES))
    assert given == [list]


@pytest.mark.parametrize(
    "returned",
    [
        [2, 1.0, True],
        (2, 1, 1),
        np.array([2, 1, 1], dtype=np.int64),
        np.array([2.0, 1.0, 1.0]),
        [np.float32(2), np.int8(1), np.bool_(True)],
        [Decimal(2), torch.tensor(1), torch.tensor(1.0, requires_grad=True)],
        torch.tensor([2, 1, 1]),
        torch.tensor([2.0, 1.0, 1.0], dtype=torch.bfloat16, requires_grad=True),
    ],
    ids=str,
)
def test_numbers_of_every_kind_are_taken(returned) -> None:
    assert column(lambda p, r: returned) == [2.0, 1.0, 1.0]


def test_a_generator_is_taken() -> None:
    def numbers(prompts, responses):
        yield from (float(len(r)) for r in responses)

    assert column(numbers) == [2, 1, 0]


async def awaited(prompts, responses):
    return [0.0] * len(responses)


@pytest.mark.reliability("message", "wrong things that an objective returns: texts, dicts, tables")
@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("good", "returned a str; a list of 3 numbers is needed"),
        ({"rewards": [1, 2, 3]}, "returned a dict; a list of 3 numbers"),
        ({0.5, 1.0, 2.0}, "returned a set; a list of 3 numbers"),
        (0.5, "returned a float; a list of 3 numbers"),
        (None, "returned a NoneType; a list of 3 numbers"),
        ([1.0, 2.0], r"returned shape \(2,\) for 3 responses"),
        ([[1.0], [2.0], [3.0]], r"returned shape \(3, 1\) for 3"),
        (np.ones((3, 2)), r"returned shape \(3, 2\) for 3"),
        (torch.ones(1, 3), r"returned shape \(1, 3\) for 3"),
        ([1.0, "0.5", 2.0], r"returned '0\.5' \(a str\) for row 1, the response 'B'; a number"),
        ([1.0, 2.0, {"score": 1}], r".*\(a dict\) for row 2, the response ''"),
        ([1.0, 1j, 2.0], r".*\(a complex\) for row 1"),
        ([1.0, float("nan"), 2.0], "returned nan for row 1, the response 'B'"),
        ([1.0, 10**400, 2.0], "returned inf for row 1"),
        ([1e39, 0, 2.0], "returned inf for row 0"),
        (torch.tensor([0.0, torch.inf, 0.0]), "returned inf for row 1"),
    ],
    ids=str,
)
def test_what_is_no_column_of_numbers_is_named(returned, message: str) -> None:
    with pytest.raises(ObjectiveError, match=f"objective 'a' {message}") as error:
        column(lambda p, r: returned)
    assert "\n" not in str(error.value)


@pytest.mark.reliability("message", "an objective that is async, exits, or fails for one row")
def test_what_an_objective_raises_is_named_with_its_row() -> None:
    with pytest.raises(ObjectiveError, match="'a' is an async function"):
        column(awaited)

    def leaves(prompts, responses):
        if "B" in responses:
            sys.exit("enough")
        return [0.0] * len(responses)

    for seconds in (0.0, 20.0):
        said = r"'a' raised SystemExit: enough \(row 1, the response 'B'\)"
        with pytest.raises(ObjectiveError, match=said):
            column(leaves, limits={"a": seconds})


@pytest.mark.reliability("lost", "an objective that hangs: told within its time, and by its name")
def test_an_objective_that_hangs_is_late() -> None:
    hold = threading.Event()

    def hangs(prompts, responses):
        hold.wait(60)
        return [0.0] * len(responses)

    started = time.monotonic()
    said = r"'a' has not come back within 0\.3 seconds for 3 .* raise objectives_timeout"
    with pytest.raises(ObjectiveError, match=said):
        column(hangs, limits={"a": 0.3})
    assert time.monotonic() - started < 5
    hold.set()

    def slow(prompts, responses):  # more rows, more time
        time.sleep(0.4)
        return [0.0] * len(responses)

    many = ["x"] * (objective_calls.ROWS + 1)
    objectives = Objectives({"a": slow, "b": length}, limits={"a": 0.3})
    assert objectives.rewards(many, many).shape == (len(many), 2)


def test_a_call_in_its_own_thread_is_the_same_call() -> None:
    seen = []

    def looks(prompts, responses):
        seen.append((threading.current_thread().daemon, torch.is_grad_enabled()))
        return length(prompts, responses)

    with torch.no_grad():
        assert column(looks, limits={"a": 10.0}) == column(looks)
    assert seen == [(True, False), (False, False)]


@pytest.mark.reliability("lost", "a run that is stopped while an objective hangs")
def test_a_stop_ends_the_wait_for_an_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective_calls, "GRACE", 0.2)
    hold = threading.Event()
    objectives = Objectives(
        {"a": lambda p, r: hold.wait(60) and [0.0] * 3, "b": length}, limits={"a": 60.0}
    )
    objectives.stopping = lambda: True
    with pytest.raises(KeyboardInterrupt, match="'a' did not come back"):
        objectives.rewards(PROMPTS, RESPONSES)
    hold.set()
    assert objectives.rewards(PROMPTS, RESPONSES)[:, 1].tolist() == [2, 1, 0]  # done in time


@pytest.mark.reliability(
    "message", "an objective's module that has a syntax error, raises or exits"
)
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(prompts, responses)\n", r"SyntaxError: expected ':', .*broken_one\.py, line 1"),
        ("\nraise RuntimeError('no key\\nset')\n", r"RuntimeError: no key set, .*\.py, line 2"),
        ("import sys\nsys.exit(3)\n", r"SystemExit: 3, .*\.py, line 2"),
        ("x = {}['a']\n", "KeyError: 'a'"),
        ("import no_such_thing_x\n", "No module named 'no_such_thing_x'.; install what it needs"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line(module, text: str, message: str) -> None:
    module("broken_one", text)
    with pytest.raises(ValueError, match=rf"'b': 'broken_one:f' cannot .*{message}") as error:
        load_objectives(["a=world:first", "b=broken_one:f"])
    assert "\n" not in str(error.value)


FUNCTIONS = """
class Judge:
    def own(self, prompts, responses): return [0.0] * len(responses)
    @staticmethod
    def free(prompts, responses): return [3.0] * len(responses)
    class Inner:
        @classmethod
        def of(cls, prompts, responses): return [4.0] * len(responses)
judge = Judge()
def one(text): return 0.0
async def later(prompts, responses): return []
def more(prompts, responses, scale=2.0): return [scale] * len(responses)
Brevity = 3
"""


@pytest.mark.reliability(
    "message", "names of functions that are none: files, dots, classes, methods"
)
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "./mine.py:f",
            r"'\./mine\.py:f' names a file; .* PYTHONPATH=\. meal-fast \.\.\. b=mine:f",
        ),
        ("/a/mine.py:f", "names a file; .* PYTHONPATH=/a meal-fast .* b=mine:f"),
        ("mine.py:f", r"names a file; .* PYTHONPATH=\. meal-fast .* b=mine:f"),
        ("mine.py", "names a file; name a module and a function"),
        ("some_judges.more", "is no source; did you mean some_judges:more"),
        ("some_judges:more()", "is no source; a Python function is module:function"),
        ("some_judges:", "is no source; a Python function is module:function"),
        ("no_such_module_x:f", "cannot be imported .*PYTHONPATH=. meal-fast"),
        ("some_judges:brevity", "has no brevity; did you mean Brevity"),
        ("some_judges:Judge.no", r"some_judges has no Judge\.no"),
        ("some_judges:Judge", r"is a class; name a method .* some_judges:Judge\.METHOD"),
        ("some_judges:Judge.own", r"takes \(self, prompts, responses\); an objective is called"),
        ("some_judges:one", r"takes \(text\); an objective is called with \(prompts, responses\)"),
        ("some_judges:later", "is an async function; give a plain one"),
        ("some_judges:Brevity", "is not a function but a int"),
    ],
)
def test_what_was_meant_by_a_name_is_said(module, source: str, message: str) -> None:
    module("some_judges", FUNCTIONS)
    with pytest.raises(ValueError, match=f"objective 'b': .*{message}") as error:
        load_objectives(["a=world:first", f"b={source}"])
    assert "\n" not in str(error.value)


def test_methods_and_defaults_are_functions_too(module) -> None:
    module("some_judges", FUNCTIONS)
    names = ("judge.own", "Judge.free", "Judge.Inner.of", "more")
    sources = [f"n{i}=some_judges:{name}" for i, name in enumerate(names)]
    assert load_objectives(sources).rewards(["p"], ["r"]).tolist() == [[0, 3, 4, 2]]


@pytest.mark.reliability("message", "an objective's name that would break the preference's text")
@pytest.mark.parametrize(
    "name", ["a]", "[a", "a b", "a\n", "a\x1b[2J", "0a", "x" * 41, "a.b", "<|im_end|>", " a", "a%"]
)
def test_a_name_is_a_plain_word(name: str) -> None:
    with pytest.raises(ValueError, match=r"names are plain words .* 40 characters") as error:
        load_objectives([f"{name}=world:first", "b=world:second"])
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)


@pytest.mark.reliability("silent", "an objective that applies to some rows alone")
def test_none_is_a_reward_that_is_missing_and_nan_is_a_fault() -> None:
    objectives = Objectives({"a": lambda p, r: [None, 2, 0.5], "b": length})
    assert not objectives.partial
    got = objectives.rewards(PROMPTS, RESPONSES)
    assert got.isnan().tolist() == [[True, False], [False, False], [False, False]]
    assert got[:, 1].tolist() == [2, 1, 0] and got[1:, 0].tolist() == [2, 0.5]
    assert objectives.partial


@pytest.mark.reliability("message", "a row to which no objective applies")
def test_a_row_without_any_reward_is_refused() -> None:
    objectives = Objectives({"a": lambda p, r: [None, 2, None], "b": lambda p, r: [None, None, 1]})
    said = "every objective returned None for row 0, the response 'Aa' to 'p'"
    with pytest.raises(ObjectiveError, match=said):
        objectives.rewards(PROMPTS, RESPONSES)


@pytest.mark.reliability("message", "a None, under a recipe that needs every reward")
def test_a_none_is_refused_where_every_reward_is_needed() -> None:
    scorers = {"a": lambda p, r: [None, 2, None], "b": length}
    with pytest.raises(ObjectiveError, match=r"'a' returned None for row 0, .* recipe ric needs"):
        Objectives(scorers, needs_all="recipe ric").rewards(PROMPTS, RESPONSES)
