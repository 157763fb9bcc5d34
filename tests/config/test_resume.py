"""The command that goes on with a run works as it is printed."""

import json
import shlex

import pytest

from meal_fast.config.cli import parse_train
from meal_fast.config.config import to_dict
from meal_fast.config.resume import how_to_finish, resume_command
from meal_fast.config.run_dir import policy_folder
from tests.helpers.run_folder import tiny_config

OBJECTIVES = {
    "worlds": ["first=world:first", "second=world:second"],
    "code": ["first=evil:score", "second=world:second"],
    "a server": ["first=http://127.0.0.1:9/score", "second=world:second"],
}


@pytest.mark.reliability("message", "the printed command to go on, pasted: code, loggers, spaces")
@pytest.mark.parametrize("name", ["run", "my run", "it's $HOME;ls", "-run"])
@pytest.mark.parametrize("what", OBJECTIVES)
@pytest.mark.parametrize("logger", ["none", "wandb", "trackio"])
def test_the_command_is_taken(tmp_path, monkeypatch, name, what, logger):
    monkeypatch.chdir(tmp_path)
    config = tiny_config(objectives=OBJECTIVES[what], logger=logger)
    run = tmp_path.joinpath(name).relative_to(tmp_path)
    run.mkdir()
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    command = resume_command(run)
    assert ("--trust-run" in command) == (what != "worlds" or logger != "none")
    found, args = parse_train(shlex.split(command)[3:])
    assert found == config and args.resume and args.out.resolve() == run.resolve()
    # To a folder that may be a stranger's trust is never put where it is pasted with the rest.
    bare = command.removesuffix(" --trust-run")
    assert how_to_finish(run).startswith(f"`{bare}`")
    assert ("--trust-run if the run is your own" in how_to_finish(run)) == (bare != command)
    with pytest.raises(ValueError, match="no policy/ yet") as error:
        policy_folder(run)
    assert how_to_finish(run) in str(error.value)


@pytest.mark.reliability("message", "the command to go on with a run whose config.json is broken")
@pytest.mark.parametrize(
    "text", [None, b"", b"[]", b"\xff", b'{"objectives": 3, "logger": []}', b'{"objectives": [3]}']
)
def test_a_broken_config_is_harmless(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_bytes(text)
    assert resume_command(tmp_path) == f"python -m meal_fast.train --resume --out {tmp_path}"


@pytest.mark.reliability("lost", "the same command starts a run, and goes on with it")
def test_one_command_starts_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["tiny", "--out", "run", "--meta.steps", "3", "--resume-or-start"]
    config, args = parse_train(command)
    assert not args.resume
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.lock").write_text("")  # of one that was killed at once
    assert not parse_train(command)[1].resume
    (tmp_path / "run" / "config.json").write_text(json.dumps(to_dict(config)))
    assert parse_train(command) == (
        config,
        args.__class__(out=args.out, resume=True, evaluate=True),
    )
    # Without PRESET the configuration is the run's own, as with --resume.
    assert parse_train(["--out", "run", "--resume-or-start"])[0] == config
    assert not parse_train(["tiny", "--out", "run"])[1].resume
