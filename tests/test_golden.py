"""Twenty updates of the tiny world, held to the values they had: `make golden` rewrites them.

A change of these numbers is a change of what training computes. Where one is meant, the rewritten
files show it in the diff.
"""

import dataclasses
from pathlib import Path

import pytest

from meal_fast.config import Config
from meal_fast.presets import preset
from meal_fast.trainer import Trainer
from tests.processes import one_thread, updates  # noqa: F401  (a fixture)

GOLDEN = Path(__file__).resolve().parent / "golden"
COLUMNS = ("loss", "grad_norm", "score")
RUNS = {
    "meal": "lora",
    "mo-odpo": "full",
    "weighted-meta-grpo": "lora",
    "weighted-grpo": "full",
    "grid-meta-grpo": "full",
    "grid-grpo": "lora",
    "rewarded-soups": "lora",
    "parm": "bilinear",
    "ric": "lora",
}


def config_of(recipe: str) -> Config:
    tiny = preset("tiny")
    return dataclasses.replace(
        tiny,
        recipe=recipe,
        policy=dataclasses.replace(tiny.policy, tuning=RUNS[recipe]),
        meta=dataclasses.replace(tiny.meta, steps=5, tasks=2, n_inner=2),
    )


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("recipe", RUNS)
def test_golden_trajectory(tmp_path, recipe, write_golden):
    Trainer(config_of(recipe), tmp_path / "run").train()
    rows = [[row[name] for name in COLUMNS] for row in updates(tmp_path / "run")]
    assert len(rows) == 20
    path = GOLDEN / f"{recipe}.txt"
    if write_golden:
        GOLDEN.mkdir(exist_ok=True)
        lines = [" ".join(COLUMNS), *(" ".join(f"{x:.4e}" for x in row) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    header, *lines = path.read_text().splitlines()
    assert header.split() == list(COLUMNS)
    expected = [[float(x) for x in line.split()] for line in lines]
    for update, (got, want) in enumerate(zip(rows, expected, strict=True)):
        # The loss passes through zero: what is lost there is the rounding of terms of size one.
        assert got == pytest.approx(want, rel=1e-3, abs=1e-6), f"update {update}: {COLUMNS}"
