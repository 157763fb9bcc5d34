"""The commands that the pages show are understood, and what their Python imports exists."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from meal_fast.__main__ import COMMANDS
from meal_fast.config.cli import parse_train
from meal_fast.config.plan_cli import parse_plan
from meal_fast.evaluation.comparison_spec import parse

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PLACEHOLDER = re.compile(r"[\[…]|\b(?:RUN|PRESET|DIR|N|J)\b")  # what a reader is to fill in


def commands() -> list[list[str]]:
    """`meal-fast …` of the pages' fences and backticks, with nothing left to fill in."""
    found = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        lines = re.findall(r"^meal-fast .+$", text, re.M) + re.findall(r"`(meal-fast [^`]+)`", text)
        found |= {line.partition(" #")[0].strip() for line in lines}
    return [shlex.split(line)[1:] for line in sorted(found) if not PLACEHOLDER.search(line)]


def imports() -> list[tuple[str, str]]:
    """(module, name) of each `from meal_fast… import …`."""
    found = set()
    for page in PAGES:
        lines = re.findall(
            r"^from (meal_fast[\w.]*) import ([\w, ]+)", page.read_text(encoding="utf-8"), re.M
        )
        found |= {(module, name.strip()) for module, names in lines for name in names.split(",")}
    return sorted(found)


@pytest.mark.parametrize("argv", commands(), ids=" ".join)
def test_commands_are_understood(argv):
    command, *rest = argv
    assert command in COMMANDS
    if command == "train":
        parse_train(rest)
    elif command == "compare":
        parse(rest, "")
    elif command == "plan":
        parse_plan(rest)


def test_all_kinds_are_seen():
    assert {"train", "compare", "chat", "evaluate"} <= {argv[0] for argv in commands()}
    assert ("meal_fast.ops", "group_advantages") in imports()


@pytest.mark.parametrize(("module", "name"), imports())
def test_imports_are_there(module, name):
    if module.startswith("meal_fast.integrations."):  # the framework may not be installed
        source = Path(importlib.import_module(module).__file__).read_text(encoding="utf-8")
        assert re.search(
            rf"^(def|class) {name}\b|^ *if name == \"{name}\"|\"{name}\"", source, re.M
        )
        return
    assert hasattr(importlib.import_module(module), name)
