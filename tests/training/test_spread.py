"""An objective whose spread vanishes beside another's is told at calibration."""

import json
import warnings
from pathlib import Path

import pytest
import torch

from meal_fast.config import from_dict, preset
from meal_fast.data.reward_statistics import Normalizer, vanishing
from meal_fast.training.trainer import Trainer

NAMES = ("grade", "chance")


def sample(spread: float) -> torch.Tensor:
    return torch.tensor([[80.0, 0.1], [80.0 + spread, 0.9], [80.0 - spread, 0.4]])


@pytest.mark.reliability("silent", "a grade near 80 of 100 beside a chance, normalised by max")
def test_a_spread_below_a_tenth_is_told_by_hand() -> None:
    for spread, told in ((1.0, True), (3.0, True), (4.5, False), (20.0, False)):
        rewards = sample(spread)
        said = vanishing(Normalizer.fit(rewards, "max").apply(rewards), NAMES, "max")
        # sd: spread/(80 + spread) of the grade, 0.404 / 0.9 of the chance
        small = spread / (80 + spread)
        large = float(torch.tensor([0.1, 0.9, 0.4]).std()) / 0.9
        assert told == (small < large / 10) == bool(said), spread
        if told:
            assert said.startswith("objective 'grade' hardly varies beside 'chance'")
            assert f"{small:.3g}" in said and f"{large:.3g}" in said
            assert "--score.normalization standard" in said and "\n" not in said
        rewards = sample(spread)
        assert not vanishing(Normalizer.fit(rewards, "standard").apply(rewards), NAMES, "standard")


@pytest.mark.reliability("silent", "a run whose one objective hardly varies beside the other")
def test_calibration_warns_and_keeps_the_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unlike_judges.py").write_text(
        "def grade(prompts, responses): return [80 + r.count('a') / 50 for r in responses]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    values = {
        "objectives": ["grade=unlike_judges:grade", "second=world:second"],
        "score": {"calibration": 16, "normalization": "max", "utopia": []},
        "meta": {"steps": 1},
    }
    with pytest.warns(UserWarning, match="'grade' hardly varies beside 'second'"):
        Trainer(from_dict(values, preset("tiny")), tmp_path / "max")
    stored = json.loads((tmp_path / "max/statistics.json").read_text())
    assert "'grade' hardly varies" in stored["warning"]
    small, large = stored["calibration"]["normalized_std"]
    assert small < large / 10
    values["score"]["normalization"] = "standard"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Trainer(from_dict(values, preset("tiny")), tmp_path / "standard")
    assert "warning" not in json.loads((tmp_path / "standard/statistics.json").read_text())
