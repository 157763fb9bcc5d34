"""What the policy reads, and what it is trained on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meal_fast.data.preferences import draw, lattice, preference_text

NAMES = ("helpful", "harmless", "humor")


@pytest.mark.parametrize(
    ("w", "text"),
    [
        ((0.8, 0.2), "[helpful=0.80 harmless=0.20] ++++++++--"),
        ((1.0, 0.0), "[helpful=1.00 harmless=0.00] ++++++++++"),
        ((0.0, 1.0), "[helpful=0.00 harmless=1.00] ----------"),
        ((0.55, 0.45), "[helpful=0.55 harmless=0.45] ++++++----"),
        ((0.3, 0.3, 0.4), "[helpful=0.30 harmless=0.30 humor=0.40] +++---****"),
    ],
)
def test_the_text_of_a_preference(w, text):
    assert preference_text(w, NAMES[: len(w)]) == text
    assert preference_text(w, NAMES[: len(w)], "numbers") == text.rpartition(" ")[0]
    assert preference_text(w, NAMES[: len(w)], "none") == ""


@given(st.lists(st.floats(0, 1), min_size=2, max_size=16).filter(lambda w: sum(w) > 0.1))
def test_a_bar_has_ten_marks_shared_out_within_one(values):
    w = [value / sum(values) for value in values]
    bar = preference_text(w, [f"n{i}" for i in range(len(w))]).split(" ")[-1]
    assert len(bar) == 10
    marks = "+-*#=~^%&@!?<>/|"
    for value, mark in zip(w, marks, strict=False):
        assert abs(bar.count(mark) - 10 * value) < 1 + 1e-6


def test_every_point_of_the_lattice_reads_differently():
    for k in (2, 3):
        bars = {preference_text(w, NAMES[:k]).split(" ")[-1] for w in lattice(k, 11)}
        assert len(bars) == len(lattice(k, 11))


@pytest.mark.parametrize("k", [2, 3])
def test_rotations_of_a_draw(k):
    drawn = draw(k, alpha=0.5, points=11, seed=3, step=7, count=2 * k, rotate=True)
    assert len(drawn) == 2 * k
    for start in (0, k):
        for shift in range(k):
            assert drawn[start + shift] == tuple(np.roll(drawn[start], shift))
        assert np.allclose(np.mean(drawn[start : start + k], axis=0), 1 / k)
    assert draw(k, alpha=0.5, points=11, seed=3, step=7, count=1, rotate=True) == drawn[:1]


def test_rotated_preferences_are_distributed_as_before():
    """The share of corners and the mean, over many draws of the second task alone."""
    steps = range(1500)

    def second(seed, rotate):
        draws = (
            draw(2, alpha=0.5, points=11, seed=seed, step=s, count=2, rotate=rotate) for s in steps
        )
        return np.array([drawn[1][0] for drawn in draws])

    a, b = second(0, False), second(1, True)
    assert abs(a.mean() - b.mean()) < 0.05
    assert abs((a == 1).mean() - (b == 1).mean()) < 0.05
