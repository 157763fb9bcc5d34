"""A run folder is data: what its config.json names runs, or sends, only where the user says so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from meal_fast.config.cli import check_trust, parse_train
from meal_fast.config.config import from_dict, to_dict
from meal_fast.config.sources import FUNCTION
from meal_fast.config.trust import OWN
from meal_fast.data.objectives import load_objectives
from tests.helpers.processes import assert_one_line
from tests.helpers.run_folder import build_run, tiny_config

ROOT = Path(__file__).resolve().parents[2]
CODE = {
    "a file in the folder": "evil:score",
    "a module of Python's": "os:system",
    "a program on a terminal": "pty:spawn",
    "a function of ours": "meal_fast.evaluation.runner:run_all",
    "a method": "evil:Scorer.score",
    "a file's path": "./evil.py:score",
    "a file": "evil.py",
    "a name of our objectives and more": "meal_fast.data.measures:brief.__globals__",
}
SENT = {
    "a server": "http://127.0.0.1:9/score",
    "a server and a token": "https://example.org/score?token_env=OPENAI_API_KEY",
}
HARMLESS = (
    "world:first",
    "packaged:complied",
    "packaged:harmless?max_length=128",
    "Ray2333/gpt2-large-helpful-reward_model",
    "owner/name?prompt=%0AHuman: {prompt}&format=template:{prompt}{response}",
    *sorted(OWN),
)
EVIL = "open(r'{}', 'w').close()\ndef score(prompts, responses): return [0.0] * len(responses)\n"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "theirs"
    build_run(folder, tiny_config())
    return folder


@pytest.fixture
def run(built):
    """A function that makes the folder's config.json name a first objective."""
    config = json.loads((built / "config.json").read_text())

    def naming(source, **changes):
        values = config | changes | {"objectives": [f"first={source}", "second=world:second"]}
        (built / "config.json").write_text(json.dumps(values))
        return built

    yield naming
    (built / "config.json").write_text(json.dumps(config))
    for left in ("evil.py", "pwned"):
        (built / left).unlink(missing_ok=True)


def command(folder, *argv):
    """A command in a process of its own, in the folder, from which Python imports as well."""
    return subprocess.run(
        [sys.executable, "-m", *argv],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )


@pytest.mark.reliability("attack", "evaluate, resume and serve a folder whose objective is code")
@pytest.mark.parametrize("what", CODE)
@pytest.mark.parametrize(
    "argv",
    [
        ("meal_fast.evaluate", "."),
        ("meal_fast.serve", ".", "--port", "0"),
        ("meal_fast.train", "--resume", "--out", "."),
    ],
    ids=lambda argv: argv[0].rpartition(".")[2],
)
def test_code_that_a_folder_names_is_refused_in_one_line(run, what, argv):
    folder = run(CODE[what])
    (folder / "evil.py").write_text(EVIL.format(folder / "pwned"))
    ran = command(folder, *argv)
    assert ran.returncode == 2 and ran.stdout == ""
    assert_one_line(ran.stderr, CODE[what], "--trust-run", "--objectives")
    assert not (folder / "pwned").exists()


@pytest.mark.reliability("attack", "code that is also the name of a folder in the run")
@pytest.mark.parametrize("what", CODE)
def test_a_folder_of_that_name_makes_code_no_model(tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    (tmp_path / CODE[what]).mkdir(parents=True)
    imports = bool(FUNCTION.fullmatch(CODE[what]))
    config = from_dict({"objectives": [f"first={CODE[what]}", "second=world:second"]})
    if imports:
        with pytest.raises(ValueError, match=r"are Python code.*--trust-run"):
            check_trust(tmp_path, config, trusted=False)
    else:  # read as a model's folder, which has none
        check_trust(tmp_path, config, trusted=False)
        with pytest.raises(ValueError, match="objective 'first'"):
            load_objectives(config.objectives)


@pytest.mark.reliability("attack", "a folder with an empty folder named as a function is evaluated")
def test_an_empty_folder_named_as_a_function_opens_no_door(run):
    folder = run("evil:score")
    (folder / "evil.py").write_text(EVIL.format(folder / "pwned"))
    (folder / "evil:score").mkdir()
    try:
        ran = command(folder, "meal_fast.evaluate", ".", "--prompts", "1", "--grid", "2")
    finally:
        (folder / "evil:score").rmdir()
    assert ran.returncode == 2 and ran.stdout == ""
    assert_one_line(ran.stderr, "evil:score", "--trust-run")
    assert not (folder / "pwned").exists()


@pytest.mark.reliability("attack", "chat, report and export with a folder whose objective is code")
@pytest.mark.parametrize(
    "argv",
    [
        ("meal_fast.chat", ".", "--prompt", "Write a word.", "--max-new-tokens", "2"),
        ("meal_fast.report", "."),
        ("meal_fast.export", ".", "--out", "../exported"),
    ],
    ids=lambda argv: argv[0].rpartition(".")[2],
)
def test_what_needs_no_objectives_loads_none(run, argv):
    folder = run(CODE["a file in the folder"])
    (folder / "evil.py").write_text(EVIL.format(folder / "pwned"))
    ran = command(folder, *argv)
    assert ran.returncode == (2 if argv[0] == "meal_fast.report" else 0), ran.stderr
    assert not (folder / "pwned").exists()


@pytest.mark.parametrize(
    "said", [["--trust-run"], ["--objectives", "first=evil:score", "second=world:second"]]
)
def test_with_the_users_word_the_folder_is_evaluated(run, said):
    folder = run("evil:score")
    (folder / "evil.py").write_text(EVIL.format(folder / "pwned"))
    size = ["--prompts", "1", "--grid", "2", "--no-report"]
    ran = command(folder, "meal_fast.evaluate", ".", *size, *said)
    assert ran.returncode == 0, ran.stderr
    assert (folder / "pwned").exists()


@pytest.mark.reliability("attack", "a folder that sends prompts and answers to a stranger")
@pytest.mark.parametrize("what", SENT)
def test_a_server_that_a_folder_names_is_not_asked(run, what):
    folder = run(SENT[what])
    config = from_dict(json.loads((folder / "config.json").read_text()))
    with pytest.raises(ValueError, match=r"send prompts and answers .*--trust-run"):
        check_trust(folder, config, trusted=False)
    check_trust(folder, config, trusted=True)
    check_trust(folder, config, trusted=False, objectives=config.objectives)


@pytest.mark.parametrize("source", HARMLESS)
def test_what_is_only_read_needs_no_word(run, source):
    folder = run(source)
    config = from_dict(json.loads((folder / "config.json").read_text()))
    check_trust(folder, config, trusted=False)


def test_other_objectives_than_the_runs_are_no_repetition(run):
    folder = run("evil:score")
    config = from_dict(json.loads((folder / "config.json").read_text()))
    with pytest.raises(ValueError, match=r"'first=other:score' is not what config\.json"):
        check_trust(folder, config, trusted=False, objectives=["first=other:score"])


@pytest.mark.reliability("attack", "resuming a folder whose logger sends the answers away")
@pytest.mark.parametrize("logger", ["wandb", "trackio"])
def test_a_logger_that_sends_is_repeated_or_left(run, logger):
    folder = run("world:first", logger=logger)
    resume = ["--resume", "--out", str(folder)]
    with pytest.raises(ValueError, match=f"logger='{logger}'.*--logger none"):
        parse_train(resume)
    for said in (["--logger", "none"], ["--logger", logger], ["--trust-run"]):
        config, _ = parse_train([*resume, *said])
        assert config.logger == (said[1] if len(said) == 2 else logger)


@pytest.mark.reliability("attack", "a reward model of a folder that is a pickle or names code")
@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"pytorch_model.bin": "x"}, "pickle"),
        ({"config.json": '{"attn_implementation": "who/knows"}'}, "attn_implementation"),
        ({"config.json": '{"text_config": {"_attn_implementation": "a/b"}}'}, "attn_impl"),
        ({"adapter_config.json": '{"megatron_core": "evil"}'}, "megatron_core"),
        ({"config.json": "[" * 100_000}, "nested too deeply"),
        ({"config.json": "[]"}, "no table"),
    ],
)
def test_model_folders_that_a_run_names_are_weights_alone(run, tmp_path, files, said):
    model = tmp_path / "model"
    model.mkdir()
    for name, text in files.items():
        (model / name).write_text(text)
    quoted = str(model).replace("/", "%2F")
    for source in (str(model), f"packaged:complied?path={model}", f"x/y?path={quoted}"):
        folder = run(source)
        config = from_dict(json.loads((folder / "config.json").read_text()))
        with pytest.raises(ValueError, match=said):
            check_trust(folder, config, trusted=False)
        check_trust(folder, config, trusted=False, objectives=config.objectives)


def test_our_own_objectives_are_those_of_the_module():
    from meal_fast.data import measures

    functions = {n for n, f in vars(measures).items() if callable(f) and not n.startswith("_")}
    ours = {n for n in functions if getattr(measures, n).__module__ == measures.__name__}
    assert {f"meal_fast.data.measures:{name}" for name in ours} == OWN


@pytest.mark.reliability("attack", "a lattice of a billion preferences")
@pytest.mark.parametrize("section", ["preference", "evaluation"])
def test_a_lattice_has_an_end(section):
    with pytest.raises(ValueError, match=rf"{section}\.grid=1000000000.*more than 100000"):
        from_dict({section: {"grid": 10**9}})


def test_a_run_is_evaluated_by_the_command_that_trained_it(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def a(prompts, responses): return [float(r.count('a')) for r in responses]\n"
        "def b(prompts, responses): return [float(r.count('b')) for r in responses]\n"
    )
    size = ["--meta.steps", "1", "--rollout.prompts", "1", "--rollout.samples", "2"]
    size += ["--score.calibration", "16", "--evaluation.prompts", "1", "--evaluation.grid", "2"]
    mine = ["--objectives", "first=mine:a", "second=mine:b"]
    argv = ["meal_fast.train", "tiny", "--out", "run", "--no-report", *size, *mine]
    ran = command(tmp_path, *argv)
    assert ran.returncode == 0 and (tmp_path / "run/evaluation.json").is_file(), ran.stderr
    again = command(tmp_path, "meal_fast.train", "--resume", "--out", "run", "--no-report")
    assert again.returncode == 2 and "--trust-run" in again.stderr
    again = command(tmp_path, *argv[:5], "--resume", "--no-report", *mine, *size)
    assert again.returncode == 0, again.stderr


def test_a_comparison_repeats_what_its_user_named(tmp_path):
    from meal_fast.evaluation.comparison_spec import Run, parse

    argv = ["tiny", "--tokens", "100000", "--recipes", "grid-grpo", "--seeds", "0"]
    named = ["--objectives", "first=evil:score", "second=world:second"]
    plan, _ = parse([*argv, "--out", str(tmp_path), *named], "")
    run = Run(plan, plan.methods[0], 0)
    run.folder.mkdir(parents=True)
    (run.folder / "config.json").write_text(json.dumps(to_dict(run.config)))
    job = run.job()
    assert job.program == "train" and "--trust-run" not in job.argv
    config, args = parse_train(job.argv)
    assert args.resume and config == run.config
    plan, _ = parse([*argv, "--out", str(tmp_path), "--objectives_timeout", "99", *named], "")
    config, _ = parse_train(Run(plan, plan.methods[0], 0).job().argv)
    assert config.objectives_timeout == 99  # the kept run has more time, too
