"""Recipes as data: every name resolves, code and data agree, and a new one is two lines."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

import meal_fast
from meal_fast.config import recipes as specs
from meal_fast.config.config import from_dict
from meal_fast.config.presets import preset
from meal_fast.config.recipes import RECIPES, RecipeSpec
from meal_fast.data.preferences import model_tasks
from meal_fast.data_types import Weighted
from meal_fast.training import recipes
from meal_fast.training.collectors.base import Sampled
from meal_fast.training.recipes import recipe_of
from tests.helpers.processes import refused, updates
from tests.training.test_grpo import TEMPERATURE, setting  # noqa: F401  (a fixture)
from tests.training.test_parallel import watched

TWO_LINES = RecipeSpec(about="DPO under Reptile", score="linear", loss="dpo", outer="reptile")


@pytest.fixture
def reptile_odpo(monkeypatch):
    monkeypatch.setitem(RECIPES, "reptile-odpo", TWO_LINES)


def tiny(recipe, **changes):
    return from_dict({"recipe": recipe, **changes}, preset("tiny"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_resolves(recipe):
    config = tiny(recipe)
    found, spec = recipe_of(config), RECIPES[recipe]
    assert found.spec == spec and callable(found.loss)
    assert found.outer is recipes.OUTERS[spec.outer]
    assert found.collector is recipes.COLLECTORS[spec.collector]
    several = config.model_points > 0
    assert several == (found.preferences is model_tasks) == bool(spec.between)
    assert len(found.preferences(config, 3)) == config.meta.tasks


def test_the_tables_name_the_same_parts():
    for what in ("LOSSES", "OUTERS", "COLLECTORS"):
        assert getattr(recipes, what).keys() == getattr(specs, what).keys(), what


@pytest.mark.parametrize("name", specs.LOSSES)
def test_a_loss_refuses_what_its_spec_says(setting, name):  # noqa: F811
    """Odd groups, beta = 0 and a policy without a guide, each if and only if the table says so."""
    policy, rolled, scored = setting
    spec, loss = specs.LOSSES[name], recipes.LOSSES[name](tiny("grid-grpo"))
    config = tiny("grid-grpo").grpo
    if name == "sft":
        scored = Weighted(scored.reward_RK, scored.score_R, scored.advantage_R)
    odd = dataclasses.replace(rolled, group_R=torch.tensor([0] * 3 + [1] * 9))

    def complaint(rolled, config):
        try:
            loss(policy, rolled, scored, config, TEMPERATURE)
        except ValueError as error:
            return str(error)
        return ""

    plain = complaint(rolled, config)
    assert ("bilinear adapter" in plain) == spec.guide == bool(plain)
    if not spec.guide:  # without one it goes no further
        assert ("even number" in complaint(odd, config)) == spec.pairs
        free = dataclasses.replace(config, beta=0.0)
        assert ("grpo.beta=0" in complaint(rolled, free)) == spec.needs_beta


@pytest.mark.parametrize("name", specs.OUTERS)
def test_an_outer_loop_is_what_its_spec_says(name):
    spec, outer = specs.OUTERS[name], recipes.OUTERS[name]
    config = tiny("grid-grpo", meta={"n_inner": 1, "tasks": 2})
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    if spec.n_inner > 1:
        with pytest.raises(ValueError, match=r"n_inner=1"):
            outer(parameters, config.meta, config.grpo)
    meta = dataclasses.replace(config.meta, n_inner=spec.n_inner)
    made = outer(parameters, meta, config.grpo)
    assert len(made.lanes) == (2 if name in {s.at_once for s in specs.OUTERS.values()} else 1)
    assert ("models" in made.state()) == spec.models
    assert not spec.at_once or issubclass(recipes.OUTERS[spec.at_once], outer)


def test_a_spec_of_unknown_or_unfitting_parts_is_refused():
    for change, words in (
        ({"loss": "ppo"}, r"loss='ppo': unknown; choose from grpo"),
        ({"outer": "maml"}, r"outer='maml': unknown"),
        ({"collector": "replay"}, r"collector='replay': unknown"),
        ({"outer": "separate"}, r"outer='separate' needs both"),
        ({"models": 2}, r"outer='reptile' needs neither"),
    ):
        with pytest.raises(ValueError, match=words):
            dataclasses.replace(TWO_LINES, **change)


def test_options_switch_parts_and_rules_follow():
    both = tiny("meal", meal={"policy": "grpo", "outer": "reptile+net"})
    found = recipe_of(both)
    assert (found.spec.loss, found.spec.outer) == ("grpo", "reptile")
    with pytest.raises(ValueError, match=r"^meta\.n_inner=1: "):
        tiny("meal", meal={"outer": "reptile+net"}, meta={"n_inner": 1})
    assert tiny("meal", meta={"n_inner": 1}).meta.n_inner == 1
    with pytest.raises(ValueError, match=r"^meta\.parallel=True: .*no tasks that go at once"):
        tiny("meal", meal={"policy": "grpo", "outer": "reptile+net"}, meta={"parallel": True})


def test_nothing_asks_for_a_recipe_by_its_name():
    names = "|".join(map(re.escape, RECIPES))
    asked = re.compile(
        rf"""recipe\w*\s*(==|!=|(not\s+)?in)\s*[\[({{]?\s*["']|["'](meta|{names})["']\s+(not\s+)?in\b"""
        rf"""|["']({names})["']\s*(==|!=)"""
    )
    assert asked.search('if config.recipe == "meal":') and asked.search('if "meta" in recipe:')
    package = Path(meal_fast.__file__).parent
    for path in package.rglob("*.py"):
        assert not asked.search(path.read_text(encoding="utf-8")), path


@pytest.mark.usefixtures("reptile_odpo")
@pytest.mark.parametrize(
    ("values", "sister", "words"),
    [
        ({"rollout": {"samples": 3}}, "mo-odpo", "rollout.samples=3: "),
        ({"grpo": {"beta": 0.0}}, "mo-odpo", "grpo.beta=0.0: "),
        ({"meta": {"n_inner": 1}}, "grid-meta-grpo", "meta.n_inner=1: "),
        ({"policy": {"preference_text": "none"}}, "mo-odpo", "policy.preference_text='none': "),
        ({"policy": {"tuning": "bilinear"}}, "mo-odpo", "policy.tuning='bilinear': "),
        ({"meal": {"lam": 1.0}}, "mo-odpo", "meal.lam=1.0: "),
    ],
)
def test_a_new_recipe_is_checked_as_its_sisters_are(values, sister, words):
    said = []
    for recipe in (sister, "reptile-odpo"):
        with pytest.raises(ValueError, match=f"^{re.escape(words)}") as caught:
            tiny(recipe, **values)
        said.append(str(caught.value).replace(recipe, "RECIPE"))
    assert said[0] == said[1]


@pytest.mark.usefixtures("reptile_odpo", "one_thread")
def test_a_new_recipe_trains_from_the_command_line(tmp_path, capfd):
    from meal_fast.train import main

    refused(capfd, ["tiny", "--recipe", "reptile-odp"], "reptile-odpo")
    small = ["--meta.steps", "1", "--rollout.max_new_tokens", "5", "--no-evaluate"]
    main(["tiny", "--recipe", "reptile-odpo", *small, "--out", str(tmp_path / "run")])
    lines = updates(tmp_path / "run")
    assert len(lines) == 4 and all("margin" in line and "kl" in line for line in lines)
    assert lines[-1]["delta_norm"] > 0


@pytest.mark.usefixtures("reptile_odpo", "one_thread")
def test_its_tasks_at_once_are_those_of_one_after_the_other(tmp_path):
    options = {"grpo": {"micro_tokens": 130, "beta": 0.5, "max_grad_norm": 0.5}}
    one, all_ = (
        watched(tmp_path, parallel, recipe="reptile-odpo", **options) for parallel in (False, True)
    )
    assert one.gradients.keys() == all_.gradients.keys() and len(one.gradients) == 12
    for name, gradients in one.gradients.items():
        for mine, theirs in zip(all_.gradients[name], gradients, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    assert sum(bool(max(g.abs().max() for g in gs) > 1e-6) for gs in one.gradients.values()) > 6
    for mine, theirs in zip(all_.lines, one.lines, strict=True):
        for name in ("loss", "margin", "accuracy", "pairs", "kl", "tokens", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-6, abs=1e-9), name


def test_a_recipe_without_parallel_form_says_so():
    for recipe in ("grid-grpo", "mo-odpo", "parm", "ric", "morlhf", "meal"):
        with pytest.raises(ValueError, match=r"^meta\.parallel=True: .*no tasks that go at once"):
            tiny(recipe, meta={"parallel": True})


def test_a_collector_takes_several_tasks_where_its_spec_says_so():
    for name, spec in specs.COLLECTORS.items():
        assert spec.at_once == (recipes.COLLECTORS[name] is Sampled)
