"""The sweep on a real, tiny policy and exact rewards, from memory and from the command line."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from meal_fast import evaluate as command
from meal_fast.data import toy
from meal_fast.data.objectives import load_objectives
from meal_fast.data.preferences import lattice
from meal_fast.data.reward_statistics import Normalizer
from meal_fast.data_types import Prompt
from meal_fast.evaluation import evaluator as ev
from meal_fast.evaluation.metrics import spearman
from tests.helpers.run_folder import NAMES, build_run, tiny_config, tiny_policy

PROMPTS = tuple(Prompt(f"p{i}", t) for i, t in enumerate(toy.world_prompts("tiny", "train")[:5]))
UTOPIA = (1.1, 1.1)


def identity():
    return Normalizer.fit(torch.tensor([[1.0, 1.0], [0.0, 0.0]]), "max")


def sweep(config, policy, **options):
    objectives = load_objectives(config.objectives, torch.device("cpu"))
    return ev.evaluate(policy, objectives, identity(), UTOPIA, 0.1, PROMPTS, config, **options)


@pytest.fixture(scope="module")
def config():
    return tiny_config()


@pytest.fixture(scope="module")
def policy(config):
    return tiny_policy(config)


@pytest.fixture(scope="module")
def result(config, policy):
    return sweep(config, policy)


def test_every_answer_is_there_and_prompts_are_computed_once_a_sweep(config, policy, result):
    chosen = [p["text"] for p in result["prompts"]]
    assert len(chosen) == 5
    weights = lattice(2, 5)
    assert [tuple(w) for w in result["weights"]] == list(weights)
    suffixes = sum(len(policy.encode_suffix(w)) for w in weights)
    once = sum(len(policy.encode_prompt(text)) + suffixes for text in chosen)
    for model in ev.MODELS:
        for mode, answers in (("greedy", 25), ("sampled", 50)):
            entry = result["results"][model][mode]
            assert entry["answers"] == answers
            assert entry["prefill_tokens"] == (once if mode == "greedy" else 0)  # once for both
            assert 0 < entry["tokens"] <= answers * 6


def test_measures_are_those_of_the_rewards_of_the_answers(result):
    """The stored rewards of the greedy answers shown, recomputed from their text."""
    for answer in result["answers"]:
        want = {"first": toy.first([""], [answer["text"]])[0]}
        want["second"] = toy.second([""], [answer["text"]])[0]
        assert answer["reward"] == pytest.approx(want, abs=1e-5)
        i = [tuple(w) for w in result["weights"]].index(tuple(answer["w"]))
        j = [p["id"] for p in result["prompts"]].index(answer["prompt"])
        stored = result["results"][answer["model"]]["greedy"]["prompt_rewards"][i][j]
        assert stored == pytest.approx(list(want.values()), abs=1e-5)
    assert {a["model"] for a in result["answers"]} == {"base", "trained"}
    texts = {a["text"] for a in result["answers"]}
    assert len(texts) > 1


@pytest.mark.parametrize("mode", ev.MODES)
def test_summary_follows_from_the_rewards_per_prompt(result, mode):
    w = np.array(result["weights"])
    volumes = {}
    for model in ev.MODELS:
        entry = result["results"][model][mode]
        reward = np.array(entry["prompt_rewards"])  # the normaliser is the identity here
        mean = reward.mean(1)
        shown = [[p["raw"][n]["value"] for n in NAMES] for p in entry["points"]]
        np.testing.assert_allclose(shown, mean, atol=1e-5)
        for k, name in enumerate(NAMES):
            rho = spearman(w[:, k], mean[:, k])
            got = entry["spearman"][name]["value"]
            assert got is None if np.isnan(rho) else got == pytest.approx(float(rho), abs=1e-5)
            raw = entry["ends"][name]["raw"]
            ends = mean[w[:, k] == 1, k].mean() - mean[w[:, k] == 0, k].mean()
            assert raw["value"] == pytest.approx(ends, abs=1e-5)
            assert raw["low"] <= raw["value"] + 1e-6 and raw["value"] <= raw["high"] + 1e-6
        volumes[model] = entry["hypervolume"]["value"]
    difference = result["difference"][mode]["hypervolume"]["value"]
    assert difference == pytest.approx(volumes["trained"] - volumes["base"], abs=1e-5)


def test_pu_is_the_mean_smooth_tchebycheff_shortfall(result):
    """Greedy: one answer a prompt, so PU follows from the rewards per prompt."""
    entry = result["results"]["trained"]["greedy"]
    reward, w = np.array(entry["prompt_rewards"]), np.array(result["weights"])[:, None]
    shortfall = 0.1 * np.log(np.exp(w * (np.array(UTOPIA) - reward) / 0.1).sum(-1))
    assert entry["pu"]["value"] == pytest.approx(shortfall.mean(), abs=1e-5)
    seen = np.array(result["seen"])
    assert seen.tolist() == [True, False, True, False, True]  # trained on 3 weights a side
    assert entry["pu_seen"]["value"] == pytest.approx(shortfall[seen].mean(), abs=1e-5)
    assert entry["pu_unseen"]["value"] == pytest.approx(shortfall[~seen].mean(), abs=1e-5)


def test_one_reference_point_lies_below_every_point_of_both_models(result):
    points = np.array(
        [
            [p["normalized"][n]["value"] for n in NAMES]
            for model in ev.MODELS
            for mode in ev.MODES
            for p in result["results"][model][mode]["points"]
        ]
    )
    want = points.min(0) - 0.1 * (points.max(0) - points.min(0))
    np.testing.assert_allclose(result["reference_point"], want, atol=1e-5)
    best = max(result["results"][m]["sampled"]["hypervolume"]["value"] for m in ev.MODELS)
    assert best > 0


def test_base_is_the_model_before_training(config, result):
    """The untrained policy differs from its base by exactly nothing, the trained one does."""
    same = sweep(config, tiny_policy(config, scale=0.0))
    for mode in ev.MODES:
        base, trained = (same["results"][m][mode]["prompt_rewards"] for m in ev.MODELS)
        assert base == trained == result["results"]["base"][mode]["prompt_rewards"]
        assert base != result["results"]["trained"][mode]["prompt_rewards"]
        assert same["difference"][mode]["pu"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_same_seed_same_result_and_another_seed_other_samples(config, policy, result):
    def content(r):
        timed = ("seconds", "tokens_per_second")
        return {
            (model, mode): {k: v for k, v in entry.items() if k not in timed}
            for model, modes in r["results"].items()
            for mode, entry in modes.items()
        }

    again = content(sweep(config, policy))
    assert again == content(result)
    other = content(sweep(tiny_config(seed=1), policy))
    rewards = "prompt_rewards"
    assert other["base", "greedy"][rewards] == again["base", "greedy"][rewards]
    assert other["base", "sampled"][rewards] != again["base", "sampled"][rewards]


def test_three_objectives(policy):
    three = tiny_config(
        objectives=["first=world:first", "second=world:second",
                    "third=world:first"],
        evaluation={"grid": 3, "prompts": 2, "samples": 1},
    )  # fmt: skip
    r = ev.evaluate(
        tiny_policy(three),
        load_objectives(three.objectives, torch.device("cpu")),
        Normalizer.fit(torch.eye(3), "max"),
        (1.1,) * 3,
        0.1,
        PROMPTS,
        three,
        reference_point=(-0.5, -0.5, -0.5),
    )
    assert len(r["weights"]) == 6 and r["reference_point"] == [-0.5] * 3
    assert r["results"]["base"]["sampled"]["hypervolume"]["value"] >= 0.125
    assert r["results"]["trained"]["greedy"]["violations"]["third"]["of"] == 6


def test_prompts_that_are_all_too_long_are_refused(policy):
    with pytest.raises(ValueError, match="none of 5 prompts has at most 2 tokens"):
        sweep(tiny_config(prompts={"max_tokens": 2}), policy)


# --- the command line --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    build_run(folder, config)
    return folder


def test_command_line_evaluates_a_saved_run(run, tmp_path, capsys):
    command.main(
        [str(run), "--prompts", "2", "--samples", "1", "--grid", "3", "--out", str(tmp_path)]
    )
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert len(written["weights"]) == 3 and len(written["prompts"]) == 2
    held_out = set(toy.world_prompts("tiny", "evaluation"))
    assert {p["text"] for p in written["prompts"]} <= held_out
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "hypervolume" in capsys.readouterr().out
    assert not (run / "evaluation.json").exists()


def test_saved_and_reloaded_policy_answers_as_in_memory(run, config, tmp_path):
    command.main([str(run), "--out", str(tmp_path)])
    reloaded = json.loads((tmp_path / "evaluation.json").read_text())
    statistics = json.loads((run / "statistics.json").read_text())
    in_memory = ev.evaluate(
        tiny_policy(config),
        load_objectives(config.objectives, torch.device("cpu")),
        Normalizer.from_dict(statistics["normalizer"]),
        statistics["utopia"],
        statistics["mu_evaluation"],
        [Prompt(p["id"], p["text"]) for p in reloaded["prompts"]],
        config,
    )
    assert reloaded["answers"] == in_memory["answers"]
    for mode in ev.MODES:
        got = reloaded["results"]["trained"][mode]["prompt_rewards"]
        assert got == in_memory["results"]["trained"][mode]["prompt_rewards"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{run}", "--grid", "1"], "evaluation.grid=1"),
        (["{run}", "--prompts", "0"], "evaluation.prompts=0"),
        (["{run}", "--gird", "3"], "unknown option --gird"),
        (["{empty}"], "no config.json"),
        (["{unfinished}"], "no policy/ yet"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, capsys, arguments, said):
    (tmp_path / "unfinished").mkdir()
    for name in ("config.json", "statistics.json"):
        (tmp_path / "unfinished" / name).write_bytes((run / name).read_bytes())
    places = {"run": run, "empty": tmp_path, "unfinished": tmp_path / "unfinished"}
    with pytest.raises(SystemExit) as stop:
        command.main([a.format(**places) for a in arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("meal-fast: error: ") and error.count("\n") == 1 and said in error


def test_help_and_bad_input_need_no_torch(tmp_path):
    code = (
        "import sys; from meal_fast import evaluate, chat, report\n"
        "for main in (evaluate.main, chat.main, report.main):\n"
        "    try: main([sys.argv[1]])\n"
        "    except SystemExit as stop: assert stop.code == 2\n"
        "    else: raise AssertionError\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)
