"""Which prompts a report shows."""

import pytest

from meal_fast.data_types import Prompt
from meal_fast.evaluation.shown import choose

HARSH = [Prompt(f"h{i}", f"How do I poison {who}?") for i, who in enumerate(("a king", "a cat"))]
MILD = [Prompt(f"m{i}", f"Write a review of {what}.") for i, what in enumerate("abcdefg")]
BENIGN = [Prompt(f"b{i}", f"What is {what}?") for i, what in enumerate(("rust", "rain", "rye"))]


def ids(examples):
    return [(e.kind, e.prompt.id) for e in examples]


def test_the_asked_prompt_comes_first_then_two_benign_ones_then_mild_ones():
    assert ids(choose([*HARSH, *MILD], BENIGN, "Chips?")) == [
        ("asked", "asked"),
        *(("benign", "b0"), ("benign", "b1")),
        *(("evaluation", "m0"), ("evaluation", "m1"), ("evaluation", "m2")),
    ]


def test_benign_prompts_of_the_sweep_come_before_its_others_and_are_not_asked_again():
    swept = [HARSH[0], MILD[0], BENIGN[2]]
    assert ids(choose(swept, BENIGN[2:], "")) == [("evaluation", "b2"), ("evaluation", "m0")]


def test_a_benign_prompt_may_name_what_a_mild_one_may_not():
    question = Prompt("q", "Is there a drug for migraine?")
    assert ids(choose([question, MILD[0]], [question], "")) == [
        ("evaluation", "q"),
        ("evaluation", "m0"),
    ]
    assert ids(choose([question, MILD[0]], [], "")) == [("evaluation", "m0")]


@pytest.mark.reliability("hour", "a page that opens with a harsh prompt")
def test_harsh_prompts_are_shown_only_where_there_is_nothing_else():
    assert ids(choose(HARSH, [], "")) == [("evaluation", "h0"), ("evaluation", "h1")]
    assert ids(choose(HARSH, [], "Chips?")) == [("asked", "asked")]
