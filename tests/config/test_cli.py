"""The command line: what it accepts, in which order, and what it says to a mistake."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from meal_fast.config import cli
from meal_fast.config.config import Config, choices_of, from_dict, to_dict
from meal_fast.config.options import unit
from meal_fast.config.presets import PRESETS, preset

ROOT = Path(__file__).resolve().parents[2]


def error_of(capsys, *argv: str) -> str:
    """The one line that a command line with `argv` leaves on stderr, with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        cli.one_line_errors(lambda: cli.parse_train(argv))()
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.startswith("meal-fast: error: ") and err.count("\n") == 1
    return err


def test_help_needs_no_torch_and_under_a_second():
    code = (
        "import sys, time; begin = time.perf_counter()\n"
        "from meal_fast.config import cli\n"
        "try: cli.parse_train(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "print(time.perf_counter() - begin, *sorted({m.partition('.')[0] for m in sys.modules}))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *text, last = ran.stdout.splitlines()
    seconds, *modules = last.split()
    assert not {"torch", "numpy", "transformers"} & set(modules)
    assert float(seconds) < 1.0
    assert any("--meta.steps" in line for line in text)


def test_train_help_answers_at_once():
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "meal_fast.train", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines()}
    assert "meal_fast.config.cli" in imported and "torch" not in imported
    assert "--meta.steps" in ran.stdout


def test_help_lists_every_option_with_the_preset_s_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.parse_train(["hh-qwen2", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for section, field, _ in cli.options(Config()):
        name = f"--{section}.{field.name}" if section else f"--{field.name}"
        assert f"{name} " in text
        assert field.metadata["help"].split()[0] in text
    assert "Number T of meta-steps [P]. (default: 400)" in text


def test_every_option_round_trips_through_flags():
    for name in PRESETS:
        argv = [name]
        for section, field, value in cli.options(preset(name)):
            argv.append(f"--{section}.{field.name}" if section else f"--{field.name}")
            argv += map(str, value if isinstance(value, tuple) else [value])
        config, _ = cli.parse_train(argv)
        assert config == preset(name)


def test_preset_then_file_then_flags(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("seed = 7\n[meta]\nsteps = 5\ntasks = 3\n[score]\nutopia = [1, 0.5]\n")
    argv = ["hh-qwen2", "--config", str(file), "--meta.steps", "9"]
    config, args = cli.parse_train(argv)
    assert (config.meta.steps, config.meta.tasks, config.seed) == (9, 3, 7)
    assert config.score.utopia == (1.0, 0.5)
    assert config.meta.n_inner == preset("hh-qwen2").meta.n_inner
    assert config.policy.path == "Qwen/Qwen2-0.5B-Instruct"
    assert args == cli.TrainArgs(out=Path("runs/hh-qwen2"), resume=False, evaluate=True)


def test_the_order_of_preset_and_options_is_free():
    one = cli.parse_train(["hh-qwen2", "--out", "x", "--resume", "--no-evaluate"])
    two = cli.parse_train(["--no-evaluate", "--resume", "--out", "x", "hh-qwen2"])
    assert one == two
    assert one[1] == cli.TrainArgs(out=Path("x"), resume=True, evaluate=False)


def test_default_folders(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("seed = 7\n")
    assert cli.parse_train([])[1].out == Path("runs/quickstart")
    assert cli.parse_train(["--config", str(file)])[1].out == Path("runs/mine")
    assert cli.parse_train([])[0] == preset("quickstart")


def test_negative_numbers_and_lists():
    config, _ = cli.parse_train(["--score.utopia", "-0.5", "1"])
    assert config.score.utopia == (-0.5, 1.0)
    config, _ = cli.parse_train(["--score.utopia"])
    assert config.score.utopia == ()
    argv = "--objectives a=m:f b=m:g c=m:h --seed 3 --warmup.steps 0".split()
    config, _ = cli.parse_train(argv)
    assert config.names == ("a", "b", "c") and config.seed == 3


def test_resume_takes_the_run_s_own_configuration(tmp_path):
    held = from_dict({"meta": {"steps": 11}, "seed": 5}, preset("hh-qwen2"))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(held)))
    assert cli.parse_train(["--resume", "--out", str(tmp_path)])[0] == held
    changed, args = cli.parse_train(["--resume", "--out", str(tmp_path), "--meta.steps", "12"])
    assert changed == dataclasses.replace(held, meta=dataclasses.replace(held.meta, steps=12))
    assert args.resume
    # A preset that is named counts, so that the trainer can say which options differ.
    assert (
        cli.parse_train(["quickstart", "--resume", "--out", str(tmp_path)])[0]
        == PRESETS["quickstart"]
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["qickstart"], ["preset='qickstart'", "did you mean quickstart?"]),
        (["nothing-like-it"], ["preset='nothing-like-it'", "quickstart, "]),
        (["quickstart", "surplus"], ["'surplus'"]),
        (["--meta.stps", "3"], ["unknown option --meta.stps", "did you mean --meta.steps?"]),
        (["--meta-steps=3"], ["unknown option --meta-steps", "--meta.steps"]),
        (["--lr", "3"], ["unknown option --lr", "--grpo.lr"]),
        (["--meta.step", "3"], ["unknown option --meta.step;"]),  # no abbreviations
        (["--zzz"], ["unknown option --zzz", "--help"]),
        (["--out"], ["--out"]),
        (["--recipe", "ppo"], ["recipe='ppo'", "weighted-meta-grpo"]),
        (["--policy.dtype", "int8"], ["policy.dtype='int8'", "bfloat16"]),
        (["--meta.steps", "many"], ["meta.steps='many'", "whole number"]),
        (["--meta.steps", "2.5"], ["meta.steps='2.5'", "whole number"]),
        (["--grpo.lr", "nan"], ["grpo.lr=nan", "finite"]),
        (["--meta.n_inner", "1"], ["meta.n_inner=1", "at least 2"]),
        (["--rollout.samples", "1"], ["rollout.samples=1", "at least 2"]),
        (["--objectives", "a=b"], ["objectives=", "two or more"]),
        (["--config", "/nowhere/x.toml"], ["/nowhere/x.toml", "cannot be read"]),
        (["--resume", "--out", "/nowhere"], ["/nowhere", "no config.json"]),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(capsys, argv, words):
    line = error_of(capsys, *argv)
    for word in words:
        assert word in line


def test_a_broken_config_in_the_run_folder(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{")
    assert "config.json is not JSON" in error_of(capsys, "--resume", "--out", str(tmp_path))


def test_one_line_errors_joins_lines_and_lets_other_errors_through(capsys, monkeypatch):
    monkeypatch.delenv("MEAL_FAST_TRACEBACK", raising=False)

    @cli.one_line_errors
    def main(error):
        raise error

    with pytest.raises(SystemExit) as stop:
        main(ValueError("first\n  second"))
    assert stop.value.code == 2
    assert capsys.readouterr().err == "meal-fast: error: first second\n"
    with pytest.raises(RuntimeError):
        main(RuntimeError("a fault of ours keeps its traceback"))
    monkeypatch.setenv("MEAL_FAST_TRACEBACK", "1")
    with pytest.raises(ValueError, match="first"):
        main(ValueError("first"))


NAMES = ("helpful", "harmless")


@pytest.mark.parametrize(
    "text",
    [
        "helpful=0.8,harmless=0.2",
        "harmless=0.2, helpful=0.8",
        "0.8,0.2",
        " helpful = .8,harmless=.2",
    ],
)
def test_parse_weights(text):
    assert cli.parse_weights(text, NAMES) == (0.8, 0.2)


def test_parse_weights_accepts_the_rounding_of_thirds():
    assert sum(cli.parse_weights("0.3333333,0.3333333,0.3333334", "abc")) == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("helpful=0.8,harmless=0.3", "sums to 1.1"),
        ("helpful=1.2,harmless=-0.2", "harmless is negative"),
        ("helpful=nan,harmless=1", "helpful is nan"),
        ("helpful=inf,harmless=0", "helpful is inf"),
        ("helpful=0.8,harmful=0.2", "unknown objective 'harmful'"),
        ("helpful=1", "missing objective 'harmless'"),
        ("helpful=0.5,helpful=0.5", "repeated objective 'helpful'"),
        ("helpful=0.8,0.2", "unknown objective"),
        ("0.2,0.3,0.5", "3 numbers for 2 objectives"),
        ("1", "1 numbers for 2 objectives"),
        ("", "1 numbers for 2 objectives"),
        ("helpful=much,harmless=0.2", "'much', not a number"),
    ],
)
def test_parse_weights_refuses(text, words):
    with pytest.raises(ValueError) as caught:
        cli.parse_weights(text, NAMES)
    message = str(caught.value)
    assert repr(text) in message and words in message
    assert "helpful=...,harmless=..." in message and "\n" not in message


def test_every_help_is_a_sentence():
    for section, field, _ in cli.options(Config()):
        text = field.metadata["help"].removesuffix(" [P].").removesuffix(" [R].")
        assert text[0].isupper() and (text.endswith(".") or text != field.metadata["help"]), (
            f"{section}.{field.name}: {text}"
        )


def test_every_field_has_help_and_a_type_the_command_line_knows():
    for section, field, _ in cli.options(Config()):
        where = f"{section}.{field.name}"
        assert field.metadata["help"], where
        assert choices_of(str(field.type)) or unit(field) in ("str", "int", "float", "bool"), where
