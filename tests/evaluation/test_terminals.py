"""What a model, a prompt, a file or a name holds does nothing to the terminal that shows it."""

import json
import logging
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from meal_fast.common import printable, say, tell
from meal_fast.config.cli import fail, one_line_errors
from tests.helpers.run_folder import build_run, tiny_config

ROOT = Path(__file__).resolve().parents[2]
# What writes to the clipboard, moves the cursor, sets the title, turns the line around.
HOSTILE = "\x1b]52;c;cHduZWQ=\x07\x1b[2J\x1b]0;pwned\x07\x9b31m\x90q\x9c\r\u202e\b\x00\x7f"
# Our own: colours, the cursor and erasing, as the live line and line editing use them.
OURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")


def assert_plain(shown):
    left = OURS.sub("", shown)
    bad = {c for c in left if printable(c) != c and c not in "\n\t"}
    assert bad <= set(), (bad, shown[:2000])
    assert "\x1b]" not in shown and "\x1b[2J" not in shown


def on_a_terminal(argv, typed=b"", cwd=ROOT):
    """What stands on a terminal of a command's own: output, errors and echo together."""
    ours, theirs = pty.openpty()
    started = subprocess.Popen(
        [sys.executable, "-m", *argv],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "PYTHONPATH": str(ROOT)},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    os.write(ours, typed)
    shown, end = b"", time.monotonic() + 120
    try:
        while True:
            if not select.select([ours], [], [], max(0.0, end - time.monotonic()))[0]:
                started.kill()
                raise AssertionError(f"it did not end: {shown!r}")
            part = os.read(ours, 1 << 16)
            if not part:
                break
            shown += part
    except OSError:  # the other end is closed: it has ended
        pass
    os.close(ours)
    return started.wait(60), shown.decode(errors="replace")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A run whose model answers in ESC, BEL and CR: its tokenizer says them for a, b and c."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = tiny_config()
    build_run(folder, config, scale=0.3)
    base = folder.parent / "base"
    shutil.copytree(folder / "policy", base, ignore=shutil.ignore_patterns("adapter"))
    for place in (base, folder / "policy"):
        path = place / "tokenizer.json"
        values = json.loads(path.read_text())
        vocabulary = values["model"]["vocab"]
        for letter, control in (("a", "\x1b"), ("b", "\x07"), ("c", "\r")):
            byte = chr(256 + ord(control))  # as byte-level BPE writes it
            vocabulary[letter], vocabulary[byte] = vocabulary[byte], vocabulary[letter]
        path.write_text(json.dumps(values))
    named = json.loads((folder / "config.json").read_text())
    named["policy"]["path"] = str(base)
    (folder / "config.json").write_text(json.dumps(named))
    return folder


ASK = ("--prompt", "Write a word.", "--max-new-tokens", "8", "--w", "1,0")


@pytest.mark.reliability("attack", "a model that answers in escape sequences, in chat")
def test_chat_shows_no_control_character_of_a_model(built):
    code, shown = on_a_terminal(["meal_fast.chat", str(built), *ASK])
    assert code == 0 and "\ufffd" in shown, shown
    assert_plain(shown)
    typed = b"Write a word.\n/w \x01=1\n/\x07what\n/quit\n"
    code, shown = on_a_terminal(["meal_fast.chat", str(built), *ASK[2:]], typed)
    assert code == 0, shown
    said = shown.replace("\r\n", "\n").rpartition("/quit\n")[0].rpartition("unknown")[0]
    assert "\x1b]" not in said and "\x1b[2J" not in said


@pytest.mark.reliability("attack", "a model that answers in escape sequences, while it is trained")
def test_training_and_evaluation_show_none(built, tmp_path):
    base = built.parent / "base"
    size = ["--meta.steps", "1", "--rollout.prompts", "1", "--rollout.samples", "2"]
    size += ["--score.calibration", "8", "--evaluation.prompts", "1", "--evaluation.grid", "2"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"Write a {HOSTILE} word {i}." for i in range(60)))
    # rewards that a model of control characters can earn
    (tmp_path / "mine.py").write_text(
        "def first(prompts, responses): return [float(len(r.strip())) for r in responses]\n"
        "def second(prompts, responses): return [float(sum(map(ord, r))) for r in responses]\n"
    )
    rewards = ["--objectives", "first=mine:first", "second=mine:second"]
    more = ["--prompts.train", str(prompts), "--policy.path", str(base), "--prompts.max_tokens=999"]
    out = ["--out", str(tmp_path / "out"), "--no-report"]
    code, shown = on_a_terminal(
        ["meal_fast.train", "tiny", *out, *size, *more, *rewards], cwd=tmp_path
    )
    assert code == 0, shown
    assert "pwned" not in shown or "\ufffd" in shown
    assert_plain(shown)
    code, shown = on_a_terminal(
        ["meal_fast.evaluate", str(tmp_path / "out"), "--no-report", "--trust-run"], cwd=tmp_path
    )
    assert code == 0, shown
    assert_plain(shown)


PLACES = {
    "a path in config.json": {"policy": {"path": f"models/{HOSTILE}"}},
    "an objective's source": {"objectives": [f"first={HOSTILE}:x", "second=world:second"]},
    "an objective's name": {"objectives": [f"{HOSTILE}=world:first", "second=world:second"]},
    "an option": {HOSTILE: 1},
    "a recipe": {"recipe": HOSTILE},
    "prompts": {"prompts": {"evaluation": f"{HOSTILE}.jsonl"}},
}


@pytest.mark.reliability("attack", "escape sequences in names and options of a folder, as an error")
@pytest.mark.parametrize("what", PLACES)
def test_errors_show_none(built, tmp_path, what):
    run = shutil.copytree(built, tmp_path / "run")
    values = json.loads((run / "config.json").read_text())
    for name, changed in PLACES[what].items():
        inside = isinstance(changed, dict)
        values[name] = values[name] | changed if inside else changed
    values = json.loads(json.dumps(values).replace("\\u0000", ""))
    (run / "config.json").write_text(json.dumps(values))
    ran = subprocess.run(
        [sys.executable, "-m", "meal_fast.evaluate", str(run)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith("meal-fast: error: ") and ran.stderr.count("\n") == 1, ran.stderr
    assert printable(ran.stderr) == ran.stderr  # also where it is no terminal


@pytest.mark.reliability("attack", "a run folder whose name is an escape sequence")
@pytest.mark.parametrize("command", ["chat", "evaluate", "serve", "export", "report", "train"])
def test_a_folders_name_shows_none(tmp_path, command):
    run = tmp_path / HOSTILE.replace("\0", "")
    argv = ["--resume", "--out", str(run)] if command == "train" else [str(run)]
    code, shown = on_a_terminal([f"meal_fast.{command}", *argv])
    assert code == 2
    assert_plain(shown)
    if command == "train":  # which would begin with the default options
        return
    run.mkdir()
    (run / "config.json").write_text("{}")
    code, shown = on_a_terminal([f"meal_fast.{command}", *argv])
    assert code != 0
    assert_plain(shown)


@pytest.mark.reliability("attack", "escape sequences in warnings and in what libraries log")
def test_logs_and_warnings_of_a_command_show_none(capsys):
    @one_line_errors
    def main():
        logger = logging.getLogger("transformers.somewhere")
        handler = logging.StreamHandler(sys.stderr)
        logger.addHandler(handler)
        logger.warning("weights %s", HOSTILE)
        try:
            raise KeyError(HOSTILE)
        except KeyError:
            logger.exception("a step")
        logger.removeHandler(handler)
        sys.stderr.write(warnings.formatwarning(HOSTILE, UserWarning, "a.py", 1, "x"))
        tell(HOSTILE)
        fail(HOSTILE)

    before = warnings.formatwarning, logging.getLogRecordFactory()
    with pytest.raises(SystemExit):
        main()
    assert (warnings.formatwarning, logging.getLogRecordFactory()) == before
    err = capsys.readouterr().err
    assert err.count("pwned") >= 4 and printable(err) == err


def test_what_is_no_terminal_gets_a_path_as_it_is(capsys):
    say(HOSTILE)
    assert capsys.readouterr().out == HOSTILE + "\n"


@pytest.mark.reliability("message", "an error that repeats a megabyte of a file")
def test_a_very_long_error_is_cut(capsys):
    with pytest.raises(SystemExit):
        fail("begin " + "x" * 1_000_000 + " end")
    err = capsys.readouterr().err
    assert len(err) < 5000 and "begin" in err and err.endswith("end\n")
