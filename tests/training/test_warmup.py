"""The supervised start: what it teaches, what it is the base of, and that it is kept."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from meal_fast.config.config import from_dict
from meal_fast.config.presets import preset
from meal_fast.config.run_dir import read_config
from meal_fast.data.answers import read_answer_rows
from meal_fast.data.assets.splitting import split_of, text_id
from meal_fast.data.objectives import load_objectives
from meal_fast.data.prompts import held_out, load_prompts
from meal_fast.data.toy import build_world, world_prompts
from meal_fast.data_types import Prompt
from meal_fast.models.policy import load_policy
from meal_fast.rollout import Request, Sampling, open_backend
from meal_fast.training.lessons import Lesson, Lessons, gather
from meal_fast.training.trainer import Trainer
from meal_fast.training.warmup import taught
from tests.helpers.processes import SMALL, assert_same_runs, refused, stopped, train_here

pytestmark = pytest.mark.usefixtures("one_thread")

WARM = ["--warmup.steps", "12", "--warmup.draws", "64", "--warmup.lr", "0.02"]
ARGV = ["tiny", *SMALL, *WARM, "--meta.steps", "2", "--no-evaluate"]


def logits(network):
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        return network.logits(network.body(input_ids=ids, use_cache=False).last_hidden_state)


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_it_is_the_base_model_of_what_follows(tmp_path, tuning):
    values = {"warmup": {"steps": 6, "draws": 32}, "policy": {"tuning": tuning}}
    trainer = Trainer(from_dict(values, preset("tiny")), tmp_path / "run")
    policy = trainer.policy
    with policy.reference() as base:
        of_base = logits(base)
    torch.testing.assert_close(of_base, logits(policy.network), atol=1e-5, rtol=1e-5)
    held = load_file(tmp_path / "run" / "warmup" / "parameters.safetensors")
    assert set(held) == set(policy.named)
    plain = AutoModelForCausalLM.from_pretrained(build_world("tiny"))
    with torch.no_grad():
        before = plain(torch.tensor([[3, 1, 4, 1, 5]])).logits
    assert not torch.allclose(before, of_base, atol=1e-2)
    if tuning == "lora":  # its factors start anew
        assert all(not p.any() for name, p in policy.named.items() if ".lora_B." in name)
    said = json.loads((tmp_path / "run" / "warmup" / "report.json").read_text())
    assert len(said["nll"]) == 6 and said["nll"][-1] < said["nll"][0]
    assert said["lessons"]["opposed"] == 4  # half of 32 / 4 prompts


@pytest.mark.parametrize(
    ("recipe", "tuning"),
    [("weighted-meta-grpo", "lora"), ("weighted-meta-grpo", "full"), ("meal", "lora")],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, recipe, tuning):
    more = ["--recipe", recipe, "--policy.tuning", tuning, "--score.calibration", "16"]
    argv = [*ARGV, *more]
    assert train_here(*argv, "--out", str(tmp_path / "straight")) == 0
    stopped(read_config(tmp_path / "straight"), tmp_path / "broken", after=2)
    assert train_here(*argv, "--out", str(tmp_path / "broken"), "--resume") == 0
    assert_same_runs(tmp_path / "broken", tmp_path / "straight")


def test_the_adapter_is_one_to_the_model_that_was_given(tmp_path):
    run = tmp_path / "run"
    assert train_here(*ARGV, "--grpo.lr", "0.05", "--out", str(run)) == 0
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    merged = AutoModelForCausalLM.from_pretrained(run / "policy")
    base = AutoModelForCausalLM.from_pretrained(build_world("tiny"))
    with torch.no_grad():
        after = merged(ids).logits
        adapted = PeftModel.from_pretrained(base, run / "policy" / "adapter")(ids).logits
    torch.testing.assert_close(adapted, after, atol=1e-5, rtol=1e-5)


def test_what_is_learnt_is_the_preference():
    """Which of two opposed answers comes depends on w; an ordinary prompt's does not."""
    warmup = {"steps": 150, "batch": 6, "lr": 0.01, "benign_share": 0.34}
    values = {"warmup": warmup, "policy": {"tuning": "full"}}
    config = from_dict(values, preset("tiny"))
    policy = load_policy(config.policy, config.names)
    texts = world_prompts("tiny", "train")[:6]
    words = policy.decode([20, 21, 22]), policy.decode([30, 31, 32]), policy.decode([40, 41, 42])
    prompts = [Prompt(text_id(text), text) for text in texts]
    opposed = tuple(Lesson(p, words[:2]) for p in prompts[:4])
    ordinary = tuple(Lesson(p, (words[2],) * 2) for p in prompts[4:])
    before = [p.clone() for p in policy.trainable]
    learned, nll = taught(policy, Lessons(opposed, ordinary, {}), config)
    assert nll[-1] < 0.3 < 3 < nll[0]
    assert all(map(torch.equal, before, policy.trainable))  # the policy is as it was

    def greedy(prompt, w):
        with open_backend("engine", policy) as sampler:
            sampling = Sampling(len(policy.tokenizer.encode(words[0])), 0.0, 0)
            return sampler.generate([Request(prompt, w)], sampling).texts[0]

    with policy.holding(learned):
        for p in prompts[:4]:
            assert greedy(p, (1.0, 0.0)).startswith(words[0])
            assert greedy(p, (0.0, 1.0)).startswith(words[1])
        for p in prompts[4:]:
            assert greedy(p, (1.0, 0.0)) == greedy(p, (0.0, 1.0))


def test_rows_of_the_evaluation_and_without_answers_are_refused_and_counted(tmp_path):
    texts = [f"What does number {i} mean to you?" for i in range(40)]
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    rows = [{"prompt": t, "response": f"{t} Nothing."} for t in texts] + [{"prompt": texts[0]}]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "prompts": {"train": str(prompts)},
        "warmup": {"steps": 2, "draws": 32, "answers": [f"first={answers}"]},
        "rollout": {"samples": 4},
        "meta": {"steps": 1},
    }
    config = from_dict(values, preset("tiny"))
    held = [t for t in texts if split_of(t) == "evaluation"]
    found = read_answer_rows(str(answers), held_out(str(prompts), ""))
    assert found.refused == {"no response": 1, "prompt of the evaluation": len(held)} and held
    assert not set(found.to) & {text_id(t) for t in held}
    Trainer(config, tmp_path / "run")
    said = json.loads((tmp_path / "run" / "warmup" / "report.json").read_text())["lessons"]
    assert said["refused_rows"] == {"first": found.refused}
    assert said["prompts_of_the_evaluation"] == 0  # the split keeps them apart already


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--warmup.answers", "first=packaged:nothing"], ["warmup.answers", "packaged:refusals"]),
        (["--warmup.answers", "third=own"], ["warmup.answers", "first, second"]),
        (["--warmup.answers", "first=own", "first=own"], ["warmup.answers", "once"]),
        (["--warmup.answers", "first=missing.jsonl"], ["missing.jsonl", "cannot be read"]),
        (["--warmup.peaks", "0.4"], ["warmup.peaks", "above 0.5"]),
        (["--recipe", "rewarded-soups"], ["warmup.steps=12", "makes it 0"]),
        (["--recipe", "ric"], ["warmup.steps=12", "makes it 0"]),
    ],
)
def test_what_cannot_be_learnt_is_one_line(tmp_path, capfd, argv, words):
    refused(capfd, [*ARGV, *argv, "--out", str(tmp_path / "run")], *words)


def test_a_file_without_an_answer_is_refused(tmp_path, capfd):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"prompt": "What now?"}\n{"response": " "}\n')
    argv = [*ARGV, "--warmup.answers", f"first={path}", "--out", str(tmp_path / "run")]
    refused(capfd, argv, str(path), "no row is left", "no response: 2")


def test_what_the_base_model_is_told_is_not_in_the_lessons(monkeypatch):
    """Answers come from prompt and instruction; what is learnt stands behind the prompt alone."""
    from meal_fast.training import lessons

    values = {
        "warmup": {"steps": 1, "draws": 16, "answers": ["first=own:speak up", "second=own"]},
        "prompts": {"train": "world:tiny"},
    }
    config = from_dict(values, preset("tiny"))
    policy = load_policy(config.policy, config.names)
    objectives = load_objectives(config.objectives)
    asked = []
    sampled = lessons.sampled

    def seen(policy, requests, *more):
        rolled = sampled(policy, requests, *more)
        asked.append((requests, rolled.texts))
        return rolled

    monkeypatch.setattr(lessons, "sampled", seen)
    prompts = load_prompts("world:tiny", "train")
    found = lessons.gather(policy, objectives, prompts, config)
    ((requests, texts),) = asked
    told = {q.prompt.id for q in requests if q.prompt.text.endswith("\nspeak up")}
    assert len(requests) == 8 and len(told) == 4
    of = {(q.prompt.id, q.prompt.text): texts[4 * i : 4 * i + 4] for i, q in enumerate(requests)}
    for lesson in found.opposed:
        text = lesson.prompt.text
        assert "speak up" not in text
        assert lesson.answers[0] in of[lesson.prompt.id, f"{text}\nspeak up"]
        assert lesson.answers[1] in of[lesson.prompt.id, text]
        rewards = objectives.rewards([text] * 4, list(of[lesson.prompt.id, text]))
        best = rewards[:, 1].max()
        assert objectives.rewards([text], [lesson.answers[1]])[0, 1] == best


def test_all_answers_may_come_from_files(tmp_path):
    """Rows without a prompt answer any; of those with one, only its own prompts are learnt."""
    texts = world_prompts("tiny", "train")[:4]
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    one.write_text('{"response": "aa"}\n{"response": "ab"}\n')
    other.write_text("".join(json.dumps({"prompt": t, "response": f"b {t}"}) + "\n" for t in texts))
    answers = [f"first={one}", f"second={other}"]
    config = from_dict({"warmup": {"steps": 1, "answers": answers}}, preset("tiny"))
    policy = load_policy(config.policy, config.names)
    prompts = load_prompts("world:tiny", "train")
    found = gather(policy, load_objectives(config.objectives), prompts, config)
    assert len(found.opposed) == 2 and found.counts["tried"] == len(prompts)
    assert found.counts["without_answer"] == len(prompts) - 4
    for lesson in found.opposed:
        assert lesson.answers[0] in ("aa", "ab")
        assert lesson.answers[1] == f"b {lesson.prompt.text}".strip()
