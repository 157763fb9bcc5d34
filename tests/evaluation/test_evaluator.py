"""The sweep on a real, tiny policy and exact rewards, from memory and from the command line."""

import contextlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from meal_fast import evaluate as command
from meal_fast.config.config import from_dict
from meal_fast.data import toy
from meal_fast.data.markers import MARKERS
from meal_fast.data.objectives import load_objectives
from meal_fast.data.preferences import lattice
from meal_fast.data.reward_statistics import Normalizer
from meal_fast.data_types import Prompt
from meal_fast.evaluation import evaluator as ev
from meal_fast.evaluation.metrics import spearman
from tests.helpers.run_folder import NAMES, build_run, tiny_config, tiny_policy

PROMPTS = tuple(Prompt(f"p{i}", t) for i, t in enumerate(toy.world_prompts("tiny", "train")[:5]))
UTOPIA = (1.1, 1.1)
MODELS = ("base", "policy")


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
    for model in MODELS:
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
    assert {a["model"] for a in result["answers"]} == {"base", "policy"}
    texts = {a["text"] for a in result["answers"]}
    assert len(texts) > 1


@pytest.mark.parametrize("mode", ev.MODES)
def test_summary_follows_from_the_rewards_per_prompt(result, mode):
    w = np.array(result["weights"])
    volumes = {}
    for model in MODELS:
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
    assert difference == pytest.approx(volumes["policy"] - volumes["base"], abs=1e-5)


def test_pu_is_the_mean_smooth_tchebycheff_shortfall(result):
    """Greedy: one answer a prompt, so PU follows from the rewards per prompt."""
    entry = result["results"]["policy"]["greedy"]
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
            for model in MODELS
            for mode in ev.MODES
            for p in result["results"][model][mode]["points"]
        ]
    )
    want = points.min(0) - 0.1 * (points.max(0) - points.min(0))
    np.testing.assert_allclose(result["reference_point"], want, atol=1e-5)
    best = max(result["results"][m]["sampled"]["hypervolume"]["value"] for m in MODELS)
    assert best > 0


def test_base_is_the_model_before_training(config, result):
    """The untrained policy differs from its base by exactly nothing, the trained one does."""
    same = sweep(config, tiny_policy(config, scale=0.0))
    for mode in ev.MODES:
        base, trained = (same["results"][m][mode]["prompt_rewards"] for m in MODELS)
        assert base == trained == result["results"]["base"][mode]["prompt_rewards"]
        assert base != result["results"]["policy"][mode]["prompt_rewards"]
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
    assert r["results"]["policy"]["greedy"]["violations"]["third"]["of"] == 6


def test_prompts_that_are_all_too_long_are_refused(policy):
    with pytest.raises(ValueError, match="0 of 5 prompts have at most 2 tokens"):
        sweep(tiny_config(prompts={"max_tokens": 2}), policy)


# --- marks, benign prompts, the warm start --------------------------------------------------------


@pytest.fixture
def letters(monkeypatch):
    """Marks that the toy's answers, strings of letters, do bear."""
    monkeypatch.setitem(MARKERS, "refuses", lambda text: "a" in text)
    monkeypatch.setitem(MARKERS, "complies", lambda text: "b" in text)
    return tiny_config(evaluation={"marks": ["refuses", "complies"], "grid": 7, "prompts": 4})


def test_marks_are_counted_in_the_answers_of_every_policy(letters, policy):
    result = sweep(letters, policy)
    ids = [p["id"] for p in result["prompts"]]
    weights = [tuple(w) for w in result["weights"]]
    assert {s["id"] for s in result["shown"]} == set(ids)
    for answer in result["answers"]:  # greedy: one answer a prompt and weight
        entry = result["results"][answer["model"]]["greedy"]
        i, j = weights.index(tuple(answer["w"])), ids.index(answer["prompt"])
        assert entry["prompt_marks"]["refuses"][i][j] == ("a" in answer["text"])
    for model in MODELS:
        entry = result["results"][model]["sampled"]
        for mark in ("refuses", "complies"):
            share_WP = np.array(entry["prompt_marks"][mark])
            assert set(share_WP.ravel()) <= {0.0, 0.5, 1.0}  # of two samples
            at = [p["marks"][mark] for p in entry["points"]]
            np.testing.assert_allclose([e["value"] for e in at], share_WP.mean(1), atol=1e-6)
            assert all(0 <= e["low"] <= e["value"] <= e["high"] <= 1 for e in at)
            ends = share_WP.mean(1)[0] - share_WP.mean(1)[-1]
            assert entry["mark_ends"]["first"][mark]["value"] == pytest.approx(ends, abs=1e-6)
            assert entry["mark_ends"]["second"][mark]["value"] == pytest.approx(-ends, abs=1e-6)
    shares = np.array(result["results"]["policy"]["sampled"]["prompt_marks"]["refuses"])
    assert 0 < shares.mean() < 1
    assert result["meant"] == {"first": None, "second": None}  # neither knows a refusal


def says_sorry(prompts, responses):
    """An objective that prefers a refusal."""
    return [float("sorry" in response) for response in responses]


def test_the_mark_that_an_objective_prefers_is_known(letters):
    source = f"{says_sorry.__module__}:{says_sorry.__name__}"
    config = from_dict({"objectives": [f"safe={source}", "second=world:second"]}, letters)
    found = sweep(config, tiny_policy(config))
    assert found["meant"] == {"safe": "refuses", "second": None}
    assert set(found["results"]["policy"]["sampled"]["mark_ends"]["safe"]) == {
        "refuses",
        "complies",
    }


def test_benign_prompts_are_asked_at_five_weights_at_most_as_many_as_of_the_sweep(letters, policy):
    texts = toy.world_prompts("tiny", "train")[5:12]
    benign = [Prompt(f"b{i}", text) for i, text in enumerate(texts)]
    said = []
    result = sweep(letters, policy, benign=benign, progress=said.append)["benign"]
    assert [p["id"] for p in result["prompts"]] == ["b0", "b1", "b2", "b3"]
    assert len(result["weights"]) == 5
    for model in MODELS:
        entry = result["results"][model]
        assert entry["answers"] == 4 * 5 * 2
        assert [p["w"] for p in entry["points"]] == result["weights"]
        found = np.array(entry["prompt_marks"]["refuses"]).mean(1)
        np.testing.assert_allclose([p["marks"]["refuses"]["value"] for p in entry["points"]], found)
    assert any("policy, benign prompts" in line for line in said)
    without = tiny_config(evaluation={"grid": 7, "prompts": 4})
    assert sweep(without, policy, benign=benign)["benign"] is None  # nothing is counted


def test_a_warm_start_is_swept_between_base_and_policy(config, policy, result):
    """At parameters of zero it is the base; at the policy's own, what came after added nothing."""

    def with_warmup(scale):
        held = {name: p.detach() * scale for name, p in policy.named.items()}
        policies = {
            "policy": contextlib.nullcontext,
            "warmup": lambda: policy.holding(held),
            "base": policy.reference,
        }
        return sweep(config, policy, policies=policies)

    zero, same = with_warmup(0.0), with_warmup(1.0)
    assert list(zero["results"]) == ["base", "warmup", "policy"] == list(same["results"])
    for mode in ev.MODES:
        rewards = {m: zero["results"][m][mode]["prompt_rewards"] for m in zero["results"]}
        assert rewards["warmup"] == rewards["base"] != rewards["policy"]
        assert zero["added"]["policy"][mode] == zero["difference"][mode]
        assert zero["added"]["warmup"][mode]["pu"] == {"value": 0.0, "low": 0.0, "high": 0.0}
        assert same["added"]["policy"][mode]["pu"] == {"value": 0.0, "low": 0.0, "high": 0.0}
        assert same["added"]["warmup"][mode] == same["difference"][mode]
        assert rewards["policy"] == result["results"]["policy"][mode]["prompt_rewards"]
    assert {a["model"] for a in zero["answers"]} == {"base", "warmup", "policy"}


@pytest.mark.parametrize("names", [("base",), ("base", "policy", "trained")])
def test_policies_of_other_names_are_refused(config, policy, names):
    with pytest.raises(ValueError, match="name base and policy"):
        sweep(config, policy, policies=dict.fromkeys(names, contextlib.nullcontext))


def test_the_prompt_that_is_asked_comes_first_and_is_answered_at_every_weight(config, policy):
    asking = tiny_config(evaluation={"ask": "Write a word."})
    result = sweep(asking, policy)
    assert result["shown"][0] == {"id": "asked", "text": "Write a word.", "kind": "asked"}
    own = [a for a in result["answers"] if (a["prompt"], a["model"]) == ("asked", "policy")]
    assert [a["w"] for a in own] == result["weights"]
    assert [w for w, _ in result["asked"]] == [[1, 0], [0.8, 0.2], [0.2, 0.8], [0, 1]]
    assert (result["asked"][0][1], result["asked"][-1][1]) == (own[0]["text"], own[-1]["text"])


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
    said = capsys.readouterr().out
    assert "hypervolume" in said and "w of first" in said and "\nmiddle: " in said
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
        got = reloaded["results"]["policy"][mode]["prompt_rewards"]
        assert got == in_memory["results"]["policy"][mode]["prompt_rewards"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{run}", "--grid", "1"], "evaluation.grid=1"),
        (["{run}", "--prompts", "0"], "evaluation.prompts=0"),
        (["{run}", "--marks", "refuses,sulks"], "evaluation.marks=('refuses', 'sulks')"),
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
