"""Answers at any preference from a saved run, one prompt or line by line."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from meal_fast import chat
from meal_fast.data_types import Prompt
from meal_fast.rollout import Request, rollout
from tests.helpers.processes import assert_one_line
from tests.helpers.run_folder import build_run, tiny_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    policy = build_run(folder, tiny_config(), scale=0.3)
    return folder, policy


ROLES = ("user", "assistant")
GREEDY = ["--temperature", "0", "--max-new-tokens", "6"]


def greedy(policy, text, w, length=6, turns=()):
    history = [(role, said) for turn in turns for role, said in zip(ROLES, turn, strict=True)]
    requests = [Request(Prompt("x", text), w, history=tuple(history))]
    out = rollout(policy, requests, max_new_tokens=length, temperature=0.0, seed=0)
    return out.texts[0].strip()


def test_one_prompt_is_answered_by_the_trained_policy(run, capsys):
    folder, policy = run
    chat.main([str(folder), "--w", "first=0.8,second=0.2", "--prompt", "Write a new song.",
               *GREEDY])  # fmt: skip
    assert capsys.readouterr().out == greedy(policy, "Write a new song.", (0.8, 0.2)) + "\n"


def test_lines_are_answered_at_the_w_of_the_moment(run, capsys, monkeypatch):
    folder, policy = run
    lines = (
        "Write a new song.\n\n/w first=0,second=1\nWrite a new song.\n"
        "/w first=2,second=1\n/what\nWrite a new word.\n/quit\nWrite a new name.\n"
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    chat.main([str(folder), "--w", "1,0", *GREEDY])
    out, err = capsys.readouterr()
    asked = [
        ("Write a new song.", (1.0, 0.0)),
        ("Write a new song.", (0.0, 1.0)),
        ("Write a new word.", (0.0, 1.0)),
    ]
    assert out == conversation(policy, asked)
    assert "w is now first=0,second=1" in err
    assert "sums to 3" in err and "'/what': unknown" in err


def conversation(policy, asked):
    """What is said to each (text, w), behind all that was said before."""
    turns = []
    for text, w in asked:
        turns.append((text, greedy(policy, text, w, turns=turns)))
    return "".join(answer + "\n" for _, answer in turns)


def test_a_conversation_is_forgotten_by_new_and_help_says_what_there_is(run, capsys, monkeypatch):
    folder, policy = run
    lines = "Write a new song.\nWrite a new word.\n/new\nWrite a new word.\n/help\n/w\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    chat.main([str(folder), "--w", "1,0", *GREEDY])
    out, err = capsys.readouterr()
    song, word = ("Write a new song.", (1.0, 0.0)), ("Write a new word.", (1.0, 0.0))
    behind, alone = conversation(policy, [song, word]), conversation(policy, [word])
    assert out == behind + alone and not behind.endswith(alone)
    assert "forgotten" in err and "w is first=1,second=0\n" in err
    for command in ("/w NAME=VALUE", "/new", "/help", "/quit", "single turns"):
        assert command in err


@pytest.mark.reliability("hour", "an answer that stops in mid-sentence without a mark")
def test_an_answer_that_is_cut_says_so_and_how_to_have_more_of_it(run, capsys):
    folder, policy = run
    ask = [str(folder), "--prompt", "Write a new song.", "--w", "1,0", "--temperature", "0"]
    chat.main([*ask, "--max-new-tokens", "2"])
    out, err = capsys.readouterr()
    assert out == greedy(policy, "Write a new song.", (1.0, 0.0), 2) + "\n"
    assert err == "[…] cut at 2 tokens; --max-new-tokens takes more\n"
    chat.main([*ask, "--max-new-tokens", "2", "--stop", out[0]])
    assert capsys.readouterr().err == ""
    chat.main([*ask, "--max-new-tokens", "99999"])
    assert capsys.readouterr().err.endswith("the model's context is full\n")


@pytest.mark.reliability("hour", "answers as short as the run's own")
def test_without_a_length_an_answer_has_256_tokens(run, capsys):
    chat.main([str(run[0]), "--prompt", "Write a new song.", "--temperature", "0"])
    assert capsys.readouterr().err == "[…] cut at 256 tokens; --max-new-tokens takes more\n"


def test_a_prompt_that_is_too_long_is_refused_in_one_line(run, capsys):
    with pytest.raises(SystemExit) as stop:
        chat.main([str(run[0]), "--prompt", "word " * 2000])
    assert stop.value.code == 2
    assert_one_line(capsys.readouterr().err, "a prompt of", "context", "shorten it")


def test_sampling_differs_by_seed_and_length_is_kept(run, capsys):
    folder, policy = run
    answers = []
    for seed in ("0", "0", "1"):  # of its own length: not the run's
        chat.main([str(folder), "--prompt", "Write a new song.", "--seed", seed,
                   "--max-new-tokens", "20", "--temperature", "2"])  # fmt: skip
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]
    short = [str(folder), "--prompt", "Write a new song.", "--temperature", "0", "--w", "1,0"]
    chat.main([*short, "--max-new-tokens", "2"])
    assert capsys.readouterr().out == greedy(policy, "Write a new song.", (1.0, 0.0), 2) + "\n"


@pytest.mark.parametrize("option", [["--top-k", "1"], ["--top-p", "1e-9"], ["--min-p", "1"]])
def test_truncated_to_one_token_it_is_greedy(run, capsys, option):
    folder, policy = run
    prompt = "Write a new song."
    chat.main([str(folder), "--prompt", prompt, "--temperature", "2", "--w", "1,0",
               "--max-new-tokens", "6", *option])  # fmt: skip
    assert capsys.readouterr().out == greedy(policy, prompt, (1.0, 0.0)) + "\n"


def test_a_stop_string_ends_the_answer(run, capsys):
    folder, policy = run
    whole = greedy(policy, "Write a new song.", (1.0, 0.0))
    stop = whole[0]
    chat.main([str(folder), "--prompt", "Write a new song.", *GREEDY, "--w", "1,0",
               "--stop", stop])  # fmt: skip
    said = capsys.readouterr().out.rstrip("\n")
    assert whole.startswith(said) and stop in said and len(said) < len(whole)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--w", "first=0.8"], "missing objective 'second'"),
        (["--w", "first=0.8,second=0.8"], "sums to 1.6"),
        (["--w", "first=nan,second=1"], "first is nan"),
        (["--w", "first=-1,second=2"], "first is negative"),
        (["--w", "kind=0.5,second=0.5"], "unknown objective 'kind'"),
        (["--temperature", "-1"], "--temperature=-1.0"),
        (["--max-new-tokens", "0"], "--max-new-tokens=0"),
        (["--top-k", "-1"], "--top-k=-1"),
        (["--top-p", "0"], "--top-p=0.0"),
        (["--min-p", "1.5"], "--min-p=1.5"),
        (["--stop", ""], "--stop=''"),
        (["--prompt", "  "], "--prompt=''"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, capsys, arguments, said):
    with pytest.raises(SystemExit) as stop:
        chat.main([str(run[0]), *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("meal-fast: error: ") and error.count("\n") == 1 and said in error


def test_as_a_program_with_piped_input(run):
    folder, policy = run
    done = subprocess.run(
        [sys.executable, "-m", "meal_fast.chat", str(folder), "--w", "1,0", *GREEDY],
        input="Write a new song.\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == greedy(policy, "Write a new song.", (1.0, 0.0)) + "\n"
