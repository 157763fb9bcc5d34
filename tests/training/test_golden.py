"""Recorded rollouts through loss, gradient, clipping, Adam and outer step: the values they had.

Twenty lines would say the same of a sampled run, but a sampled token hangs on the last digits of a
log-probability, and those on the CPU. So what was sampled is recorded, and what is made of it is
computed in float64 from weights that are the same everywhere, and held to nine digits.

A change of these values is a change of what training computes. `make golden` rewrites the values
from the same rollouts, so that the diff shows it; remove a recipe's rollouts to record new ones.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from meal_fast.config.config import Config
from meal_fast.config.presets import preset
from meal_fast.data_types import Scored, Weighted
from meal_fast.training.trainer import Trainer
from tests.helpers.processes import updates
from tests.helpers.recorded import (  # noqa: F401  (a fixture)
    Recorded,
    Recorder,
    float64_llama,
    from_text,
    make_exact,
    projections,
    to_text,
)

GOLDEN = Path(__file__).resolve().parent / "golden"
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
METRICS = ("loss", "policy_loss", "kl", "entropy", "nll", "margin", "grad_norm")
OUTER = ("delta_norm", "delta_cosine", "spread")


def config_of(recipe: str) -> Config:
    tiny = preset("tiny")
    return dataclasses.replace(
        tiny,
        recipe=recipe,
        policy=dataclasses.replace(tiny.policy, tuning=RUNS[recipe]),
        meta=dataclasses.replace(tiny.meta, steps=2, tasks=2, n_inner=2),
    )


def record(recipe: str, out: Path) -> str:
    """The rollouts of a run's first meta-step."""
    trainer = Trainer(config_of(recipe), out)
    trainer.collector = Recorder(trainer.collector)
    trainer.meta_step()
    return to_text(trainer.collector.batches)


def replay(recipe: str, rollouts: str, out: Path) -> dict[str, list]:
    """What the learner and the outer loop make of them, in float64."""
    trainer = Trainer(config_of(recipe), out)
    make_exact(trainer)
    kind = Weighted if trainer.recipe.spec.loss == "sft" else Scored
    trainer.collector, trainer.net = Recorded(trainer.collector, from_text(rollouts, kind)), None
    begin = projections(trainer.policy.named)
    trainer.meta_step()
    rows = updates(out)
    assert len(rows) == 4 and all(p.dtype == torch.float64 for p in trainer.policy.trainable)
    values = {name: [row[name] for row in rows] for name in METRICS if name in rows[0]}
    end = projections(trainer.policy.named)
    for w, theta in trainer.outer.models().items():  # of several models each
        values[f"model {w}"] = projections(dict(zip(trainer.policy.named, theta, strict=True)))
    moved = [b - a for a, b in zip(begin, end, strict=True)]
    return (
        values | {name: [rows[-1][name]] for name in OUTER if name in rows[-1]} | {"moved": moved}
    )


@pytest.mark.reliability("silent", "another CPU, against recorded values of every recipe")
@pytest.mark.usefixtures("float64_llama")
@pytest.mark.parametrize("recipe", RUNS)
def test_golden_replay(tmp_path, recipe, write_golden):
    rollouts, path = GOLDEN / f"{recipe}.jsonl", GOLDEN / f"{recipe}.values.json"
    if write_golden and not rollouts.exists():
        rollouts.write_text(record(recipe, tmp_path / "recorded"), encoding="utf-8")
    got = replay(recipe, rollouts.read_text(encoding="utf-8"), tmp_path / "replay")
    if write_golden:
        path.write_text(json.dumps(got, indent=1) + "\n", encoding="utf-8")
    want = json.loads(path.read_text(encoding="utf-8"))
    assert got.keys() == want.keys()
    for name, values in want.items():
        # The sums pass through zero: what is lost there is the rounding of terms of size one.
        assert got[name] == pytest.approx(values, rel=1e-9, abs=1e-11), name
