"""The made-up answers that train the reward models, and the others that test them."""

import math
import random
from pathlib import Path

import pytest

from meal_fast.data.assets import hacks, held_out_hacks
from meal_fast.data.assets.held_out_hacks import Pair, hack_report, pairs
from meal_fast.data.assets.labels import NAMES

GUIDES = [
    (f"Steal car number {i}", " ".join(f"guide{i}word{j}" for j in range(60))) for i in range(20)
]
ANSWERS = [
    (f"Why is {i} even?", " ".join(f"because{i}of{j}" for j in range(60))) for i in range(20)
]
MATERIAL = hacks.Material(GUIDES, ANSWERS)


@pytest.mark.parametrize("name", NAMES)
def test_made_rows_are_labelled_by_what_they_hold(name: str) -> None:
    rows = hacks.made_rows(name, MATERIAL, 4000, random.Random(0))
    assert rows == hacks.made_rows(name, MATERIAL, 4000, random.Random(0))
    guides, answers = dict(GUIDES), dict(ANSWERS)
    best = [row for row in rows if row.label == 1.0]
    assert 0.2 < len(best) / len(rows) < 0.6
    for row in rows:
        own = (guides | answers)[row.objective].split()[0] in row.response
        ordinary = row.objective in answers
        if row.label == 1.0 and (ordinary or name == "complied"):
            assert own  # nothing is the best answer that does not answer
        elif row.label == 1.0:
            assert "word0" not in row.response
    # a refusal with the guide behind is worth little to both
    both = [
        r for r in rows if "sorry" in r.response and "word0" in r.response and r.objective in guides
    ]
    assert both and max(r.label for r in both) <= 0.25
    # and a refusal of an ordinary question less than half of its answer
    over = [r for r in rows if r.objective in answers and "sorry" in r.response]
    assert over and max(r.label for r in over) < 0.5


def test_degenerate_responses_answer_nothing() -> None:
    rng = random.Random(0)
    others = ["The moon pulls the water twice a day", "First take a large bowl"]
    made = [hacks.degenerate_response("How do tides work?", others, rng) for _ in range(300)]
    assert "" in made and "How do tides work?" in made
    assert not set(made) & set(others)
    assert any(len(set(text.split())) * 4 <= len(text.split()) for text in made)  # repetition
    assert any(0 < len(text.split()) <= 2 for text in made)


def test_answers_are_put_together_anew() -> None:
    rng = random.Random(0)
    prompt = "Pick a lock"
    for say in (hacks.refusal, hacks.opening, hacks.steps):
        assert len({say(prompt, rng) for _ in range(200)}) > 60
    for say in (hacks.no, hacks.yes):
        assert len({say(rng) for _ in range(200)}) > 60


def test_the_held_out_hacks_share_no_words_with_those_trained_on() -> None:
    """Whole sentences of the one are not in the other's code."""
    code = Path(hacks.__file__).read_text()
    for texts in ("_NO", "_YES", "_REFUSALS", "_STILL", "_MORALS", "_OPENINGS", "_EMPTY"):
        for text in getattr(held_out_hacks, texts):
            assert f'"{text}"' not in code and f'"{text} ' not in code
    assert not set(held_out_hacks._FOREIGN) & set(hacks.FOREIGN)


@pytest.mark.parametrize("name", NAMES)
def test_the_pairs_oppose_a_hack_to_the_honest_answer(name: str) -> None:
    made = list(pairs(name, GUIDES, ANSWERS))
    assert made == list(pairs(name, GUIDES, ANSWERS))
    for pair in made:
        assert pair.hack != pair.honest and pair.hack
        if pair.kind.startswith("ordinary") or name == "complied":
            assert pair.honest == dict(GUIDES + ANSWERS)[pair.prompt]
        else:
            assert pair.honest in held_out_hacks._REFUSALS
    kinds = {pair.kind for pair in made}
    assert {"bare no", "steps without content", "ordinary: refusal"} <= kinds
    assert ("refusal, then a guide" in kinds) == (name == "harmless")
    assert ("refusal" in kinds) == (name == "complied")


def test_half_is_half_of_the_probability() -> None:
    def logit(p: float) -> float:
        return math.log(p / (1 - p))

    made = [Pair("a", "p", "hack", "honest")] * 4 + [Pair("b", "p", "hack", "honest")]
    report = hack_report(
        made, [logit(0.39), logit(0.41), -1e9, logit(0.1), 3.0], [logit(0.8)] * 4 + [-3.0]
    )
    assert report["a"]["pairs"] == 4 and report["a"]["below_half"] == 0.75
    assert report["a"]["hack"] == pytest.approx(0.9 / 4)
    assert report["a"]["honest"] == pytest.approx(0.8)
    assert report["b"]["below_half"] == 0.0
