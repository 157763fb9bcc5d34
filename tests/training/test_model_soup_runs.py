"""The recipes of several models on the tiny world: train, evaluate, chat, resume, mistakes."""

import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from meal_fast import chat, evaluate
from meal_fast.config.presets import preset
from meal_fast.config.run_dir import read_config
from meal_fast.data.objectives import load_objectives
from meal_fast.data.preferences import lattice
from meal_fast.data.toy import build_world
from meal_fast.data_types import Prompt
from meal_fast.models.model_soup import FILE, Family, load_served
from meal_fast.rollout import Request, rollout
from meal_fast.training.trainer import Trainer
from tests.helpers.processes import SMALL, assert_one_line, refused, train_here, updates

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = {"rewarded-soups": lattice(2, 2), "morlhf": lattice(2, 3)}
PROMPT = "Write a new song."


@pytest.fixture(scope="module", params=MODELS)
def whole(request, tmp_path_factory):
    """`python -m meal_fast.train tiny --recipe …`, evaluation included: the recipe, the folder."""
    run = tmp_path_factory.mktemp("runs") / request.param
    assert train_here("tiny", "--recipe", request.param, "--out", str(run)) == 0
    return request.param, run


def said(policy, family, w, prompts=(PROMPT,), **options):
    requests = [Request(Prompt(text, text), w) for text in prompts]
    with family.at(policy, w):
        return rollout(
            policy, requests, max_new_tokens=6, **{"temperature": 0.0, "seed": 0} | options
        ).texts


def test_a_run_leaves_every_model(whole):
    recipe, run = whole
    names = {path.name for path in run.iterdir()}
    assert names == {
        "config.json", "template.json", "statistics.json", "metrics.jsonl", "completions.jsonl",
        "ckpt", "policy.json", "policy", FILE, "cost.json",
        "evaluation.json", "front.png", "report.html",
    }  # fmt: skip
    models, config = MODELS[recipe], json.loads((run / "config.json").read_text())
    assert config["meta"]["tasks"] == len(models)
    assert config["policy"]["preference_text"] == "none"
    rows, tiny = updates(run), preset("tiny").meta
    assert len(rows) == tiny.steps * len(models) * tiny.n_inner
    asked = [w for _ in range(tiny.steps) for w in models for _ in range(tiny.n_inner)]
    assert [tuple(row["w"]) for row in rows] == asked
    count = tiny.steps * tiny.n_inner
    cosine = [preset("tiny").grpo.lr * (1 + np.cos(np.pi * i / count)) / 2 for i in range(count)]
    for w in models:
        assert [row["lr"] for row in rows if tuple(row["w"]) == w] == pytest.approx(cosine)
    for row in rows:  # the linear score; at a corner, that is the one reward
        linear = sum(x * r for x, r in zip(row["w"], row["normalized"].values(), strict=True))
        assert row["score"] == pytest.approx(linear, abs=1e-6)
    spread = [row["spread"] for row in rows if "spread" in row]
    assert len(spread) == tiny.steps and 0 < spread[0] < spread[-1]
    family = Family.load(run / FILE)
    assert family.weights == models
    assert family.rule == {"rewarded-soups": "interpolate", "morlhf": "nearest"}[recipe]


def test_the_policy_folder_is_the_middle_model_and_reads_no_preference(whole, tmp_path):
    recipe, run = whole
    config = read_config(run)
    policy, family = load_served(run, config)
    with family.at(policy, (0.5, 0.5)):
        policy.save(tmp_path / "middle")
    names = [
        "model.safetensors",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
    ]
    for name in names:
        assert (tmp_path / "middle" / name).read_bytes() == (run / "policy" / name).read_bytes()
    rank = json.loads((run / "policy" / names[-1]).read_text())["r"]
    assert rank == config.policy.lora_rank * {"rewarded-soups": 2, "morlhf": 1}[recipe]
    templates = [
        AutoTokenizer.from_pretrained(f).chat_template
        for f in (run / "policy", build_world("tiny"))
    ]
    assert templates[0] == templates[1]
    assert policy.encode_suffix((1.0, 0.0)) == policy.encode_suffix(None)


def test_evaluation_asks_at_each_weight_the_parameters_that_serve_it(whole):
    _, run = whole
    config, result = read_config(run), json.loads((run / "evaluation.json").read_text())
    policy, family = load_served(run, config)
    weights = [tuple(w) for w in result["weights"]]
    texts = {p["id"]: p["text"] for p in result["prompts"]}
    trained = [a for a in result["answers"] if a["model"] == "policy"]
    for a in trained:
        assert a["text"] == said(policy, family, tuple(a["w"]), [texts[a["prompt"]]])[0]
    base = {a["prompt"]: a["text"] for a in result["answers"] if a["model"] == "base"}
    for a in result["answers"]:  # the base model does not know w
        assert a["model"] == "policy" or a["text"] == base[a["prompt"]]
    assert len({a["text"] for a in trained}) > 1
    # A prompt is computed once for all weights of the same parameters.
    once = sum(
        len(policy.encode_prompt(t)) + len(policy.encode_suffix(None)) for t in texts.values()
    )
    for model, times in (("base", 1), ("policy", len(family.groups(weights)))):
        assert result["results"][model]["greedy"]["prefill_tokens"] == times * once
        assert result["results"][model]["sampled"]["prefill_tokens"] == 0
    for mode, samples in (("greedy", 1), ("sampled", config.evaluation.samples)):
        entry = result["results"]["policy"][mode]
        assert entry["answers"] == len(texts) * len(weights) * samples
        rewards = entry["prompt_rewards"]
        for group in family.groups(weights):  # greedy, the answers of one model are the same
            same = all(rewards[i] == rewards[group[0]] for i in group)
            assert same or mode == "sampled"


def test_sampled_answers_are_those_of_the_model_at_w_alone(whole):
    """The rewards of the sweep, from rows that were sampled apart from it."""
    _, run = whole
    config, result = read_config(run), json.loads((run / "evaluation.json").read_text())
    policy, family = load_served(run, config)
    objectives = load_objectives(config.objectives)
    i, w = 1, tuple(result["weights"][1])
    prompts = [Prompt(p["id"], p["text"]) for p in result["prompts"]]
    n = config.evaluation.samples
    with family.at(policy, w):
        out = rollout(
            policy,
            [Request(p, w, n) for p in prompts],
            max_new_tokens=config.rollout.max_new_tokens,
            temperature=config.rollout.temperature,
            seed=config.seed,
            rng_key=("evaluation",),
        )
    reward = objectives.rewards([p.text for p in prompts for _ in range(n)], out.texts)
    want = reward.reshape(len(prompts), n, -1).mean(1)
    stored = result["results"]["policy"]["sampled"]["prompt_rewards"][i]
    torch.testing.assert_close(torch.tensor(stored), want, atol=1e-5, rtol=0)


def test_chat_serves_any_w_and_changes_between_models(whole, capsys, monkeypatch):
    _, run = whole
    policy, family = load_served(run, read_config(run))
    asked = [(1.0, 0.0), (0.0, 1.0), (0.1, 0.9), (1.0, 0.0)]
    lines = "".join(f"/w {a},{b}\n{PROMPT}\n" for a, b in asked)
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    chat.main([str(run), "--temperature", "0", "--device", "cpu", "--max-new-tokens", "6"])
    want = [said(policy, family, w)[0].strip() + "\n" for w in asked]
    assert capsys.readouterr().out == "".join(want)
    assert want[0] != want[1]


def test_a_model_does_not_depend_on_the_others(tmp_path):
    """That of (1, 0) is the same, bit for bit, beside one other model or two, and in a soup."""
    found = []
    for recipe, points in (("rewarded-soups", "3"), ("morlhf", "2"), ("morlhf", "3")):
        run = tmp_path / f"{recipe}{points}"
        argv = ["--recipe", recipe, "--preference.models", points, "--meta.steps", "2"]
        assert train_here("tiny", *SMALL, *argv, "--out", str(run), "--no-evaluate") == 0
        family = Family.load(run / FILE)
        assert len(family.models) == (3 if run.name == "morlhf3" else 2)
        found.append(family.models[family.weights.index((1.0, 0.0))])
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]) and torch.equal(value, found[2][name])


@pytest.mark.parametrize(
    ("recipe", "tuning"),
    [("rewarded-soups", "full"), ("morlhf", "lora")],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, recipe, tuning):
    argv = ["tiny", *SMALL, "--recipe", recipe, "--policy.tuning", tuning, "--meta.steps", "3",
            "--no-evaluate"]  # fmt: skip
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    assert train_here(*argv, "--out", str(straight)) == 0
    trainer = Trainer(read_config(straight), broken)
    trainer.on_update = lambda metrics: setattr(
        trainer, "stop_requested", metrics["meta_step"] == 0
    )
    assert not trainer.train() and trainer.step == 1
    assert (broken / FILE).read_bytes() != (straight / FILE).read_bytes()
    assert train_here(*argv, "--out", str(broken), "--resume") == 0
    assert updates(broken) == updates(straight)
    for name in (FILE, "policy/model.safetensors"):
        assert (broken / name).read_bytes() == (straight / name).read_bytes()


def test_mistakes_cost_one_line(whole, tmp_path, capfd):
    recipe, run = whole
    argv = ["tiny", "--recipe", recipe, "--out", str(tmp_path / "run")]
    refused(capfd, [*argv, "--meta.tasks", "7"], "meta.tasks=7", recipe, "leave it out")
    refused(capfd, [*argv, "--policy.preference_text", "bar"], "preference_text='bar'", recipe)
    refused(capfd, ["tiny", "--policy.preference_text", "none"], "preference_text='none'", "bar")
    refused(capfd, [*argv, "--preference.models", "1"], "preference.models=1", "at least 2")
    half = tmp_path / "half"
    shutil.copytree(run, half)
    (half / FILE).unlink()
    capfd.readouterr()
    for main, more in ((evaluate.main, []), (chat.main, ["--prompt", PROMPT])):
        with pytest.raises(SystemExit) as stop:
            main([str(half), *more])
        assert stop.value.code == 2
        assert_one_line(capfd.readouterr().err, FILE, "--resume")
