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
from tests.helpers.run_folder import build_run, tiny_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    policy = build_run(folder, tiny_config(), scale=0.3)
    return folder, policy


def greedy(policy, text, w, length=6):
    requests = [Request(Prompt("x", text), w)]
    out = rollout(policy, requests, max_new_tokens=length, temperature=0.0, seed=0)
    return out.texts[0].strip()


def test_one_prompt_is_answered_by_the_trained_policy(run, capsys):
    folder, policy = run
    chat.main([str(folder), "--w", "first=0.8,second=0.2", "--prompt", "Write a new song.",
               "--temperature", "0"])  # fmt: skip
    assert capsys.readouterr().out == greedy(policy, "Write a new song.", (0.8, 0.2)) + "\n"


def test_lines_are_answered_at_the_w_of_the_moment(run, capsys, monkeypatch):
    folder, policy = run
    lines = (
        "Write a new song.\n\n/w first=0,second=1\nWrite a new song.\n"
        "/w first=2,second=1\n/what\nWrite a new word.\n/quit\nWrite a new name.\n"
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    chat.main([str(folder), "--w", "1,0", "--temperature", "0"])
    out, err = capsys.readouterr()
    asked = [
        ("Write a new song.", (1.0, 0.0)),
        ("Write a new song.", (0.0, 1.0)),
        ("Write a new word.", (0.0, 1.0)),
    ]
    assert out == "".join(greedy(policy, *a) + "\n" for a in asked)
    assert "w is now first=0,second=1" in err
    assert "sums to 3" in err and "'/what': unknown" in err


def test_sampling_differs_by_seed_and_length_is_kept(run, capsys):
    folder, policy = run
    answers = []
    for seed in ("0", "0", "1"):
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
    chat.main([str(folder), "--prompt", prompt, "--temperature", "2", "--w", "1,0", *option])
    assert capsys.readouterr().out == greedy(policy, prompt, (1.0, 0.0)) + "\n"


def test_a_stop_string_ends_the_answer(run, capsys):
    folder, policy = run
    whole = greedy(policy, "Write a new song.", (1.0, 0.0))
    stop = whole[0]
    chat.main([str(folder), "--prompt", "Write a new song.", "--temperature", "0", "--w", "1,0",
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
        [sys.executable, "-m", "meal_fast.chat", str(folder), "--w", "1,0", "--temperature", "0"],
        input="Write a new song.\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == greedy(policy, "Write a new song.", (1.0, 0.0)) + "\n"
