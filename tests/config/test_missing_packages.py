"""What a run does without a package that it needs late, or not at all: nothing computed is lost."""

import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers.processes import ENVIRONMENT, ROOT, SMALL, assert_one_line

BLOCKED = "import sys\nfor name in sys.argv.pop(1).split(','): sys.modules[name] = None\n"
TRAIN = ["train", "tiny", *SMALL, "--meta.steps", "1"]
OPTIONAL = "moocore,gguf,datasets,scipy,matplotlib"


def without(packages, program, *argv):
    """`python -m meal_fast.PROGRAM ARGV`, where `packages` cannot be imported."""
    code = BLOCKED + f"from meal_fast import {program} as program\nsys.exit(program.main())"
    command = [sys.executable, "-c", code, packages, *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)


def error(ran):
    (line,) = [x for x in ran.stderr.splitlines() if x.startswith("meal-fast: error")]
    assert ran.stderr.endswith(line + "\n") and "Traceback" not in ran.stderr
    return line + "\n"


def test_without_any_of_them_training_ends_with_its_policy(tmp_path):
    ran = without(OPTIONAL, *TRAIN, "--no-evaluate", "--out", tmp_path / "run")
    assert ran.returncode == 0, ran.stderr
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "policy")


@pytest.mark.reliability("lost", "a package that only the evaluation after training needs")
def test_what_comes_after_training_is_named_before_it(tmp_path):
    run = tmp_path / "run"
    ran = without("moocore", *TRAIN, "--out", run)
    assert ran.returncode == 2 and not run.exists()
    assert_one_line(error(ran), "moocore is not installed", "pip install moocore", "--no-evaluate")
    ran = without("matplotlib", *TRAIN, "--out", run)
    assert ran.returncode == 2 and not run.exists()
    assert_one_line(error(ran), "matplotlib is not installed", "the report", "--no-report")


def test_what_evaluation_and_report_need_is_named_and_goes_on_later(tmp_path):
    run = tmp_path / "run"
    ran = without("moocore", *TRAIN, "--evaluation.prompts", "1", "--no-evaluate", "--out", run)
    assert ran.returncode == 0 and "policy in" in ran.stdout
    evaluate = f"python -m meal_fast.evaluate {run}"
    ran = without("moocore", "evaluate", run)
    assert_one_line(error(ran), "moocore is not installed", "pip install moocore", evaluate)
    ran = without("matplotlib", "evaluate", run)
    assert ran.returncode == 2 and (run / "evaluation.json").exists()
    report = f"python -m meal_fast.report {run}"
    assert_one_line(error(ran), "matplotlib is not installed", "the report", report)
    ran = without("moocore", "report", run)  # of what is measured already
    assert ran.returncode == 0 and (run / "report.html").exists(), ran.stderr


@pytest.mark.parametrize(
    ("package", "argv"),
    [
        ("peft", [*TRAIN, "--policy.tuning", "lora"]),
        ("rich", TRAIN),
        ("datasets", [*TRAIN, "--prompts.train", "Anthropic/hh-rlhf"]),
        ("scipy", ["compare", "tiny", "--tokens", "999", "--recipes", "parm"]),
    ],
)
def test_what_is_needed_at_once_is_named_at_once(tmp_path, package, argv):
    ran = without(package, *argv, "--out", tmp_path / "run")
    assert ran.returncode == 2 and not (tmp_path / "run").exists()
    assert_one_line(error(ran), f"{package} is not installed", f"pip install {package}")
