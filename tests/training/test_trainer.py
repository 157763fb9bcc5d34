"""The train command on the tiny world: what it leaves behind, stopping, going on, and mistakes."""

import collections
import dataclasses
import itertools
import json
import math
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from meal_fast import chat, evaluate
from meal_fast.config.presets import preset
from meal_fast.config.run_dir import read_config
from meal_fast.data.toy import build_world
from meal_fast.training.trainer import Trainer
from tests.helpers.checkpoints import part_size, saved
from tests.helpers.processes import (
    ENVIRONMENT,
    ROOT,
    SMALL,
    assert_one_line,
    assert_same_runs,
    refused,
    start,
    stopped,
    train_here,
    updates,
    wait_for_updates,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def handlers_put_back():
    """The train command installs signal handlers, and leaves them."""
    signals = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in signals]
    yield
    for number, handler in zip(signals, handlers, strict=True):
        signal.signal(number, handler)


# ---- a whole run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """`python -m meal_fast.train tiny`, in a process of its own: its folder and standard output."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    ran = subprocess.run(
        [sys.executable, "-m", "meal_fast.train", "tiny", "--out", str(run)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return run, ran.stdout


def test_a_run_leaves_everything(whole):
    run, said = whole
    names = {path.name for path in run.iterdir()}
    assert names == {
        "config.json", "template.json", "statistics.json", "metrics.jsonl", "completions.jsonl",
        "ckpt", "policy", "policy.json", "cost.json",
        "evaluation.json", "front.png", "report.html",
    }  # fmt: skip
    config = preset("tiny")
    rows = updates(run)
    count = config.meta.steps * config.meta.tasks * config.meta.n_inner
    assert [row["update"] for row in rows] == list(range(count))
    for row in rows:
        last_of_step = row["update"] % 4 == 3
        assert ("delta_norm" in row) == last_of_step
        numbers = [row[name] for name in ("loss", "grad_norm", "kl", "entropy", "lr", "score")]
        assert np.isfinite(numbers).all() and row["grad_norm"] > 0
        assert sum(row["w"]) == pytest.approx(1) and len(row["w"]) == 2
        assert set(row["rewards"]) == {"first", "second"}
        assert row["tokens"] <= 2 * 8 * 6 and 1 <= row["length"] <= 6
    # On the policy's own samples the ratio is 1 and nothing is clipped; KL starts at the base.
    assert rows[0]["ratio"] == pytest.approx(1, abs=1e-4) and rows[0]["clip_fraction"] == 0
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-5) and rows[-1]["kl"] > 1e-3
    cosine = [(1 + np.cos(np.pi * i / count)) / 2 for i in range(count)]
    assert [row["lr"] for row in rows] == pytest.approx([config.grpo.lr * c for c in cosine])
    assert [row["epsilon"] for row in rows[3::4]] == pytest.approx([1.5, 1.125, 0.75, 0.375])
    assert "policy in" in said and "report.html" in said


def test_the_policy_is_a_standard_folder(whole):
    run, _ = whole
    merged = AutoModelForCausalLM.from_pretrained(run / "policy")
    base = AutoModelForCausalLM.from_pretrained(build_world("tiny"))
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        before, after = base(ids).logits, merged(ids).logits
        adapted = PeftModel.from_pretrained(base, run / "policy" / "adapter")(ids).logits
    assert not torch.allclose(before, after, atol=1e-3)
    torch.testing.assert_close(adapted, after, atol=1e-5, rtol=1e-5)


def test_statistics_are_the_base_model_s(whole):
    held = json.loads((whole[0] / "statistics.json").read_text())
    assert held["utopia"] == [1.1, 1.1] and held["mu_evaluation"] == 0.1
    assert held["calibration"]["responses"] == 16
    assert all(0 < mean < 1 for mean in held["calibration"]["mean"])


# ---- going on to the same bits


@pytest.mark.parametrize(
    ("recipe", "tuning", "adam"),
    [
        ("weighted-meta-grpo", "lora", "persist_v"),
        ("weighted-meta-grpo", "full", "persist_v"),
        ("weighted-meta-grpo", "lora", "per_preference"),
        ("grid-grpo", "lora", "persist_v"),
        ("grid-grpo", "full", "persist_v"),
        ("mo-odpo", "full", "persist_v"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, recipe, tuning, adam):
    argv = ["tiny", *SMALL, "--recipe", recipe, "--policy.tuning", tuning, "--meta.adam", adam,
            "--meta.steps", "6", "--no-evaluate"]  # fmt: skip
    assert train_here(*argv, "--out", str(tmp_path / "straight")) == 0

    config = read_config(tmp_path / "straight")
    # In the middle of a meta-step, as the signal handler does.
    assert stopped(config, tmp_path / "broken", after=5).step == 2
    assert train_here(*argv, "--out", str(tmp_path / "broken"), "--resume") == 0
    assert_same_runs(tmp_path / "broken", tmp_path / "straight")


def test_metrics_after_the_checkpoint_are_dropped_and_made_again(tmp_path):
    """What a kill leaves: a checkpoint older than the log, and half a line at its end."""
    argv = ["tiny", *SMALL, "--meta.steps", "3", "--checkpoint_every", "1", "--no-evaluate"]
    run, straight = tmp_path / "run", tmp_path / "straight"
    assert train_here(*argv, "--out", str(straight)) == 0
    trainer = Trainer(read_config(straight), run)
    trainer.on_update = lambda metrics: setattr(trainer, "stop_requested", True)
    assert not trainer.train()
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"update": 4, "seconds": {"rollout": 1}}\n{"update": 5, "sco')
    (run / "ckpt/step-2.tmp").mkdir()
    (run / "ckpt/step-2.tmp/rank-00000.safetensors").write_bytes(b"half")
    assert train_here("--resume", "--no-evaluate", "--out", str(run)) == 0  # the run's own config
    assert updates(run) == updates(straight)
    assert not list(run.rglob("*.tmp"))


def test_stopped_before_its_first_checkpoint_it_starts_again(tmp_path):
    argv = ["tiny", *SMALL, "--meta.steps", "2", "--no-evaluate"]
    straight, run, bare = tmp_path / "straight", tmp_path / "run", tmp_path / "bare"
    assert train_here(*argv, "--out", str(straight)) == 0
    run.mkdir()
    shutil.copy(straight / "config.json", run)
    (run / "metrics.jsonl").write_text('{"update": 0}\n')
    assert train_here(*argv, "--resume", "--out", str(run)) == 0
    bare.mkdir()
    (bare / "config.json.tmp").write_text("{")  # killed while it wrote its very first file
    assert train_here(*argv, "--out", str(bare)) == 0
    assert updates(run) == updates(bare) == updates(straight)


# ---- signals to a real process

LONG = ["tiny", *SMALL, "--meta.steps", "25", "--checkpoint_every", "50", "--no-evaluate"]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "straight"
    process = start(*LONG, "--out", str(run))
    assert process.wait() == 0
    return updates(run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves(tmp_path, straight, number):
    run = tmp_path / "run"
    process = start(*LONG, "--out", str(run))
    wait_for_updates(process, run, 3)
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert "go on with python -m meal_fast.train --resume" in err
    step = saved(run).step
    assert 1 <= step < 25 and len(updates(run)) == 4 * step  # a whole number of meta-steps
    assert train_here(*LONG, "--resume", "--out", str(run)) == 0
    assert updates(run) == straight


# ---- mistakes: exit code 2, one line, and no run folder

CONSTANT = "def score(prompts, responses):\n    return {}\n"
BROKEN = {
    "boom": "def score(prompts, responses):\n    raise KeyError('lost')\n",
    "short": "def score(prompts, responses):\n    return [0.5]\n",
    "nan": CONSTANT.format("[0.5] + [float('nan')] * (len(responses) - 1)"),
    "inf": CONSTANT.format("[float('inf')] * len(responses)"),
    "late": CONSTANT.format("[1.0 if len(r) > 3 and r[3] != ' ' else 1 / 0 for r in responses]"),
}


@pytest.fixture
def functions(tmp_path, monkeypatch):
    """Modules with broken objectives, importable."""
    for name, text in BROKEN.items():
        (tmp_path / f"objective_{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["tinny"], ["'tinny'", "did you mean tiny"]),
        (["tiny", "--recipe", "reptile"], ["recipe='reptile'", "weighted-meta-grpo"]),
        (["tiny", "--meta.stepz", "3"], ["--meta.stepz", "--meta.steps"]),
        (["tiny", "--rollout.samples", "1"], ["rollout.samples=1", "at least 2"]),
        (["tiny", "--meta.n_inner", "1"], ["meta.n_inner=1", "Reptile", "without an outer loop"]),
        (["tiny", "--policy.path", "nowhere"], ["policy.path='nowhere'", "packaged:NAME"]),
        (["tiny", "--policy.path", "world:flat"], ["world:flat", "concave-front"]),
        (["tiny", "--policy.path", "{tmp}"], ["policy.path=", "no config.json"]),
        (["tiny", "--prompts.train", "{tmp}/no.txt"], ["no.txt", "No such file"]),
        (["tiny", "--prompts.train", "{tmp}/empty.txt"], ["empty.txt", "no prompts"]),
        (["tiny", "--prompts.train", "{tmp}/bad.jsonl"], ["bad.jsonl", "line 3", "not JSON"]),
        (["tiny", "--prompts.max_tokens", "1"], ["prompts.train='world:tiny'", "1 tokens"]),
    ],
)
def test_a_mistake_costs_one_line(tmp_path, capfd, argv, words):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": "b"\n')
    run = tmp_path / "run"
    filled = [a.replace("{tmp}", str(tmp_path)) for a in argv]
    refused(capfd, [*filled, "--out", str(run)], *words)
    assert not run.exists()


def test_a_logger_without_its_package_is_refused_first(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run = tmp_path / "run"
    refused(
        capfd, ["tiny", "--logger", "wandb", "--out", str(run)], "logger='wandb'", "pip install"
    )
    assert not run.exists()


def test_tensorboard_gets_every_update(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    argv = ["tiny", "--out", str(run), "--no-evaluate", "--logger", "tensorboard"]
    assert train_here(*argv, "--meta.steps", "1") == 0
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    rows = updates(run)
    logged = events.Scalars("kl")
    assert [event.step for event in logged] == [row["update"] for row in rows]
    assert [event.value for event in logged] == pytest.approx([row["kl"] for row in rows])
    assert [e.value for e in events.Scalars("w0")] == pytest.approx([row["w"][0] for row in rows])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("boom", ["KeyError", "lost", "row 0"]),
        ("short", ["shape (1,)", "2 responses"]),
        ("nan", ["nan", "row 1"]),
        ("inf", ["inf", "row 0"]),
        ("gone", ["cannot be imported"]),
    ],
)
def test_a_broken_objective_is_named_before_the_policy_is_loaded(
    tmp_path, capfd, functions, name, words
):
    run = tmp_path / "run"
    argv = ["tiny", "--objectives", "first=world:first",
            f"spoilt=objective_{name}:score", "--out", str(run)]  # fmt: skip
    refused(capfd, argv, "'spoilt'", *words)
    assert not run.exists()


def test_an_objective_that_fails_later_is_named_with_its_row(tmp_path, capfd, functions):
    run = tmp_path / "run"
    argv = ["tiny", "--objectives", "first=world:first", "spoilt=objective_late:score",
            "--rollout.max_new_tokens", "3", "--out", str(run)]  # fmt: skip
    refused(capfd, argv, "'spoilt' raised ZeroDivisionError", "row ")


def test_a_folder_in_use(tmp_path, capfd, whole):
    run, _ = whole
    kept = (run / "metrics.jsonl").read_bytes()
    refused(capfd, ["tiny", "--out", str(run)], str(run), "add --resume")
    other = tmp_path / "notes"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    refused(capfd, ["tiny", "--out", str(other)], str(other), "name another folder")
    refused(capfd, ["tiny", "--out", str(other), "--resume"], str(other), "no run to resume")
    file = other / "thesis.txt"
    refused(capfd, ["tiny", "--out", str(file)], "is a file")
    refused(capfd, ["tiny", "--out", str(file / "run")], "Not a directory")
    assert (run / "metrics.jsonl").read_bytes() == kept and file.read_text() == "mine"


def test_resuming_with_another_config_names_what_differs(capfd, whole):
    run, _ = whole
    kept = (run / "metrics.jsonl").read_bytes()
    argv = ["tiny", "--out", str(run), "--resume", "--grpo.lr", "0.5", "--seed", "3"]
    refused(capfd, argv, "grpo.lr (0.005 -> 0.5)", "seed (0 -> 3)")
    argv = ["tiny", "--out", str(run), "--resume", "--meta.steps", "9", "--checkpoint_every", "1"]
    assert train_here(*argv) == 2
    err = capfd.readouterr().err
    assert_one_line(err, "meta.steps (4 -> 9)")
    assert "checkpoint_every" not in err and "grpo.lr" not in err  # the one may change
    assert (run / "metrics.jsonl").read_bytes() == kept


@pytest.mark.parametrize(
    ("w", "words"),
    [
        ("first=0.8,second=0.3", "sums to 1.1"),
        ("first=1.2,second=-0.2", "second is negative"),
        ("first=nan,second=1", "first is nan"),
        ("0.2,0.3,0.5", "3 numbers for 2 objectives"),
    ],
)
def test_chat_refuses_a_w_off_the_simplex(capfd, whole, w, words):
    with pytest.raises(SystemExit) as stop:
        chat.main([str(whole[0]), "--prompt", "Write a note.", "--w", w])
    assert stop.value.code == 2
    assert_one_line(capfd.readouterr().err, words, repr(w))


def test_evaluate_refuses_what_is_no_finished_run(tmp_path, capfd, whole):
    half = tmp_path / "half"
    half.mkdir()
    for name in ("config.json", "statistics.json"):
        shutil.copy(whole[0] / name, half)
    for argv, words in (
        ([str(tmp_path / "none")], "config.json"),
        ([str(half)], "no policy/ yet"),
        ([str(whole[0]), "--grid", "1"], "evaluation.grid=1"),
    ):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(argv)
        assert stop.value.code == 2
        assert_one_line(capfd.readouterr().err, words)


# ---- no space


def test_no_space_is_noticed_before_training(tmp_path, capfd, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    run = tmp_path / "run"
    refused(capfd, ["tiny", "--out", str(run)], str(run), "0.0 MB free", "more space")
    assert not run.exists()


def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one_good(tmp_path):
    """The system refuses to write the second checkpoint of a real process, as a full disk does."""
    argv = ["tiny", *SMALL, "--meta.steps", "400", "--checkpoint_every", "1", "--no-evaluate"]
    run = tmp_path / "run"
    process = start(*argv, "--out", str(run))
    wait_for_updates(process, run, 5)  # the second meta-step: there is a checkpoint of the first
    give_up = time.monotonic() + 60
    while not (run / "ckpt/LATEST").exists():  # it is written while the training goes on
        assert process.poll() is None and time.monotonic() < give_up
        time.sleep(0.001)
    size = part_size(run, 0)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size // 2, size // 2))
    _, err = process.communicate()
    assert process.returncode == 2, err
    assert_one_line(
        err[err.rindex("meal-fast: error") :], "out=", "last checkpoint is good", "--resume"
    )
    assert not list(run.rglob("*.tmp"))

    resumed = Trainer(read_config(run), run, resume=True)
    straight = Trainer(read_config(run), tmp_path / "straight")
    reached = resumed.step + 1
    for trainer in (resumed, straight):
        trainer.on_update = lambda metrics, t=trainer: setattr(
            t, "stop_requested", metrics["meta_step"] + 1 == reached
        )
        assert not trainer.train()
    assert updates(run) == updates(tmp_path / "straight")
    assert len(updates(run)) == 4 * reached


@pytest.mark.usefixtures("one_thread")
def test_a_budget_of_tokens_ends_the_run_and_leads_its_schedules(tmp_path):
    tiny = preset("tiny")
    config = dataclasses.replace(
        tiny, meta=dataclasses.replace(tiny.meta, tokens=900), recipe="weighted-meta-grpo"
    )
    trainer = Trainer(config, tmp_path / "run")
    assert trainer.updates is None
    assert trainer.train()
    rows = updates(tmp_path / "run")
    spent = list(itertools.accumulate(row["tokens"] for row in rows))
    ends = spent[3::4]  # of the meta-steps, two tasks of two updates
    assert len(rows) % 4 == 0 and ends[-1] >= 900 and all(n < 900 for n in ends[:-1])
    assert rows[-1]["progress"] == 1.0
    before = [0, *spent[:-1]]
    for row, tokens in zip(rows, before, strict=True):
        cosine = 0.5 * (1 + math.cos(math.pi * min(tokens / 900, 1)))
        assert row["lr"] == pytest.approx(config.grpo.lr * cosine)
    for i, row in enumerate(rows[3::4]):
        assert row["epsilon"] == pytest.approx(1.5 * (1 - before[4 * i] / 900))
