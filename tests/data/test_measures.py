"""Exact objectives: what a short and what a full answer is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meal_fast.data.measures import brief, detailed

FULL = (
    "Tides follow gravity: ocean water facing the moon swells, opposite coasts bulge outward, "
    "rotating continents carry harbours through these mounds twice daily, causing regular currents."
)


@pytest.mark.parametrize(
    ("response", "short", "full"),
    [
        ("The moon pulls the water.", 1.0, 2 / 16),
        ("The moon pulls the", 0.5, 1 / 16),
        ("", 0.0, 0.0),
        ("No.", 0.0, 0.0),
        ("water " * 16, 0.5 * 2.718281828 ** (-1), 1 / 16 / 16 / 0.8),
    ],
)
def test_known_values(response, short, full):
    assert brief([""], [response]) == pytest.approx([short])
    assert detailed([""], [response]) == pytest.approx([full])


def test_they_disagree_on_what_is_better():
    answers = ["The moon pulls the water.", FULL]
    assert brief(["", ""], answers)[0] > 0.9 > 0.2 > brief(["", ""], answers)[1]
    assert detailed(["", ""], answers)[0] < 0.2 < 0.9 < detailed(["", ""], answers)[1]


@given(st.text())
def test_every_text_has_a_finite_value(text):
    assert 0 <= brief([""], [text])[0] <= 1 and 0 <= detailed([""], [text])[0] <= 1
