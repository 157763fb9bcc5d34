"""The comparison's command line: runs, resuming, failures, and what is wrong with what is asked."""

import json
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch

from meal_fast import compare
from meal_fast.config.config import from_dict
from meal_fast.config.presets import preset
from meal_fast.config.run_dir import shared_statistics
from meal_fast.evaluation import comparison_run, comparison_spec
from meal_fast.evaluation.comparison import Method
from tests.helpers.processes import ENVIRONMENT, ROOT, wait_for_updates

CHEAP = [
    "--rollout.prompts", "1", "--rollout.samples", "4", "--score.calibration", "4",
    "--evaluation.grid", "5", "--evaluation.prompts", "2", "--evaluation.samples", "1",
    "--evaluation.ask", "Who are you?",
]  # fmt: skip
STEP = 2 * 2 * 1 * 4 * 6  # tasks, updates, prompts, samples, tokens
BASE = ["tiny", "--tokens", str(2 * STEP), "--jobs", "0", *CHEAP]
TWO = ["--recipes", "weighted-meta-grpo,grid-grpo"]


def run(*argv):
    """The command line in this process: its exit code."""
    try:
        compare.main(list(map(str, argv)))
    except SystemExit as stop:
        return stop.code
    return 0


def stamps(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("runs/**/*") if p.is_file()}


def test_two_recipes_two_seeds_and_going_on(tmp_path, capsys, one_thread, monkeypatch):
    out = tmp_path / "c"
    first = [*BASE, *TWO, "--out", out, "--seeds", "0"]
    assert run(*first) == 0
    one = json.loads((out / "compare.json").read_text())
    assert [m["name"] for m in one["methods"]] == ["base model", "weighted-meta-grpo", "grid-grpo"]
    assert any("Fewer than three seeds" in note for note in one["notes"])
    kept = stamps(out)

    # another seed and an ablation: what is there stays, and all have the first run's statistics
    more = [*BASE, *TWO, "--out", out, "--seeds", "0,1", "--ablate", "beta=0.02,0.5@grid-grpo"]
    capsys.readouterr()
    # as if one had been stopped before its evaluation
    stopped = out / "runs/grid-grpo/seed-0"
    (stopped / "evaluation.json").unlink()
    monkeypatch.setattr(comparison_run, "code_version", lambda: "another")
    assert run(*more) == 0
    now = stamps(out)
    assert {p for p in kept if now[p] != kept[p]} <= set(stopped.rglob("*"))
    said = capsys.readouterr()
    assert "1 of 6 runs are finished" in said.err and "compare.html" in said.out
    folders = {p.parent for p in out.glob("runs/**/evaluation.json")}
    assert {str(f.relative_to(out / "runs")) for f in folders} == {
        *(f"{recipe}/seed-{s}" for recipe in ("weighted-meta-grpo", "grid-grpo") for s in (0, 1)),
        *(f"grid-grpo/grpo.beta=0.5/seed-{s}" for s in (0, 1)),
    }
    shared = (out / "statistics.json").read_bytes()
    assert all((f / "statistics.json").read_bytes() == shared for f in folders)

    result = json.loads((out / "compare.json").read_text())
    assert [m["name"] for m in result["methods"]] == [
        "base model", "weighted-meta-grpo", "grid-grpo", "grid-grpo beta=0.5",
    ]  # fmt: skip
    assert result["ablations"] == [
        {"options": ["grpo.beta"], "methods": ["grid-grpo", "grid-grpo beta=0.5"]}
    ]
    meta = result["methods"][1]
    assert meta["seeds"] == [0, 1] and meta["cost"]["updates"] >= 8
    # a run ends with the meta-step that reaches the budget
    assert 2 * STEP <= meta["cost"]["tokens"] < 3 * STEP and meta["cost"]["peak_bytes"] is None
    assert [w for w, _ in meta["asked"]] == [[1, 0], [0.8, 0.2], [0.2, 0.8], [0, 1]]
    # the mean of the runs' own figures, at each weight
    own = [
        json.loads((out / f"runs/weighted-meta-grpo/seed-{s}/evaluation.json").read_text())
        for s in (0, 1)
    ]
    for i, point in enumerate(meta["points"]["sampled"]):
        values = [e["results"]["policy"]["sampled"]["points"][i] for e in own]
        mean = sum(v["pu"]["value"] for v in values) / 2
        assert point["pu"]["value"] == pytest.approx(mean, abs=1e-5)
    # two kinds of code made these, one run by both
    note = next(n for n in result["notes"] if "one version of the code" in n)
    assert "and then another: grid-grpo/seed-0" in note and result["failed"] == []
    assert (out / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "grid-grpo beta=0.5" in (out / "compare.html").read_text()

    # a larger sweep: evaluated again, not trained again
    trained = {p: t for p, t in stamps(out).items() if p.name == "metrics.jsonl"}
    assert run(*first, "--evaluation.samples", "2") == 0
    assert {p: t for p, t in stamps(out).items() if p in trained} == trained
    assert json.loads((out / "compare.json").read_text())["settings"]["samples"] == 2

    for argv, words in (
        ([*first, "--grpo.beta", "0.3"], ": made with grpo.beta 0.02, now 0.3"),
        (["concave-front", *first[1:]], "a comparison with preset 'tiny', not 'concave-front'"),
        ([*first, "--tokens", str(3 * STEP)], f"tokens {2 * STEP}, not {3 * STEP}"),
    ):
        capsys.readouterr()
        assert run(*argv) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and words in err


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path, capsys, one_thread):
    out = tmp_path / "c"
    argv = [*BASE, "--recipes", "grid-grpo", "--seeds", "0", "--out", out]
    argv += ["--score.calibration", "32", "--ablate", "normalization=max"]
    broken = out / "runs/grid-grpo/policy.path=world:none/seed-0"
    assert run(*argv, "--ablate", "policy.path=world:none") == 1
    said = capsys.readouterr()
    assert "failed: grid-grpo/policy.path=world:none/seed-0: exit code 2" in said.err
    result = json.loads((out / "compare.json").read_text())
    names = ["base model", "grid-grpo", "grid-grpo normalization=max"]
    assert [m["name"] for m in result["methods"]] == names
    # another normalisation trains by statistics of its own, and is measured by everyone's
    own = out / "runs/grid-grpo/score.normalization=max/seed-0"
    trained, common = (
        json.loads((f / "statistics.json").read_text())["normalizer"] for f in (own, out)
    )
    assert (trained["mode"], common["mode"]) == ("max", "none")
    sweep = json.loads((own / "evaluation.json").read_text())["results"]["policy"]["sampled"]
    assert sweep["prompt_normalized"] == sweep["prompt_rewards"]
    assert "world:none" in result["failed"][0]["reason"] and not broken.exists()
    assert "These runs failed" in (out / "compare.html").read_text()


@pytest.mark.slow
def test_runs_in_processes_of_their_own_stopped_and_gone_on_with(tmp_path):
    out = tmp_path / "c"
    argv = ["tiny", "--tokens", str(40 * STEP), "--jobs", "2", *CHEAP, *TWO, "--seeds", "0,1"]
    command = [sys.executable, "-m", "meal_fast.compare", *argv, "--out", str(out)]
    options = {"cwd": ROOT, "env": ENVIRONMENT, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A shell starts what goes into its background with SIGINT ignored: not so here.
    unignored = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    first = subprocess.Popen(command, preexec_fn=unignored, **pipes, **options)
    wait_for_updates(first, out / "runs/weighted-meta-grpo/seed-0", 4)
    first.send_signal(signal.SIGINT)
    assert "the same command goes on" in first.communicate(timeout=300)[1]
    assert first.returncode == 130 and not (out / "compare.json").exists()
    begun = out / "runs/weighted-meta-grpo/seed-0/metrics.jsonl"
    kept = begun.read_text().splitlines()
    assert len(kept) >= 4

    ran = subprocess.run(command, capture_output=True, check=True, **options)
    result = json.loads((out / "compare.json").read_text())
    assert ran.stdout.splitlines()[-1] == str(out / "compare.html")
    assert all(m["seeds"] == [0, 1] and m["cost"]["peak_bytes"] > 0 for m in result["methods"][1:])
    assert begun.read_text().splitlines()[: len(kept)] == kept


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["tiny", "--recipes", "grid-gpro", "--tokens", "999"], "did you mean grid-grpo?"),
        (["tiny", "--seeds", "0,1,0", "--tokens", "999"], "'0' twice"),
        (["tiny", "--seeds", "0,,1", "--tokens", "999"], "a gap"),
        (["tiny", "--seeds", "a", "--tokens", "999"], "'a' is no whole number"),
        (["tiny", "--recipes", "grid-grpo,grid-grpo", "--tokens", "999"], "'grid-grpo' twice"),
        (["tiny", "--tokens", "95", *CHEAP], f"tokens=95: a meta-step alone makes up to {STEP}"),
        (["tinny", "--tokens", "999"], "did you mean tiny?"),
        (["tiny"], "--tokens"),
        (["tiny", "--tokens", "999", "--jobs", "-1"], "--jobs=-1"),
        (["tiny", "--tokens", "999", "--seed", "1"], "unknown option --seed"),
        (["tiny", "--tokens", "999", "--ablate", "beta"], "expected OPTION=VALUE"),
        (["tiny", "--tokens", "999", "--ablate", "bta=1"], "bta: unknown option"),
        (["tiny", "--tokens", "999", "--ablate", "beta=-1"], "grpo.beta=-1.0: must not be"),
        (["tiny", "--tokens", "999", "--ablate", "beta=1@none"], "'none' is not among --recipes"),
        (["tiny", "--tokens", "999", "--ablate", "seed=1"], "seed cannot be ablated"),
        (["tiny", "--tokens", "999", "--grpo.beta", "x"], "grpo.beta='x'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, argv, words):
    assert run(*argv, "--out", tmp_path / "c") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("meal-fast: error: ") and err.count("\n") == 1
    assert words in err and not (tmp_path / "c").exists()


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert run(*BASE, "--out", tmp_path) == 2
    assert "holds no comparison" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_what_ablations_mean():
    def methods(*ablate):
        argv = ["tiny", "--tokens", "99999", "--recipes", "weighted-meta-grpo,grid-grpo"]
        made, _ = comparison_spec.parse([*argv, *(x for a in ablate for x in ("--ablate", a))], "")
        return made.methods

    both = (Method("weighted-meta-grpo"), Method("grid-grpo"))
    low = (("preference.alpha", 0.5),)
    # alpha = 1 is what all runs have: no run of its own
    assert methods("alpha=0.5,1") == (*both, *(Method(m.recipe, low) for m in both))
    assert methods("alpha=0.5@grid-grpo") == (*both, Method("grid-grpo", low))
    two = (("preference.alpha", 0.5), ("meta.epsilon", 1.0))
    assert methods("alpha=0.5+meta.epsilon=1@grid-grpo") == (*both, Method("grid-grpo", two))
    assert Method("grid-grpo", two).folder == "grid-grpo/preference.alpha=0.5+meta.epsilon=1"
    names = [m.name for m in methods("normalization=tanh@grid-grpo", "grpo.lr=1e-3@grid-grpo")[2:]]
    assert names == ["grid-grpo normalization=tanh", "grid-grpo lr=0.001"]


def test_statistics_of_another_run_must_be_of_the_same_rewards(tmp_path):
    path = tmp_path / "statistics.json"
    config = from_dict({"score": {"statistics": str(path)}}, preset("tiny"))
    with pytest.raises(ValueError, match=r"no such file"):
        shared_statistics(config)
    values = {
        "names": ["first", "second"],
        "normalizer": {"mode": "none", "offset": [0, 0], "divisor": [1, 1]},
        "utopia": [1.1, 1.1],
        "mu_evaluation": 0.1,
        "calibration": {"mean": [0.5, 0.25], "std": [0.125, 0.5]},
    }
    path.write_text(json.dumps(values))
    assert shared_statistics(config) == path.read_bytes()
    assert shared_statistics(preset("tiny")) is None
    other = values["normalizer"] | {"mode": "max"}
    for changes, said in (
        ({"names": ["first", "third"]}, "made with objectives"),
        ({"normalizer": other}, "made with score.normalization 'max', not 'none'"),
        ({"normalizer": {"mode": "max"}}, r"lacks normalizer\.offset"),
        ({"utopia": ["<script>", 1.1]}, r"utopia\[0\]='<script>': must be a number"),
        ({"utopia": [1.1]}, "of 1 and 2 objectives"),
        ({"utopia": [1.2, 1.1]}, "made with score.utopia"),
    ):
        path.write_text(json.dumps(values | changes))
        with pytest.raises(ValueError, match=said):
            shared_statistics(config)
    del values["utopia"]
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="lacks utopia"):
        shared_statistics(config)


def test_shared_statistics_serve_recipes_that_need_the_standard_ones(tmp_path):
    """Meal asks for mean and deviation; the first run's recipe may not have."""
    from meal_fast.data.reward_statistics import Scales

    path = tmp_path / "statistics.json"
    reward = torch.tensor([[0.0, 1.0], [0.5, 3.0], [1.0, 2.0]])
    Scales.fit(reward, preset("tiny").score, standard=False).save(path, ("a", "b"), 0.1, reward)
    standard = Scales.load(path).standard
    assert standard.mode == "standard"
    assert standard.offset == pytest.approx((0.5, 2.0))
    assert standard.divisor == pytest.approx((0.5, 1.0))


def test_help_needs_no_torch():
    code = (
        "import sys; from meal_fast import compare\n"
        "try: compare.main(['--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)
