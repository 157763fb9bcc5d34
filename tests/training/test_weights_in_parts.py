"""Runs whose processes hold the weights together make what one process makes: real ones, gloo."""

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.mesh_runs import Run, left_by, session
from tests.helpers.processes import refused

CHEAP = {"score": {"calibration": 4}, "meta": {"steps": 2}}
FULL = {"policy": {"tuning": "full"}}

QUICK = {"lora": {}, "full": FULL}
SLOW = {
    "lora, meal": {"recipe": "meal"},
    "lora, mo-odpo": {"recipe": "mo-odpo", "grpo": {"beta": 0.1}},
    "lora, stacked": {"meta": {"steps": 2, "parallel": True}},
    "lora, soups": {"recipe": "rewarded-soups"},
    "lora, ric": {"recipe": "ric"},
    "full, exact": FULL | {"grpo": {"kl": "exact", "beta": 0.1, "epochs": 2}},
    "full, per preference": FULL | {"meta": {"steps": 2, "adam": "per_preference"}},
}


def cut(options, **mesh):
    return CHEAP | options | {"mesh": {"virtual": 4, **mesh}}


def assert_alike(folder, name, other):
    """Bit by bit with LoRA; else up to the order in which gradients are summed."""
    one, two = left_by(folder / name), left_by(folder / other)
    if not name.startswith("full"):
        assert one == two
        return
    assert one["completions.jsonl"] == two["completions.jsonl"]
    ones, twos = (load_file(folder / n / "policy" / "model.safetensors") for n in (name, other))
    assert ones.keys() == twos.keys()
    for key, value in ones.items():
        torch.testing.assert_close(twos[key], value, rtol=0, atol=2e-5)


def compared(folder, cases, world, **mesh):
    """Run all cases alone and by `world` processes."""
    more = {"rollout": {"prompts": 4}}
    cases = {name: more | of for name, of in cases.items()}
    session(1, [Run(str(folder / name), cut(of)) for name, of in cases.items()])
    runs = [Run(str(folder / f"{name} parts"), cut(of, **mesh)) for name, of in cases.items()]
    session(world, runs)
    for name in cases:
        assert_alike(folder, name, f"{name} parts")


def test_two_processes_that_hold_the_weights_together(tmp_path):
    compared(tmp_path, QUICK, 2, shard=2)


@pytest.mark.slow
def test_whatever_is_learnt(tmp_path):
    compared(tmp_path, SLOW, 2, shard=2)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [{"shard": 4}, {"shard": 2, "data": 2}, {"shard": 2, "groups": 2}])
def test_four_processes(tmp_path, mesh):
    compared(tmp_path, QUICK, 4, **mesh)


@pytest.mark.slow
def test_a_run_goes_on_where_the_weights_are_whole_and_back(tmp_path):
    options = FULL | {"meta": {"steps": 3}, "rollout": {"prompts": 4}}
    session(1, [Run(str(tmp_path / "full"), cut(options))])
    out = str(tmp_path / "full parts")
    session(2, [Run(out, cut(options, shard=2), stop_after=1)])
    session(1, [Run(out, cut(options), resume=True, stop_after=2)])
    session(2, [Run(out, cut(options, shard=2), resume=True)])
    assert_alike(tmp_path, "full", "full parts")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--recipe", "parm"], "runs its model twice"),
        (["--recipe", "rewarded-soups", "--policy.tuning", "full"], "whole models"),
        (
            ["--recipe", "meal", "--meal.update", "hypergradient", "--policy.tuning", "full"],
            "policy.tuning=lora",
        ),
        (["--rollout.backend", "generate"], "rollout.backend='generate'"),
    ],
)
def test_what_cannot_hold_weights_together_is_refused_at_once(capfd, tmp_path, options, word):
    argv = ["tiny", "--out", str(tmp_path / "run"), "--mesh.shard", "2", *options]
    refused(capfd, argv, "mesh.shard=2", word)
    assert not (tmp_path / "run").exists()
