"""What a comparison computes of its runs, against values worked out by hand."""

import json
import re

import numpy as np
import pytest

from meal_fast.config.cli import option_named
from meal_fast.config.config import from_dict
from meal_fast.config.presets import preset
from meal_fast.data.preferences import BPS_EVALUATION, evaluation_weights, lattice, on_lattice
from meal_fast.evaluation import claims, comparison, judging
from meal_fast.evaluation.claims import Claim, Side
from meal_fast.evaluation.comparison import Finished, Method, compare, quantities
from meal_fast.evaluation.comparison_report import headline, render
from meal_fast.evaluation.judging import over_seeds
from meal_fast.evaluation.method_fronts import figure

WEIGHTS = lattice(2, 3)  # (1, 0), (0.5, 0.5), (0, 1)
NAMES = ["first", "second"]
TINY = preset("tiny")
META, GRID = Method("weighted-meta-grpo"), Method("grid-grpo")
CLAIM = Claim("claimed", "nowhere", Side(META.recipe), Side(GRID.recipe), "pu_unseen")


def evaluation(points, pu, *, prompts=1, seen=(True, False, True), **changes):
    """An evaluation.json with these mean rewards and shortfalls, the same for every prompt."""
    reward = np.repeat(np.array(points, dtype=float)[:, None], prompts, 1).tolist()
    entry = {
        "prompt_normalized": reward,
        "prompt_rewards": reward,
        "prompt_pu": np.repeat(np.array(pu, dtype=float)[:, None], prompts, 1).tolist(),
    }
    results = {model: {mode: entry for mode in comparison.MODES} for model in ("base", "policy")}
    settings = {"grid": 3, "prompts": prompts, "samples": 1, "ask": "", "temperature": 1.0}
    return {
        "names": NAMES,
        "weights": [list(w) for w in WEIGHTS],
        "seen": list(seen),
        "utopia": [1.1, 1.1],
        "mu": 0.1,
        "prompts": [{"id": str(i), "text": "?"} for i in range(prompts)],
        "settings": settings,
        "results": results,
        **changes,
    }


def finished(method, seed, pu=(0.3, 0.4, 0.5), points=((1, 0), (0.5, 0.5), (0, 1)), **more):
    update = {"tokens": 100, "seconds": {"rollout": 1.0, "learn": 0.5}}
    metrics = [update, update | {"acceptance": 0.25}]
    return Finished(method, seed, evaluation(points, pu, **more), metrics, 2**30 * (seed + 1))


def test_interval_over_seeds_is_students_and_below_three_seeds_there_is_none():
    e = over_seeds([1.0, 2.0, 3.0])
    half = 4.3027 * 1.0 / 3**0.5  # t(2) at 0.975, standard deviation 1
    assert e.value == 2.0
    # from a thousand resamples, so to their few per cent
    assert e.high - 2.0 == pytest.approx(half, rel=0.06)
    assert e.low + e.high == pytest.approx(4.0)
    two = over_seeds([1.0, 2.0])
    assert (two.value, two.low, two.high) == (1.5, None, None)
    same = over_seeds([0.5] * 5)
    assert (same.low, same.high) == (0.5, 0.5)


def test_resampled_prompts_widen_the_interval():
    rng = np.random.default_rng(0)
    fixed = over_seeds([1.0, 2.0, 3.0])
    drawn = np.array([1.0, 2.0, 3.0]) + rng.normal(0, 0.5, (1000, 1))
    wide = over_seeds([1.0, 2.0, 3.0], drawn)
    # both variances add: sqrt(2/9 + 1/4) against sqrt(2/9)
    assert (wide.high - 2) / (fixed.high - 2) == pytest.approx((1 + 9 / 8) ** 0.5, rel=0.06)


def test_quantities_by_hand():
    points = np.array([[1.0, 0.0], [0.2, 0.2], [0.0, 1.0]])
    found = quantities(
        WEIGHTS, [True, False, True], NAMES, np.zeros(2), points, np.array([1, 2, 6])
    )
    assert found["pu"] == 3 and found["pu_seen"] == 3.5 and found["pu_unseen"] == 2
    assert found["pu_interior"] == 2  # only (0.5, 0.5) has 0.3 on both
    assert found["hypervolume"] == pytest.approx(0.04)  # the ends span no area above (0, 0)
    assert found["largest_gap"] == pytest.approx((0.8**2 + 0.2**2) ** 0.5)
    assert found["reach"] == pytest.approx(1.0)
    assert found["spearman first"] == pytest.approx(1.0)
    still = quantities(WEIGHTS, [True] * 3, NAMES, np.zeros(2), np.ones((3, 2)), np.ones(3))
    assert still["spearman second"] == 0 and "pu_unseen" not in still


def test_one_reference_point_lies_below_all_methods():
    runs = [
        finished(META, 0, points=((1, 0), (0.5, 0.5), (0, 1))),
        finished(GRID, 0, points=((2, 0), (0.5, 0.5), (0, 3))),
    ]
    result = compare(runs, TINY, 200)
    assert result["reference_point"] == pytest.approx([-0.2, -0.3])
    by_name = {m["name"]: m["measures"]["sampled"]["hypervolume"] for m in result["methods"]}
    # above (-0.2, -0.3): 2.2 x 0.3 + 0.7 x 0.5 + 0.2 x 2.5
    assert by_name["grid-grpo"]["value"] == pytest.approx(0.66 + 0.35 + 0.5)
    assert by_name["weighted-meta-grpo"]["value"] == pytest.approx(
        1.2 * 0.3 + 0.7 * 0.5 + 0.2 * 0.5
    )
    assert result["methods"][2]["points"]["greedy"][0]["by_seed"] == [[2, 0]]
    solid = {
        m["name"]: [p["nondominated"] for p in m["points"]["sampled"]] for m in result["methods"]
    }
    assert solid["grid-grpo"] == [True, True, True]
    assert solid["weighted-meta-grpo"] == [False, True, False]


def test_what_a_method_took_is_of_its_mean_run():
    result = compare([finished(META, 0), finished(META, 1)], TINY, 200)
    cost = result["methods"][1]["cost"]
    assert cost == {
        "tokens": 200,
        "updates": 2,
        "seconds": 3,
        "peak_bytes": 2**31,  # the higher of the two
        "acceptance": 0.25,  # of the updates that say it
    }


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ((0.10, 0.11, 0.12), "held"),
        ((-0.10, -0.11, -0.12), "contradicted"),
        ((0.10, -0.11, 0.12), "not shown"),
        ((0.1, 0.1), "not shown: fewer than 3 common seeds"),
    ],
)
def test_a_claim_is_judged_by_the_paired_interval(gains, verdict):
    """PU is lower for the better; the seeds differ by more than the methods do, which cancels."""
    runs = []
    for seed, gain in enumerate(gains):
        runs.append(finished(META, seed, pu=(0, 5.0 * seed, 0)))
        runs.append(finished(GRID, seed, pu=(0, 5.0 * seed + gain, 0)))
    claim = compare(runs, TINY, 200, claims=[CLAIM])["claims"][0]
    assert claim["verdict"] == verdict
    assert claim["gain"]["value"] == pytest.approx(np.mean(gains))
    assert (claim["better"], claim["worse"]) == ("weighted-meta-grpo", "grid-grpo")


def test_a_claim_without_its_runs_or_its_weights_is_not_run():
    alone = compare([finished(META, seed) for seed in range(3)], TINY, 200, claims=[CLAIM])
    assert alone["claims"][0]["verdict"] == "not run"
    assert headline(alone) == [
        "One method alone: nothing is compared.",
        "No claim of the papers is about methods that were run here.",
    ]
    seen = [finished(m, s, seen=(True, True, True)) for m in (META, GRID) for s in range(3)]
    assert compare(seen, TINY, 200, claims=[CLAIM])["claims"][0]["verdict"] == "not run"


def test_a_claim_finds_its_variant_and_the_value_that_all_runs_have():
    """The tiny preset has alpha = 1: one side of a claim may be the recipe itself."""
    low = Method("weighted-meta-grpo", (("preference.alpha", 0.5),))
    methods = [META, low]
    side = Side("weighted-meta-grpo", (("alpha", 1.0),))
    assert judging.method_of(side, TINY, methods) == META
    side = Side("weighted-meta-grpo", (("alpha", 0.5),))
    assert judging.method_of(side, TINY, methods) == low
    assert judging.method_of(side, from_dict({"preference": {"alpha": 0.5}}, TINY), methods) == META
    side = Side("weighted-meta-grpo", (("beta", 0.1),))
    assert judging.method_of(side, TINY, methods) is None
    unknown = Side("weighted-meta-grpo", (("no-such-option", 1.0),))
    assert judging.method_of(unknown, TINY, methods) is None


def test_every_claim_is_of_a_known_measure_and_table_1_of_the_weights_of_the_sweep():
    assert {claim.measure for claim in claims.CLAIMS} <= set(judging.MEASURES)
    for claim in claims.CLAIMS:
        for side in (claim.better, claim.worse):
            assert all(option_named(short, TINY) for short, _ in side.options)
    assert list(claims.BPS_TABLE_1) == list(BPS_EVALUATION)
    # the means that the columns have, as a guard against a slip of the finger
    columns = np.array(list(claims.BPS_TABLE_1.values()))
    np.testing.assert_allclose(columns.mean(0), [0.294679, 0.645357], atol=1e-6)


def test_prompts_are_resampled_where_there_are_enough():
    rng = np.random.default_rng(0)
    runs = [finished(META, seed, prompts=6) for seed in range(3)]
    fixed = compare(runs, TINY, 200)["methods"][1]["measures"]["sampled"]["pu"]
    for run in runs:  # prompts of unlike difficulty, the same for all seeds
        entry = run.evaluation["results"]["policy"]["sampled"]
        spread = np.array(entry["prompt_pu"]) + rng.permutation(np.linspace(-0.1, 0.1, 6))
        entry["prompt_pu"] = spread.tolist()
    varied = compare(runs, TINY, 200)["methods"][1]["measures"]["sampled"]["pu"]
    assert fixed["low"] == fixed["high"] == pytest.approx(0.4)
    assert varied["value"] == pytest.approx(0.4) and varied["high"] > 0.41


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"utopia": [1.2, 1.1]},
            "grid-grpo, seed 0: evaluated with other utopia than weighted-meta",
        ),
        ({"mu": 0.2}, "other mu"),
        ({"prompts": [{"id": "9", "text": "?"}]}, "other prompts"),
    ],
)
def test_runs_that_were_not_measured_alike_are_refused(changes, said):
    other = Finished(GRID, 0, finished(GRID, 0).evaluation | changes, [], None)
    with pytest.raises(ValueError, match=said):
        compare([finished(META, 0), other], TINY, 200)


def test_distance_is_of_greedy_answers_where_the_truth_is_known():
    def distance(reward_NK):
        return reward_NK.sum(1)

    result = compare([finished(META, 0)], TINY, 200, distance)
    greedy, sampled = (result["methods"][1]["measures"][m] for m in ("greedy", "sampled"))
    assert greedy["distance"]["value"] == 1.0 and "distance" not in sampled


def test_published_columns_stand_beside_a_sweep_of_the_28_weights():
    weights = evaluation_weights(2, 28)
    seen = on_lattice(weights, 11)
    assert sum(seen) == 11
    result = compare(
        [finished(META, 0, [0.5] * 28, weights, weights=[list(w) for w in weights], seen=seen)],
        TINY,
        200,
    )
    result["settings"]["grid"] = 28
    rest = {"preset": "tiny", "policy": "", "seeds": [0], "failed": [], "notes": []}
    text = render(result | rest | {"ablations": [], "command": "", "code": ""})
    cells = re.sub(r"<[^>]+>", "|", text)
    assert "||weighted-grpo, BPS Table 1||" in cells
    assert re.search(r"\|1\.00 0\.00 seen\|\|0\.5\|\|0\.5\|\|0\.363\|\|0\.946\|", cells)


def compared(runs, **more):
    """A comparison as a page is made of: with what the command adds, and through JSON."""
    added = {
        "preset": "tiny",
        "policy": "world:tiny",
        "seeds": [0, 1, 2],
        "failed": [],
        "notes": [],
        "ablations": [],
        "command": "the command",
        "code": "1",
    }
    result = compare(runs, TINY, 200, claims=more.pop("claims", [])) | added | more
    return json.loads(json.dumps(result))


@pytest.mark.reliability("hour", "a comparison that names no winner")
def test_a_headline_names_the_winner_and_by_how_much():
    """META's PU is lower by 1 to 1.2, and GRID's front is the wider one on two of three seeds."""
    runs = []
    for seed, far in enumerate((1.0, 1.3, 1.1)):
        runs.append(finished(META, seed, pu=(0, 1.0, 0)))
        runs.append(finished(GRID, seed, pu=(0, 4.0 + seed / 10, 0), points=((far, 0), (0, far))))
    for run in runs:  # of two weights
        evaluation = run.evaluation
        evaluation["weights"], evaluation["seen"] = [[1, 0], [0, 1]], [True, True]
        for sweep in evaluation["results"].values():
            for entry in sweep.values():
                for key in ("prompt_normalized", "prompt_rewards", "prompt_pu"):
                    entry[key] = [entry[key][0], entry[key][-1]]
    result = compared(runs)
    by = {entry["measure"]: entry for entry in result["leaders"]}
    assert list(by) == ["hypervolume", "pu", "spearman first", "spearman second"]
    volume = by["hypervolume"]
    assert (volume["best"], volume["next"], volume["seeds"]) == (GRID.name, META.name, 3)
    assert volume["gain"]["low"] < 0 < volume["gain"]["high"]  # 0, 0.3 and 0.1 over 1
    lines = headline(result)
    assert lines[0].startswith(f"Hypervolume: no winner; the best mean is that of {GRID.name}")
    assert len(lines) == 5
    page = render(result)
    assert page.index(lines[0]) < page.index("<h2>")


def test_a_winner_is_one_whose_interval_excludes_zero():
    def pu_line(seeds):
        runs = [finished(META, s, pu=(0, 1.0, 0)) for s in seeds]
        runs += [finished(GRID, s, pu=(0, 4.0 + s / 10, 0)) for s in seeds]
        return headline(compared(runs))[1]

    # a third of 3.0, 3.1 and 3.2
    assert pu_line(range(3)).startswith(
        "PU: weighted-meta-grpo wins with 0.333, ahead of grid-grpo by 1.03"
    )
    assert pu_line([0]) == (
        "PU: weighted-meta-grpo has the best mean, 0.333, before grid-grpo by 1; with 1 seed in "
        "common that may be chance."
    )


def test_a_warm_start_that_all_runs_have_stands_before_the_methods():
    runs = [finished(m, s) for m in (META, GRID) for s in range(3)]
    for run in runs:
        run.evaluation["results"]["warmup"] = run.evaluation["results"]["base"]
    result = compared(runs)
    assert [m["name"] for m in result["methods"]] == [
        *("base model", "warm start"),
        *(META.name, GRID.name),
    ]
    page = render(result)
    assert page.count(">warm start<") >= 3 and "2 methods, seeds" in page
    del runs[0].evaluation["results"]["warmup"]
    assert [m["name"] for m in compared(runs)["methods"]][:2] == ["base model", META.name]


def test_marks_are_means_over_seeds_and_stand_on_the_page():
    runs = [finished(m, s) for m in (META, GRID) for s in range(3)]
    assert "Marks in the answers" not in render(compared(runs))
    for run in runs:
        refused = [[0.0], [run.seed / 2], [1.0]]  # W x P
        points = [{"w": w} for w in run.evaluation["weights"]]
        marked = {"points": points, "prompt_marks": {"refuses": refused}}
        for model, sweep in run.evaluation["results"].items():
            run.evaluation["results"][model] = sweep | {"sampled": sweep["sampled"] | marked}
        run.evaluation["benign"] = {
            "results": dict.fromkeys(
                ("base", "policy"), marked | {"prompt_marks": {"refuses": [[0.25]] * 3}}
            )
        }
    result = compared(runs)
    middle = result["methods"][1]["marks"][1]["marks"]["refuses"]
    assert middle == {"value": 0.5, "low": 0.0, "high": 1.0}  # of 0, 0.5 and 1, by Student wider
    text = re.sub(r"<[^>]+>", "|", render(result))
    assert "Marks in the answers" in text
    assert f"|refuses||{META.name}||0 % (0 to 0)||50 % (" in text
    assert f"|refuses, benign prompts||{GRID.name}||25 % (25 to 25)|" in text


@pytest.mark.reliability("hour", "a front of ten methods that cannot be read")
def test_every_method_s_points_are_in_the_figure_and_name_themselves():
    runs = [finished(m, s) for m in (META, GRID) for s in range(3)]
    result = compared(runs)
    shown = figure(result, [META.name, GRID.name], ("sampled", "greedy"))
    assert [panel.title for panel in shown.panels] == ["Sampled", "Greedy"]
    assert [s.name for s in shown.legend] == [META.name, GRID.name]
    x0, y0, x1, y1 = shown.frame
    for panel in shown.panels:
        for series in panel.series:
            assert len(series.points) == len(WEIGHTS) and len(series.seeds) == 3 * len(WEIGHTS)
            spots = [(p.x, p.y) for p in series.points] + series.seeds
            assert all(x0 <= x <= x1 and y0 <= y <= y1 for x, y in spots)
        first = panel.series[0].points[0]
        assert first.said == f"{META.name} at first=1, second=0: first 1, second 0, PU 0.3"
        # right is more of the first, up more of the second
        assert first.x > panel.series[0].points[-1].x and first.y > panel.series[0].points[-1].y
        assert panel.series[0].colour != panel.series[1].colour
    page = render(result)
    assert page.count(f"<title>{first.said}</title>") == 2


def test_fronts_of_three_objectives_have_a_panel_a_pair_and_no_lines():
    runs = [finished(META, s) for s in range(3)]
    three = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    for run in runs:
        run.evaluation.update(names=["a", "b", "c"], weights=three, utopia=[1.1] * 3)
        for sweep in run.evaluation["results"].values():
            for entry in sweep.values():
                entry["prompt_normalized"] = entry["prompt_rewards"] = [[w] for w in three]
    shown = figure(compared(runs), [META.name], ("sampled",))
    assert len(shown.panels) == 3 and not any(p.series[0].line for p in shown.panels)
    assert [p.x_label.split()[0] + p.y_label.split()[0] for p in shown.panels] == ["ab", "ac", "bc"]


def test_the_page_escapes_what_is_not_ours_and_says_what_was_found():
    nasty = '</script><script>alert("1")</script><img src=x onerror=alert(1)>'
    runs = []
    for seed in range(3):
        runs.append(finished(META, seed, pu=(0, 1.0, 0), asked=[[[1.0, 0.0], nasty]]))
        runs.append(finished(GRID, seed, pu=(0, 2.0 + seed / 10, 0)))
    result = compared(
        runs,
        claims=[CLAIM],
        policy=nasty,
        failed=[{"run": "ric/seed-0", "reason": nasty}],
        notes=[nasty, nasty + "long " * 100],
        ablations=[{"options": ["grpo.beta"], "methods": ["grid-grpo", "weighted-meta-grpo"]}],
        command=nasty,
    )
    result = json.loads(json.dumps(result).replace(GRID.name, json.dumps(nasty)[1:-1]))
    result["names"][0] = "first"
    text = render(result)
    assert text.count("<script") == 1 and text.count("</script") == 1 and "<img" not in text
    assert text.count("&lt;script&gt;") > 20
    assert "that these runs test, 1: held 1, contradicted 0, not shown 0." in text
    assert "Fronts for values of grpo.beta" in text and "http:" not in text
