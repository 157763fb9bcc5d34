"""What a run is about to do, said from its options alone."""

import subprocess
import sys
from pathlib import Path

import pytest

from meal_fast.config import PRESETS, from_dict, preset
from meal_fast.config.plan import plan
from meal_fast.config.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[2]


def said(config, **how):
    return " ".join(plan(config, Path("runs/x"), **how).split())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_says_what_a_person_wants_to_know(name):
    config = preset(name)
    text = said(config)
    for objective in config.objectives:
        assert objective.replace("=", " = ", 1) in text
    meta = config.meta
    assert f"{meta.steps * meta.tasks * meta.n_inner} = {meta.steps} meta-steps" in text
    for word in (config.recipe, config.policy.path, config.prompts.train, "runs/x/report.html"):
        assert word in text
    assert f"{config.rollout.samples} answers" in text and "completions.jsonl" in text
    assert not any(word in text for word in ("min ", "hour", "about"))  # nothing was timed yet


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_a_plan_of_lines_that_fit(recipe):
    tuning = {"policy": {"tuning": "bilinear"}} if recipe == "parm" else {}
    lines = plan(from_dict({"recipe": recipe, **tuning}), Path("runs/x")).splitlines()
    assert recipe in lines[0] and all(len(line) <= 80 for line in lines)


def test_what_is_not_done_is_not_announced():
    config = from_dict({"completions": False, "score": {"statistics": "other/statistics.json"}})
    text = said(config, evaluate=False)
    assert "metrics.jsonl" in text
    for word in ("report.html", "completions.jsonl", "sweep", "calibrate", "supervised start"):
        assert word not in text
    assert "report.html" not in said(config, report=False)


def test_what_differs_is_said():
    options = {
        "warmup": {"steps": 24},
        "preference": {"per_prompt": 2},
        "meta": {"tokens": 115_000},
        "policy": {"device": "cuda:1"},
    }
    text = said(from_dict(options), resume=True)
    for word in ("supervised start of 24 steps", "x 2 preferences x", "until 115,000 tokens"):
        assert word in text
    assert text.startswith("meal-fast goes on with runs/x") and "device cuda:1" in text


def test_it_is_on_the_screen_before_torch_is_imported(tmp_path):
    """The plan and the first stage are said by a process in which torch cannot be imported."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from meal_fast.train import main\n"
        f"main(['tiny', '--out', {str(tmp_path / 'run')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert lines[0].startswith("meal-fast trains ") and "meal-fast: loading PyTorch" in lines
    assert done.returncode == 2 and lines[-1] == (
        "meal-fast: error: torch is not installed: pip install torch"
    )


def test_a_folder_that_does_not_fit_is_refused_before_that(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from meal_fast.train import main\n"
        f"main(['tiny', '--out', {str(tmp_path / 'full')!r}])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "exists" in done.stderr
