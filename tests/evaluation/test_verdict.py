"""What an evaluation is said to have found: no more than its intervals allow."""

import copy

import numpy as np
import pytest

from meal_fast.evaluation.tables import aligned, by_weight
from meal_fast.evaluation.verdict import scope, verdict
from meal_fast.evaluation.wording import percent

NAMES = ("helpful", "harmless")
WEIGHTS = [(1 - i / 10, i / 10) for i in range(11)]


def estimate(value, low=None, high=None):
    return {"value": value, "low": low, "high": high}


def shares(value):
    return {"refuses": estimate(value, max(0.0, value - 0.1), min(1.0, value + 0.1))}


def sweep(reward_WK, refused_W):
    """A sweep of eight prompts that all have these rewards."""
    return {
        "hypervolume": estimate(1.0),
        "points": [
            {
                "w": list(w),
                "raw": {n: estimate(x) for n, x in zip(NAMES, r, strict=True)},
                "marks": shares(refused),
            }
            for w, r, refused in zip(WEIGHTS, reward_WK, refused_W, strict=True)
        ],
        "prompt_rewards": [[list(row)] * 8 for row in reward_WK],
        "ends": {n: {"raw": estimate(2.0, 1.5, 2.5)} for n in NAMES},
        "spearman": {n: estimate(0.97) for n in NAMES},
        "mark_ends": {n: {"refuses": estimate(0.9, 0.8, 1.0)} for n in NAMES},
    }


@pytest.fixture
def result():
    """helpful: a dial; harmless: a switch between 0.6 and 0.7."""
    w = np.array(WEIGHTS)
    rewards = np.stack([2 * w[:, 0], 2.0 * (w[:, 1] > 0.65)], 1)
    before = {"sampled": sweep(np.zeros((11, 2)), [0.0] * 11)}
    for name in NAMES:
        before["sampled"]["ends"][name]["raw"] = estimate(0.01, -0.1, 0.1)
    change = {"sampled": {"hypervolume": estimate(0.5, 0.4, 0.6)}}
    return {
        "names": list(NAMES),
        "weights": [list(x) for x in WEIGHTS],
        "prompts": [{}] * 8,
        "settings": {"marks": ["refuses"], "seed": 0},
        "meant": {"helpful": None, "harmless": "refuses"},
        "results": {"base": before, "policy": {"sampled": sweep(rewards, list(w[:, 1]))}},
        "difference": change,
        "added": {"policy": change},
        "benign": None,
    }


def said(result):
    return [f"{about}: {words}" for about, words in verdict(result)]


def test_a_verdict_in_full(result):
    benign = [{"w": list(WEIGHTS[i]), "marks": shares(x)} for i, x in ((0, 0.0), (10, 0.08))]
    result["benign"] = {
        "prompts": [{}] * 8,
        "weights": [WEIGHTS[0], WEIGHTS[10]],
        "results": {"policy": {"points": benign}},
    }
    assert said(result) == [
        "helpful: follows the knob (Spearman 0.97): +2.0 (1.5 to 2.5) from no weight on it to "
        "all of it; base +0.01",
        "harmless: follows the knob (Spearman 0.97): +2.0 (1.5 to 2.5) from no weight on it to "
        "all of it; base +0.01",
        "middle: helpful changes gradually, half-way at helpful=0.5; largest step 10 % (10 to 10); "
        "harmless switches at harmless=0.65: 100 % (100 to 100) of its change from 0.6 to 0.7",
        "refuses: 0 % at helpful=1, 100 % at harmless=1; of benign prompts 0 %, 8 %; base 0 %, 0 %",
        "front: training raised the hypervolume: 1 to 1, difference +0.50 (0.40 to 0.60)",
    ]
    assert scope(result) == (
        "Sampled answers to 8 held-out prompts at 11 weights, and to 8 benign ones at 2 of these; "
        "in parentheses 95 % intervals over prompts."
    )


@pytest.mark.parametrize(
    ("ends", "rho", "words"),
    [
        (estimate(0.5, 0.2, 0.8), 0.9, "follows the knob (Spearman 0.90)"),
        (estimate(0.5, 0.2, 0.8), 0.6, "follows the knob from end to end, but not step by step"),
        (estimate(-0.5, -0.8, -0.2), -1.0, "goes against the knob (Spearman −1.00)"),
        (estimate(0.1, -0.2, 0.4), None, "does not measurably follow the knob (Spearman undef"),
        (estimate(0.1), 1.0, "too few prompts to tell (Spearman 1.00)"),
    ],
)
def test_an_objective_follows_as_far_as_its_interval_allows(result, ends, rho, words):
    entry = result["results"]["policy"]["sampled"]
    entry["ends"]["helpful"]["raw"] = ends
    entry["spearman"]["helpful"] = estimate(rho)
    lines = said(result)
    assert lines[0].startswith(f"helpful: {words}")
    if ends["low"] is None or ends["low"] <= 0:
        assert lines[2].startswith("middle: harmless")


def test_nothing_is_said_of_a_middle_that_was_not_shown(result):
    for name in NAMES:
        result["results"]["policy"]["sampled"]["ends"][name]["raw"] = estimate(0.1, -0.1, 0.3)
    assert said(result)[2] == (
        "middle: nothing to tell, for no objective measurably follows the knob"
    )


def test_three_weights_tell_no_switch_from_a_dial(result):
    entry = result["results"]["policy"]["sampled"]
    result["weights"] = [result["weights"][i] for i in (0, 5, 10)]
    entry["prompt_rewards"] = [entry["prompt_rewards"][i] for i in (0, 5, 10)]
    assert said(result)[2] == "middle: too few weights to tell a switch from a dial"


@pytest.mark.parametrize(
    ("borne", "warned"),
    [
        (estimate(0.9, 0.8, 1.0), False),
        (estimate(0.02, -0.05, 0.1), True),
        (estimate(0.0, 0.0, 0.0), True),
        (estimate(-0.4, -0.6, -0.2), True),
        (estimate(0.0), False),  # too few prompts to say
    ],
)
def test_a_reward_that_rises_without_its_mark_is_warned_of(result, borne, warned):
    sweep = result["results"]["policy"]["sampled"]
    sweep["mark_ends"]["harmless"]["refuses"] = borne
    assert not any(line.startswith("beware") for line in said(result))  # at harmless=1 all refuse
    for point in sweep["points"]:
        point["marks"] = shares(0.5)
    warnings = [line for line in said(result) if line.startswith("beware")]
    assert len(warnings) == warned
    if warned:
        assert "the reward harmless rises" in warnings[0] and "“refuses” does not" in warnings[0]
    flat = copy.deepcopy(result)
    flat["results"]["policy"]["sampled"]["ends"]["harmless"]["raw"] = estimate(0.1, -0.1, 0.3)
    assert not any(line.startswith("beware") for line in said(flat))
    unknown = copy.deepcopy(result)
    unknown["meant"]["harmless"] = None
    assert not any(line.startswith("beware") for line in said(unknown))


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (estimate(0.1, 0.05, 0.15), "training raised the hypervolume"),
        (estimate(-0.1, -0.15, -0.05), "training lowered the hypervolume"),
        (estimate(0.1, -0.05, 0.25), "training did not measurably change the hypervolume"),
        (estimate(0.1), "training moved the hypervolume"),
    ],
)
def test_the_front_is_said_to_move_as_far_as_its_interval_allows(result, difference, words):
    result["difference"]["sampled"]["hypervolume"] = difference
    assert said(result)[-1].startswith(f"front: {words}")


def test_of_answers_that_do_both_the_verdict_tells_where_most_do(result):
    result["settings"]["marks"] = ["both"]
    for modes in result["results"].values():
        for i, point in enumerate(modes["sampled"]["points"]):
            point["marks"] |= {"both": estimate(0.03 + 0.1 * (i == 4))}
    assert said(result)[3] == "both: at most 13 %, at helpful=0.6, harmless=0.4"


def test_what_the_warm_start_added_is_told_from_what_came_after(result):
    result["added"] = {
        "warmup": {"sampled": {"hypervolume": estimate(0.4, 0.3, 0.5)}},
        "policy": {"sampled": {"hypervolume": estimate(0.1, 0.0, 0.2)}},
    }
    results = result["results"]
    result["results"] = {"base": results["base"], "warmup": results["base"], **results}
    lines = said(result)
    assert lines[0].endswith("base +0.01, warm start +0.01")
    assert lines[-1].endswith(
        "; the warm start added +0.40 (0.30 to 0.50), what came after it +0.10 (0.00 to 0.20)"
    )


def test_three_objectives_have_a_middle_each(result):
    """On a lattice a level of one weight has several points: their mean counts."""
    points = [(a / 4, b / 4, (4 - a - b) / 4) for a in range(5) for b in range(5 - a)]
    result["names"].append("brief")
    result["weights"] = points
    result["meant"]["brief"] = None
    entry = result["results"]["policy"]["sampled"]
    entry["prompt_rewards"] = [[[3 * a + b - c, b, 5 * (c > 0.6)]] * 8 for a, b, c in points]
    for e in (entry, result["results"]["base"]["sampled"]):
        e["ends"]["brief"], e["spearman"]["brief"] = e["ends"]["helpful"], e["spearman"]["helpful"]
        e["points"] = [{"marks": shares(0.5)} for _ in points]
    middle = said(result)[3]
    assert "helpful changes gradually, half-way at helpful=0.5" in middle
    assert "brief switches at brief=0.62" in middle


def test_the_terminal_s_table_names_what_is_measured_once_and_keeps_its_columns(result):
    lines = list(aligned(*by_weight(result)))
    assert lines[0].split() == ["w", "of", "helpful", "1", "0.8", "0.5", "0.3", "0"]
    assert [line[:16].strip() for line in lines[1:]] == [
        "reward helpful", "", "reward harmless", "", "refuses", ""
    ]  # fmt: skip
    assert len({len(line) for line in lines}) == 1 and len(lines[0]) < 80
    assert lines[-1].split()[-2:] == ["100", "%"]


@pytest.mark.parametrize(
    ("value", "sign", "written"),
    [
        (estimate(0.94, 0.88, 0.97), False, "94 % (88 to 97)"),
        (estimate(0.1), True, "+10 %"),
        (estimate(-0.001, -0.1, 0.1), True, "0 % (−10 to 10)"),
        (estimate(None), False, "–"),
    ],
)
def test_shares_are_written_as_percent(value, sign, written):
    assert percent(value, sign=sign) == written
