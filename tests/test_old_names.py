"""What users import keeps its old name: modules that moved, and sources that saved runs name."""

import json
import subprocess
import sys

import pytest

import meal_fast
from meal_fast.config import preset, to_dict
from meal_fast.config.run_dir import read_config
from meal_fast.data import preferences
from meal_fast.data.objectives import load_objectives
from meal_fast.rollout import Engine

NAMES = [
    ("preference", "data.preferences", "preference_text"),
    ("policy", "models.policy", "load_policy"),
    ("presets", "config.presets", "preset"),
    ("objectives", "data.objectives", "load_objectives"),
    ("prompts", "data.prompts", "load_prompts"),
    ("trainer", "training.trainer", "Trainer"),
    ("worlds", "data.toy", "build_world"),
]


@pytest.mark.parametrize(("old", "new", "name"), NAMES)
def test_an_old_name_is_the_new_module(old, new, name):
    code = (
        "import importlib, sys, warnings; warnings.simplefilter('always')\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        f"    from meal_fast.{old} import {name}\n"
        f"new = importlib.import_module('meal_fast.{new}')\n"
        f"assert sys.modules['meal_fast.{old}'] is new and new.{name} is {name}\n"
        f"assert new.__name__ == new.__spec__.name == 'meal_fast.{new}', new.__spec__\n"
        "print(*[str(w.message) for w in said if w.category is DeprecationWarning], sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"meal_fast.{old} is now meal_fast.{new}" in done.stdout.splitlines()


def test_every_old_name_is_tested():
    assert {old.partition(".")[0] for old, _, _ in NAMES} == set(meal_fast._MOVED)


def test_what_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"meal_fast\.polices"):
        __import__("meal_fast.polices")


def test_the_engine_samples_under_its_old_name():
    assert Engine.sample is Engine.generate


def test_toy_objectives_of_old_runs_are_those_of_new_ones():
    old = load_objectives(["a=meal_fast.worlds:first", "b=meal_fast.worlds:second"])
    new = load_objectives(["a=world:first", "b=world:second"])
    texts = ["aab", "bbbbbb"]
    assert old.rewards(texts, texts).tolist() == new.rewards(texts, texts).tolist()
    with pytest.raises(ValueError, match="world:third"):
        load_objectives(["a=world:third", "b=world:second"])


def test_a_folder_that_names_them_so_is_read_as_one_of_today(tmp_path):
    names = ["first=meal_fast.worlds:first", "second=meal_fast.worlds:second"]
    held = to_dict(preset("tiny")) | {"objectives": names}
    (tmp_path / "config.json").write_text(json.dumps(held))
    assert read_config(tmp_path) == preset("tiny")  # so `--resume` and `compare` find no change


def test_a_preference_has_its_old_name():
    assert preferences.Weights is preferences.Preference
