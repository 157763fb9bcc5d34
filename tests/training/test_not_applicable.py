"""Objectives that give some rows no reward: scores, statistics, metrics and evaluations by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from meal_fast.config.config import ScoreConfig
from meal_fast.data.reward_statistics import Normalizer, Scales, default_utopia, restricted
from meal_fast.evaluation import metrics
from meal_fast.training.completions import at_ends
from meal_fast.training.console import describe
from meal_fast.training.lessons import _standard
from meal_fast.training.loggers import markdown
from meal_fast.training.losses.parm import orders
from tests.helpers.processes import train_here

NAN = math.nan


def strict(text: str):
    """JSON as the standard has it: no NaN, no Infinity."""

    def refused(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refused)


@pytest.mark.reliability("silent", "w of a row that an objective does not apply to, by hand")
def test_a_preference_is_restricted_to_what_applies() -> None:
    w = torch.tensor([[0.2, 0.3, 0.5], [0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    reward = torch.tensor([[1.0, 2.0, 3.0], [1.0, NAN, 3.0], [NAN, 2.0, 3.0], [NAN, NAN, 3.0]])
    got = restricted(w, reward)
    want = [[0.2, 0.3, 0.5], [2 / 7, 0.0, 5 / 7], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]
    torch.testing.assert_close(got, torch.tensor(want))
    assert torch.equal(got[0], w[0])  # to the bit


SAMPLE = torch.tensor([[1.0, -4.0], [3.0, NAN], [-2.0, 2.0], [NAN, 1.0], [0.0, NAN]])


@pytest.mark.reliability("silent", "statistics of a calibration sample with missing rewards")
def test_statistics_are_of_the_rewards_that_are_there(tmp_path: Path) -> None:
    a, b = torch.tensor([1.0, 3.0, -2.0, 0.0]), torch.tensor([-4.0, 2.0, 1.0])
    standard = Normalizer.fit(SAMPLE, "standard")
    assert standard.offset == pytest.approx((float(a.mean()), float(b.mean())))
    assert standard.divisor == pytest.approx((float(a.std()), float(b.std())))
    assert Normalizer.fit(SAMPLE, "max").divisor == (3.0, 4.0)
    assert default_utopia(SAMPLE).tolist() == pytest.approx([3.5, 2.6])
    scales = Scales.fit(SAMPLE, ScoreConfig(), standard=True)
    scales.save(tmp_path / "s.json", ("a", "b"), 0.1, SAMPLE)
    said = strict((tmp_path / "s.json").read_text())["calibration"]
    assert said["applies_to"] == [4, 3] and said["responses"] == 5
    assert said["mean"] == pytest.approx([0.5, -1 / 3]) and said["min"] == [-2.0, -4.0]
    both = torch.corrcoef(torch.tensor([[1.0, -2.0], [-4.0, 2.0]]))[0, 1]
    assert said["correlation"][0][1] == pytest.approx(float(both))
    assert Scales.load(tmp_path / "s.json") == scales


@pytest.mark.reliability("message", "an objective that applies to no row of the calibration")
def test_an_objective_without_any_reward_cannot_be_calibrated() -> None:
    with pytest.raises(ValueError, match=r"'b' applies to no response .* \(score.calibration\)"):
        Normalizer.fit(torch.tensor([[1.0, NAN], [2.0, NAN]]), "max", ("a", "b"))


def test_a_pair_is_ordered_by_objectives_that_apply_to_both() -> None:
    reward = torch.tensor([[1.0, NAN], [2.0, 5.0], [3.0, 1.0], [1.0, 0.0]])
    sign, share = orders(reward, torch.tensor([[0.25, 0.75]]).expand(4, 2))
    assert sign.tolist() == [[-1, 0], [1, 1]]
    assert share.tolist() == [[0.125, 0], [0.125, 0.75]]


def test_lessons_take_a_missing_reward_as_the_mean() -> None:
    z = _standard(torch.tensor([[[1.0, NAN], [3.0, 2.0]], [[5.0, 4.0], [3.0, NAN]]]))
    step = math.sqrt(2.0)
    want = [[[-step, 0.0], [0.0, -1.0]], [[step, 1.0], [0.0, 0.0]]]
    torch.testing.assert_close(z, torch.tensor(want))


def test_an_end_counts_answers_that_its_objective_applies_to() -> None:
    def row(reward, refuses):
        return {
            "asked": {"a": 0.9, "b": 0.1}, "prompt_id": "p", "rewards": {"a": reward, "b": 1.0},
            "marks": {"refuses": refuses},
        }  # fmt: skip

    found = at_ends([row(1.0, True), row(None, False), row(3.0, True)], ("a", "b"))
    assert found == {"a": {"rows": 2, "reward": 2.0, "spread": 1.0, "refuses": 1.0}}
    assert at_ends([row(None, False)], ("a", "b")) == {}


@pytest.mark.reliability("silent", "means of an evaluation over the prompts that apply, by hand")
def test_means_of_an_evaluation_leave_out_what_is_missing() -> None:
    by_prompt = np.array([[[1.0, NAN], [3.0, 4.0], [NAN, 6.0]]])  # W=1, P=3, K=2
    assert metrics.mean(by_prompt, 1).tolist() == [[2.0, 5.0]]
    draws = np.array([[1, 1, 1], [2, 1, 0], [3, 0, 0]]) / 3
    got = metrics.resampled_means(by_prompt, draws)
    assert got[:2, 0].tolist() == [[2.0, 5.0], [pytest.approx(5 / 3), 4.0]]
    assert got[2, 0, 0] == 1.0 and math.isnan(got[2, 0, 1])
    assert metrics.estimate(5.0, got[:, 0, 1], prompts=9).low == pytest.approx(4.025)
    volume = metrics.hypervolume(got, np.zeros(2))
    assert volume[0] == 10.0 and math.isnan(volume[2])


PARTIAL = """
def short(prompts, responses):
    out = ("song", "letter", "poem")
    return [None if any(x in p for x in out) else -len(r) / 10 for p, r in zip(prompts, responses)]
"""
FEW = ["--rollout.samples", "4", "--score.calibration", "12", "--meta.steps", "2"]


@pytest.fixture
def partial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    (tmp_path / "partial_judge.py").write_text(PARTIAL)
    monkeypatch.syspath_prepend(str(tmp_path))
    return ["--objectives", "short=partial_judge:short", "first=world:first"]


RECIPES = ("weighted-meta-grpo", "weighted-grpo", "grid-grpo", "mo-odpo", "parm", "rewarded-soups")


@pytest.mark.reliability("silent", "whole runs of six recipes with an objective that gives None")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_with_a_partial_objective(recipe: str, partial: list[str], tmp_path: Path) -> None:
    """Every line is JSON, means are of what is there, and the score is the rule's, row by row."""
    run, report = tmp_path / "run", recipe == "weighted-meta-grpo"
    more = [] if report else ["--no-evaluate"]
    argv = ["tiny", *FEW, *partial, "--recipe", recipe, "--out", str(run), *more]
    assert train_here(*argv) == 0
    lines = [strict(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [strict(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    statistics = strict((run / "statistics.json").read_text())
    assert any(row["rewards"]["short"] is None for row in rows)
    assert any(row["rewards"]["short"] is not None for row in rows)
    scale = statistics["normalizer"]["divisor"]
    utopia, mu = statistics["utopia"], statistics["mu_evaluation"]
    for row in rows:
        raw, w = list(row["rewards"].values()), list(row["asked"].values())
        there = [k for k in range(2) if raw[k] is not None]
        total = sum(w[k] for k in there)
        own = [0.0, 0.0]
        for k in there:
            own[k] = w[k] / total if total else 1 / len(there)
        short = [utopia[k] - raw[k] / scale[k] if k in there else 0.0 for k in range(2)]
        if recipe.startswith("weighted"):
            terms = [math.exp(x * s / mu) for x, s in zip(own, short, strict=True)]
            want = -mu * math.log(sum(terms))
        else:
            want = sum(own[k] * raw[k] / scale[k] for k in there)
        assert row["score"] == pytest.approx(want, abs=2e-5)
    for line in lines:
        found = [
            row["rewards"]["short"] for row in rows
            if (row["update"], row["task"]) == (line["update"], line["task"])
        ]  # fmt: skip
        there = [x for x in found if x is not None]
        mean = line["rewards"]["short"]
        assert mean == (pytest.approx(sum(there) / len(there), abs=1e-6) if there else None)
        assert line.get("not_applicable", {}).get("short", 0) == len(found) - len(there)
        assert "w " in describe(line)
    assert markdown(rows)
    if report:
        result = strict((run / "evaluation.json").read_text())
        sweep = result["results"]["policy"]["sampled"]
        stored = np.asarray(sweep["prompt_rewards"], dtype=np.float64)
        assert np.isnan(stored[:, :, 0]).any() and not np.isnan(stored[:, :, 1]).any()
        for i, point in enumerate(sweep["points"]):
            mean = np.nanmean(stored[i, :, 0])
            assert point["raw"]["short"]["value"] == pytest.approx(mean, rel=1e-4)
        assert (run / "report.html").is_file()


@pytest.mark.reliability("message", "a None under recipes that read every reward")
@pytest.mark.parametrize("recipe", ["meal", "ric"])
def test_recipes_that_read_every_reward_say_so(
    recipe: str, partial: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["tiny", *FEW, *partial, "--recipe", recipe, "--out", str(tmp_path / "run")]
    assert train_here(*argv) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "objective 'short' returned None for row" in said
    assert f"recipe {recipe} needs every reward of every response" in said
