"""The commands under one name, and the generated page of options."""

import subprocess
import sys
from importlib import import_module

import pytest

import meal_fast
from meal_fast import __main__ as commands
from meal_fast.config import PRESETS, Config, cli, options_page
from meal_fast.config.recipes import RECIPES


def test_help_lists_the_commands_without_torch():
    code = (
        "import sys; from meal_fast.__main__ import main; main(['--help'])\n"
        "print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *text, loaded = done.stdout.splitlines()
    assert loaded == "False False"
    for name in commands.COMMANDS:
        assert any(line.split()[:1] == [name] for line in text)


def test_no_command_is_help_and_the_version_is_told(capsys):
    commands.main([])
    assert capsys.readouterr().out == commands.usage() + "\n"
    commands.main(["--version"])
    assert capsys.readouterr().out == f"meal-fast {meal_fast.__version__}\n"


def test_every_command_is_a_module_with_a_main():
    for name in commands.COMMANDS:
        assert callable(import_module(f"meal_fast.{name}").main)


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_a_command_answers_help_as_its_module_does(name, capsys):
    with pytest.raises(SystemExit) as stop:
        commands.main([name, "--help"])
    assert not stop.value.code
    said = capsys.readouterr().out
    with pytest.raises(SystemExit):
        import_module(f"meal_fast.{name}").main(["--help"])
    assert said == capsys.readouterr().out and "usage: " in said


def test_arguments_reach_the_command(capsys):
    with pytest.raises(SystemExit) as stop:
        commands.main(["train", "--meta.stps", "3"])
    assert stop.value.code == 2
    assert "did you mean --meta.steps?" in capsys.readouterr().err


def test_an_unknown_command_is_one_line_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        commands.main(["trian", "quickstart"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "'trian'; did you mean train?" in err


def test_the_module_runs_as_a_command():
    command = [sys.executable, "-m", "meal_fast", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"meal-fast {meal_fast.__version__}\n"


def test_the_page_of_options_names_every_option_recipe_and_preset():
    page = options_page.options_page()
    for section, field, _ in cli.options(Config()):
        name = f"{section}.{field.name}" if section else field.name
        assert f"| `--{name}` |" in page
        assert field.metadata["help"].replace("|", "\\|") in page
    for name in [*RECIPES, *PRESETS]:
        assert f"`{name}`" in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in tables} <= {5, 7}


@pytest.mark.parametrize(
    ("started", "said"),
    [("/usr/bin/meal-fast", "meal-fast train"), ("/x/train.py", "python -m meal_fast.train")],
)
def test_usage_names_the_program_as_it_was_started(monkeypatch, capsys, started, said):
    monkeypatch.setattr(sys, "argv", [started])
    with pytest.raises(SystemExit):
        commands.main(["train", "--help"])
    assert capsys.readouterr().out.startswith(f"usage: {said} [PRESET]")


def test_the_command_line_s_parts_answer_without_a_parser():
    code = (
        "import sys\n"
        "from meal_fast.config import errors, options, options_page, weights\n"
        "print('meal_fast.config.cli' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_an_unknown_option_is_one_line_with_every_command(name, capsys):
    needs = {"evaluate": ["RUN"], "report": ["RUN"], "chat": ["RUN"], "compare": ["tiny"]}
    budget = ["--tokens", "1"] if name == "compare" else []
    with pytest.raises(SystemExit) as stop:
        commands.main([name, *needs.get(name, []), *budget, "--surplus-option", "3"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("meal-fast: error: ") and err.count("\n") == 1
    assert "--surplus-option" in err
