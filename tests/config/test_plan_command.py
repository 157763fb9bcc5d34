"""`meal-fast plan` and `train --plan`: what cards that need not be here would hold and take."""

import subprocess
import sys
from pathlib import Path

import pytest

from meal_fast import plan as command
from meal_fast import train
from meal_fast.config import PRESETS, from_dict, preset
from meal_fast.config.hardware import CARDS
from meal_fast.config.mesh import Layout, layout
from meal_fast.config.model_shape import shape_of
from meal_fast.config.plan import plan
from meal_fast.config.scale_table import COUNTS, SIZES, quickest, table

ROOT = Path(__file__).resolve().parents[2]


def printed(capsys, *argv):
    command.main(list(argv))
    out, err = capsys.readouterr()
    return out, err


def refused(capsys, main, *argv):
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and not out and err.count("\n") == 1
    assert err.startswith("meal-fast: error: ")
    return err


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_plan_of_lines_that_fit(name, card, capsys):
    out, err = printed(capsys, name, "--card", card)
    assert all(len(line) <= 80 for line in out.splitlines())
    assert not err or (card == "cpu" and "do not fit on a card of 24 GB" in err)
    assert "not a measurement" in out.splitlines()[0] and "assumed" in out
    for word in (preset(name).policy.path, card, "a card holds", "a meta-step", "a checkpoint"):
        assert word in out


@pytest.mark.parametrize("cards", [1, 2, 8, 64, 1024, 1 << 20])
def test_lines_fit_whatever_the_number_of_cards(cards, capsys):
    mesh = ["--meta.tasks", "16", "--rollout.prompts", str(1 << 20)]
    out, _ = printed(capsys, "--model", "7B", "--cards", str(cards), *mesh)
    assert all(len(line) <= 80 for line in out.splitlines())
    assert f"{cards:,} process" in out and ("deltas between groups" in out) == (cards > 1)


def test_who_holds_what(capsys):
    options = ["--meta.tasks", "4", "--rollout.prompts", "8", "--mesh.virtual", "8"]
    out, _ = printed(capsys, "--cards", "16", "--mesh.shard", "2", *options)
    text = " ".join(out.split())
    assert "16 processes = 4 groups x 2 data x 2 shards; group g is rank 4 g to 4 g + 3" in text
    assert "1 of a meta-step's 4 a group: number 0, 1, 2, 3" in text
    assert "2 of an update's 8 a process, 32 answers; 8 virtual shards, 2 a process" in text
    assert "1/2 in a process (FSDP2), 2 neighbours hold them all" in text


def test_it_answers_without_torch_and_at_once():
    code = (
        "import sys, time; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from meal_fast.plan import main\n"
        "main(['--model', '70B', '--cards', '8', '--rollout.prompts', '8'])\n"
        "print(time.process_time() < 1)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "True", done.stderr


@pytest.mark.parametrize(
    "argv",
    [
        ["--model", "7B", "--cards", "8", "--rollout.prompts", "8", "--card-memory", "24"],
        ["--model", "7B", "--cards", "64", "--rollout.prompts", "64", "--policy.tuning", "full"],
    ],
)
def test_what_does_not_fit_is_said_with_a_remedy_that_works(argv, capsys):
    out, err = printed(capsys, *argv)
    assert err.count("\n") == 1 and " do not fit on a card of " in err
    assert "a card holds" in out  # the plan is there all the same
    remedy, _, more = (
        err.partition(": ")[2].partition("fit on a card")[2].partition(": ")[2].partition(" would")
    )
    assert ("policy.tuning=lora" in more) == ("full" in argv or "hh-qwen2" in argv)
    changes = [part for word in remedy.split() for part in f"--{word}".split("=")]
    assert changes
    _, err = printed(capsys, *argv, *changes)
    assert err == ""


def test_what_no_option_makes_fit_asks_for_cards(capsys):
    _, err = printed(capsys, "--model", "70B")
    assert "take more cards, or of more memory" in err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--cards", "8", "--mesh.shard", "3"], "mesh.shard=3: 8 processes"),
        (["--cards", "8", "--mesh.groups", "1", "--mesh.data", "3"], "is 3 processes, and 8"),
        (["--cards", "0"], "cards=0"),
        (["--cards", "two"], "invalid int"),
        (["--card", "zz"], "card='zz': not known; choose from h100"),
        (["--card-memory", "0"], "memory=0.0: must be positive"),
        (["--card-memory", "nan"], "memory=nan: must be positive"),
        (["--node", "0"], "node=0: must be positive"),
        (["--model", "nope"], "model='nope': its sizes are not known"),
        (["--prompt-tokens", "0"], "prompt-tokens=0.0: must be at least 1"),
        (["--response-tokens", "1e9"], "response-tokens=1000000000.0: must be 1 or more"),
        (["quikstart"], "did you mean quickstart?"),
        (["--crads", "3"], "did you mean --cards?"),
        (["--meta.tasks", "0"], "meta.tasks=0"),
    ],
)
def test_what_cannot_be_is_one_line(argv, said, capsys):
    assert said in refused(capsys, command.main, *argv)


def test_an_own_card_is_taken_with_its_figures(capsys):
    figures = ["--card-memory", "288", "--card-flops", "2500", "--card-bandwidth", "8000"]
    out, _ = printed(capsys, "--card", "b300", *figures)
    assert "1 x b300 of 288 GB (2500 TFLOP/s, 8 TB/s)" in out


def test_training_prints_its_plan_for_any_cards_and_does_nothing(tmp_path):
    """In a process in which torch cannot be imported."""
    run = tmp_path / "run"
    argv = ["hh-qwen2", "--plan", "--cards", "4", "--card", "a100", "--out", str(run)]
    code = (
        "import sys; sys.modules['torch'] = None\nfrom meal_fast.train import main\n"
        f"main({[*argv, '--rollout.prompts', '4']!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not run.exists(), done.stderr
    assert "meal-fast trains" in done.stdout and "4 x a100 of 80 GB" in done.stdout
    assert "2 groups x 2 data x 1 shard" in done.stdout and "not a measurement" in done.stdout
    assert all(len(line) <= 80 or str(run) in line for line in done.stdout.splitlines())


def test_training_s_plan_of_a_model_that_is_not_here_has_no_bytes(capsys):
    argv = ["--plan", "--policy.path", "some/model", "--cards", "2"]
    train.main(argv)
    out, _ = capsys.readouterr()
    assert "2 processes" in out and "not known before the model's config.json is here" in out


def test_a_run_takes_the_cards_that_it_is_started_on(capsys, tmp_path):
    out = ["--out", str(tmp_path / "run")]
    assert "add --plan" in refused(capsys, train.main, "tiny", "--cards", "2", *out)
    said = refused(capsys, train.main, "tiny", "--plan", "--cards", "2", "--mesh.groups", "3", *out)
    assert "mesh.groups=3" in said


def test_a_run_of_several_processes_says_who_holds_what():
    config = from_dict({"rollout": {"prompts": 8}}, preset("hh-qwen2"))
    laid, model = layout(config, 4), shape_of("0.5B")
    text = plan(config, Path("runs/x"), layout=laid, model=model, card=CARDS["h100"])
    assert all(len(line) <= 80 for line in text.splitlines())
    said = " ".join(text.split())
    assert "mesh 4 processes = 2 groups x 2 data x 1 shard" in said
    assert "a process at most: " in said and "sent by a process in a meta-step" in said
    assert "(arithmetic)" in said


def test_a_run_of_one_process_says_what_it_said():
    config, out = preset("quickstart"), Path("runs/x")
    assert plan(config, out, layout=Layout()) == plan(config, out)


def test_the_page_of_scale_has_the_table_of_the_command(capsys):
    out, _ = printed(capsys, "--table")
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert out in page, "put what `python -m meal_fast.plan --table` prints into docs/scale.md"


def test_the_table_has_a_row_for_each_and_none_that_does_not_fit():
    lines = table().splitlines()
    assert len(lines) == 2 + len(SIZES) * 2 * len(COUNTS)
    assert len({line.count("|") for line in lines}) == 1
    assert any("does not fit" in line for line in lines)
    for name in ("0.5B", "7B"):  # of 70B every card would hold all weights, to sample
        got = quickest(shape_of(name), "lora", CARDS["h100"], 1024)
        assert got is not None and got.fits and got.layout.world == 1024
        assert got.memory.most <= CARDS["h100"].memory
