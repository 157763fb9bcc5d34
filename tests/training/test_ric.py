"""Rewards-in-Context: what the policy reads, what is asked, kept, relabelled and learnt from."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from meal_fast.chat import main as chat
from meal_fast.config.config import Config, from_dict
from meal_fast.config.presets import preset
from meal_fast.data.objectives import load_objectives
from meal_fast.data.preferences import Goals, preference_text
from meal_fast.data.reward_statistics import Scales
from meal_fast.data_types import Prompt
from meal_fast.evaluate import main as evaluate
from meal_fast.models.policy import load_policy
from meal_fast.rollout import Request, rollout
from meal_fast.training.collectors import base
from meal_fast.training.collectors.ric import (
    RiC,
    above,
    answers_of,
    drawn_goals,
    under_own_rewards,
    written,
)
from meal_fast.training.losses.sft import sft
from meal_fast.training.trainer import Trainer
from tests.helpers.processes import assert_same_runs, refused, stopped, train_here, updates
from tests.helpers.recorded import task
from tests.helpers.run_folder import tiny_policy

AFTER = "<|im_end|>\n<|im_start|>assistant\n"  # what stands behind a preference
PROMPTS = [Prompt("a", "Write a short word."), Prompt("b", "Say more.")]
# Means 0.2 and 0.3, standard deviations 0.2 and 0.1.
CALIBRATION = torch.tensor([[0.0, 0.2], [0.4, 0.3], [0.2, 0.4]])


def ric_config(**sections) -> Config:
    return from_dict({"recipe": "ric", **sections}, preset("tiny"))


def ric(*, scale: float = 0.1, **sections) -> RiC:
    config = ric_config(**sections)
    scales = Scales.fit(CALIBRATION, config.score, standard=True)
    policy = tiny_policy(config, scale=scale)
    return RiC(policy, load_objectives(config.objectives), scales, config, "linear")


# --- what the policy reads ----------------------------------------------------------------------


def test_the_text_of_rewards():
    names = ("helpful", "harmless", "humor")
    text = preference_text((0.34, -1.26, -0.04), names, "scores")
    assert text == "<rm1_score> 0.3 <rm2_score> -1.3 <rm3_score> 0.0"


def test_goals_of_a_preference():
    goals = Goals(lo=(-1.0, 0.0), hi=(3.0, 2.0))
    assert goals.of((0.6, 0.8)) == pytest.approx((1.4, 1.6))  # of length 1 already
    assert goals.of((0.3, 0.4)) == pytest.approx((1.4, 1.6))
    assert goals.of((1.0, 0.0)) == (3.0, 0.0)
    assert goals.of((0.0, 1.0)) == (-1.0, 2.0)
    root = 0.5**0.5
    assert goals.of((0.5, 0.5)) == pytest.approx((4 * root - 1, 2 * root))
    with pytest.raises(ValueError, match="lo <= hi"):
        Goals((0.0, 1.0), (1.0, 0.5))
    with pytest.raises(ValueError, match="finite"):
        Goals((0.0, float("inf")), (1.0, float("inf")))


def test_a_policy_in_training_reads_rewards_and_a_finished_one_preferences(tmp_path):
    policy = tiny_policy(ric_config())
    assert policy.said((1.4, -0.2)) == "<rm1_score> 1.4 <rm2_score> -0.2"
    before = policy.encode_suffix((0.6, 0.8))
    policy.goals = Goals((-1.0, 0.0), (3.0, 2.0))
    assert policy.said((0.6, 0.8)) == "<rm1_score> 1.4 <rm2_score> 1.6"
    suffix = policy.encode_suffix((0.6, 0.8))
    header = policy.encode_suffix(None)
    assert suffix != before and suffix[-len(header) :] == header
    policy.save(tmp_path / "policy")
    again = load_policy(ric_config().policy, policy.names, trained=tmp_path / "policy")
    assert again.goals == policy.goals and again.encode_suffix((0.6, 0.8)) == suffix
    # As any server does it: the saved chat template with the text as its argument.
    said = AutoTokenizer.from_pretrained(tmp_path / "policy").apply_chat_template(
        [{"role": "user", "content": "Hi"}],
        preference=again.said((0.6, 0.8)),
        add_generation_prompt=True,
        return_dict=False,
    )
    assert tuple(said) == again.encode_prompt("Hi") + suffix


def test_goals_of_another_number_of_objectives_are_refused(tmp_path):
    path = tmp_path / "preference.json"
    path.write_text(json.dumps({"goals": {"lo": [0, 0], "hi": [1, 1]}}))
    assert Goals.load(path, 2) == Goals((0, 0), (1, 1))
    with pytest.raises(ValueError, match=r"RiC statistics missing: .*goals of 2 objectives, for 3"):
        Goals.load(path, 3)
    with pytest.raises(ValueError, match=r"RiC statistics missing: .*no goals"):
        Goals.load(tmp_path / "none.json", 2)


# --- what is asked and kept ---------------------------------------------------------------------


def test_rewards_are_written_to_one_decimal():
    written_RK = written(torch.tensor([[0.26, -0.04], [-1.96, 3.0]]))
    assert written_RK == [(0.3, 0.0), (-2.0, 3.0)]
    assert str(written_RK[0][1]) == "0.0"  # and not -0.0, which would be another text


def test_the_smallest_goal_gives_way_to_the_greatest_reward():
    hi_K = torch.tensor([2.0, 3.0, 4.0])
    random = np.random.default_rng(0)
    assert drawn_goals(torch.tensor([[0.5, -0.5, 1.0]]), hi_K, 2, random) == [(0.5, 3.0, 1.0)] * 2


def test_goals_are_drawn_each_by_itself_from_what_was_seen():
    seen_MK = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    drawn = drawn_goals(seen_MK, torch.tensor([2.5, 3.5]), 4000, np.random.default_rng(0))
    # Pairs (0, 1), (0, 3), (2, 1), (2, 3) before the smaller one is replaced.
    share = {g: drawn.count(g) / 4000 for g in set(drawn)}
    assert share.keys() == {(2.5, 1.0), (2.5, 3.0), (2.0, 3.5)}
    assert share[2.5, 1.0] == pytest.approx(0.25, abs=0.03)
    assert share[2.5, 3.0] == pytest.approx(0.5, abs=0.03)
    again = drawn_goals(seen_MK, torch.tensor([2.5, 3.5]), 4000, np.random.default_rng(0))
    assert again == drawn


def test_kept_is_what_reaches_a_quantile_in_any_reward():
    up = torch.arange(10.0)
    # The 0.7-quantile of 0 ... 9 is 6.3.
    kept = above(torch.stack([up, torch.zeros(10) - up], 1), 0.7)
    assert kept.nonzero().squeeze(1).tolist() == [0, 1, 2, 7, 8, 9]
    assert above(torch.stack([up, up], 1), 0.7).sum() == 3
    assert above(torch.stack([up, up], 1), 0.0).all()
    at = torch.tensor([[0.0], [1.0], [2.0]])  # its median is one of them: at counts as above
    assert above(at, 0.5).tolist() == [False, True, True]


# --- what is learnt -----------------------------------------------------------------------------


def test_responses_are_answers_to_their_own_rewards():
    policy = tiny_policy(ric_config())
    rolled = rollout(
        policy, [Request(p, None, 3) for p in PROMPTS], max_new_tokens=5, temperature=1.0, seed=1
    )
    reward_RK = torch.tensor([[0.6, 0.3], [0.2, 0.5], [0.6, 0.3]] + [[0.6, 0.3]] * 3)
    answers = answers_of(rolled, reward_RK)
    standard_RK = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]] + [[2.0, 0.0]] * 3)
    new, order = under_own_rewards(policy, answers, standard_RK)
    assert order == [0, 2, 1, 3, 4, 5]
    assert new.group_R.tolist() == [0, 0, 1, 2, 2, 2] and not new.on_policy
    first, second = ("<rm1_score> 2.0 <rm2_score> 0.0", "<rm1_score> 0.0 <rm2_score> 2.0")
    for prefix, text, said in zip(new.prefix, (0, 0, 1), (first, second, first), strict=True):
        whole = policy.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{PROMPTS[text].text} {said}"}],
            add_generation_prompt=True,
            return_dict=False,
        )
        assert prefix == tuple(whole)
    for row, old in enumerate(order):
        assert new.texts[row] == rolled.texts[old] and new.finish[row] == rolled.finish[old]
        mask = rolled.mask_RT[old]
        assert new.tokens_RT[row][new.mask_RT[row]].tolist() == rolled.tokens_RT[old][mask].tolist()
        kept = new.logp_RT[row][new.mask_RT[row]]
        torch.testing.assert_close(kept, rolled.logp_RT[old][mask], rtol=0, atol=0)
        assert new.condition_RK[row].tolist() == standard_RK[old].tolist()


def test_the_loss_is_the_likelihood_under_a_response_s_own_rewards():
    source = ric(grpo={"beta": 0.0})
    batch = source.collect([task(PROMPTS, (0.5, 0.5), ("test", 0))])
    policy, rolled = source.policy, batch.rolled
    learned = sft(policy, rolled, batch.scored, source.config.grpo, temperature=1.0)
    standard_RK = (batch.scored.reward_RK - torch.tensor([0.2, 0.3])) / torch.tensor([0.2, 0.1])
    means = []
    for row, group in enumerate(rolled.group_R.tolist()):
        said = preference_text(standard_RK[row].tolist(), policy.names, "scores")
        before = policy.encode_prompt(rolled.prompts[group].text)
        after = policy.tokenizer(f" {said}{AFTER}", add_special_tokens=False)["input_ids"]
        tokens = rolled.tokens_RT[row][rolled.mask_RT[row]].tolist()
        ids = torch.tensor([[*before, *after, *tokens]])
        with torch.no_grad():
            logp = policy.causal_lm(input_ids=ids).logits[0].log_softmax(-1)
        at = range(ids.shape[1] - len(tokens) - 1, ids.shape[1] - 1)
        means.append(-sum(float(logp[i, t]) for i, t in zip(at, tokens, strict=True)) / len(tokens))
    assert float(learned["loss"]) == pytest.approx(np.mean(means), rel=1e-4)


def test_offline_updates_learn_all_that_the_base_model_answers_unasked():
    source = ric(scale=1.0)
    batch = source.collect([task(PROMPTS, (0.5, 0.5), ("test", 0))])
    with source.policy.reference() as base:
        sampled = rollout(
            source.policy,
            [Request(p, None, 8) for p in PROMPTS],
            max_new_tokens=6,
            temperature=1.0,
            seed=0,
            rng_key=("test", 0),
            network=base,
        )
    assert sorted(batch.rolled.texts) == sorted(sampled.texts)
    assert batch.tokens == int(sampled.mask_RT.sum())
    assert batch.log["online"] is False and batch.scored.loss_weight_R.tolist() == [1.0] * 16
    texts = [sampled.prompts[g].text for g in sampled.group_R.tolist()]
    reward_RK = source.objectives.rewards(texts, sampled.texts)
    torch.testing.assert_close(batch.reward_RK, reward_RK)
    standard_RK = (reward_RK - torch.tensor([0.2, 0.3])) / torch.tensor([0.2, 0.1])
    torch.testing.assert_close(source.lo, standard_RK.amin(0))
    torch.testing.assert_close(source.hi, standard_RK.amax(0))


def online(**sections) -> tuple[RiC, list]:
    """A source that has been through its offline part; and the goals that it then asks for."""
    source = ric(scale=0.0, meta={"steps": 1}, ric={"offline": 0.25, **sections})
    source.collect([task(PROMPTS, (0.5, 0.5), ("test", 0))])
    return source, [a.drawn.tokens for a in source.offline]


def test_online_updates_learn_what_is_kept_and_some_offline_responses_again():
    source, offline = online(replay=0.5)
    hi = source.hi.clone()
    batch = source.collect([task(PROMPTS, (0.5, 0.5), ("test", 1), progress=0.25)])
    raw_RK = batch.reward_RK
    assert len(raw_RK) == 16
    line = torch.quantile(raw_RK, 0.7, 0)  # standardising keeps the order
    kept = [tuple(r) for r in raw_RK[(raw_RK >= line).any(1)].tolist()]
    rows, again = len(batch.rolled.texts), round(0.5 * len(kept))
    assert batch.log["online"] is True and batch.log["acceptance"] == len(kept) / 16 < 1
    assert batch.log["replayed"] == again and rows == len(kept) + again
    learnt = [tuple(r) for r in batch.scored.reward_RK.tolist()]
    for reward in kept:
        learnt.remove(reward)
    from_offline = [a.reward for a in source.offline]
    assert len(learnt) == again and all(r in from_offline for r in learnt)
    assert [a.drawn.tokens for a in source.offline] == offline  # online ones do not join them
    assert max(batch.log["asked"]) <= float(hi.max()) + 0.05
    assert torch.equal(source.hi, torch.tensor(batch.log["goal_hi"]))


def test_every_sample_is_asked_for_goals_of_its_own(monkeypatch):
    source, _ = online(replay=0.0)
    asked = []
    plain = base.sampled

    def watched(policy, requests, *more, **how):
        asked.extend(requests)
        return plain(policy, requests, *more, **how)

    monkeypatch.setattr(base, "sampled", watched)
    batch = source.collect([task(PROMPTS, (0.5, 0.5), ("test", 1), progress=0.25)])
    assert batch.log["replayed"] == 0 and batch.log["acceptance"] < 1
    assert batch.tokens > int(batch.rolled.mask_RT.sum())  # what is not kept was generated too
    assert sum(q.samples for q in asked) == 16 and len(asked) > len(PROMPTS)
    assert len({(q.prompt, q.w) for q in asked}) == len(asked)
    hi = written(source.hi[None])[0]
    assert all(any(g == h for g, h in zip(q.w, hi, strict=True)) for q in asked)


def test_statistics_without_a_standard_deviation_are_refused():
    source = ric()
    scales = dataclasses.replace(source.scales, standard=None)
    with pytest.raises(ValueError, match=r"^RiC statistics missing: statistics\.json"):
        RiC(source.policy, source.objectives, scales, source.config, "linear")


# --- a data set ---------------------------------------------------------------------------------


def answers_file(tmp_path, *rows):
    path = tmp_path / "answers.jsonl"
    lines = [json.dumps({"prompt": p, "response": r}) for p, r in rows]
    path.write_text("\n".join([*lines, ""]))
    return str(path)


def test_offline_responses_of_a_data_set_are_learnt_in_turn_and_generate_nothing(tmp_path):
    rows = [("Say more.", "cat"), ("Hi", " a dog "), ("Hi", "a much longer answer than the rest")]
    source = ric(ric={"data": answers_file(tmp_path, *rows)}, rollout={"prompts": 1, "samples": 3})
    encode = source.policy.tokenizer.encode
    for update in range(2):  # each row once an update, in another order
        batch = source.collect(
            [task([Prompt("x", "not asked")], (0.5, 0.5), ("test", update), update=update)]
        )
        rolled = batch.rolled
        assert batch.tokens == 0 and batch.log["online"] is False and not rolled.on_policy
        got = [
            (rolled.prompts[g].text, rolled.tokens_RT[r][rolled.mask_RT[r]].tolist())
            for r, g in enumerate(rolled.group_R.tolist())
        ]
        end = source.policy.tokenizer.eos_token_id
        whole = [(p, [*encode(r.strip(), add_special_tokens=False), end]) for p, r in rows]
        assert sorted(got) == sorted((p, tokens[:6]) for p, tokens in whole)
        assert rolled.finish.count("length") == sum(len(tokens) > 6 for _, tokens in whole) == 1
        texts = [rolled.prompts[g].text for g in rolled.group_R.tolist()]
        reward_RK = source.objectives.rewards(texts, list(rolled.texts))
        for g, row in zip(rolled.group_R.tolist(), batch.scored.reward_RK, strict=True):
            standard_K = (row - torch.tensor([0.2, 0.3])) / torch.tensor([0.2, 0.1])
            said = preference_text(standard_K.tolist(), source.policy.names, "scores")
            suffix = source.policy.tokenizer(f" {said}{AFTER}")["input_ids"]
            assert list(rolled.prefix[g][-len(suffix) :]) == suffix
        assert sorted(batch.scored.reward_RK.tolist()) == sorted(reward_RK.tolist())
    assert len(source.offline) == 6


@pytest.mark.usefixtures("one_thread")
def test_a_run_on_a_data_set_goes_online_after_it_and_resumes(tmp_path):
    rows = [(f"Write {i} words.", f"word {i}") for i in range(7)]
    config = ric_config(
        meta={"steps": 2, "tasks": 1},
        rollout={"samples": 4},
        ric={"offline": 0.5, "data": answers_file(tmp_path, *rows)},
        checkpoint_every=1,
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    Trainer(config, whole).train()
    assert [row["tokens"] > 0 for row in updates(whole)] == [False, False, True, True]
    stopped(config, parts)
    Trainer(config, parts, resume=True).train()
    assert_same_runs(parts, whole)


def test_a_data_set_that_cannot_be_used_is_refused_before_anything_else(tmp_path):
    bad = tmp_path / "bad.jsonl"
    for text, match in (
        ('{"prompt": "Hi", "response": "yes"}\n{"prompt": "Hi"}', r"line 2: needs .*\"response\""),
        ('{"prompt": "Hi", "response": 3}', "line 1: needs"),
        ("{", "line 1: not JSON"),
        ("\n", "has no prompts"),
        (None, "cannot be read"),
    ):
        bad.unlink(missing_ok=True)
        if text is not None:
            bad.write_text(text)
        with pytest.raises(ValueError, match=match):
            Trainer(ric_config(ric={"data": str(bad)}), tmp_path / "run")
        assert not (tmp_path / "run").exists()
    long = answers_file(tmp_path, ("word " * 300, "yes"))
    with pytest.raises(ValueError, match=r"no prompt has at most 256 tokens; raise prompts\.max"):
        ric(ric={"data": long})
    with pytest.raises(ValueError, match=r"meta\.tokens=500: a data set generates no tokens"):
        ric_config(ric={"data": long}, meta={"tokens": 500})


# --- whole runs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("ric") / "run"
    assert train_here("tiny", "--recipe", "ric", "--out", str(folder)) == 0
    return folder


def test_a_whole_run_steers_by_its_own_goals(run, capsys):
    rows = updates(run)
    assert [row["online"] for row in rows] == [False] * 4 + [True] * 12
    assert all("acceptance" in row for row in rows[4:])
    result = json.loads((run / "evaluation.json").read_text())
    assert len(result["weights"]) == 5 and result["results"]["policy"]["greedy"]["answers"] == 20
    held = json.loads((run / "policy" / "preference.json").read_text())
    assert held["style"] == "scores"
    assert held["goals"] == {"lo": rows[-1]["goal_lo"], "hi": rows[-1]["goal_hi"]}
    chat([str(run), "--w", "0.8,0.2", "--prompt", "Write a new song.", "--temperature", "0",
          "--max-new-tokens", "6"])  # fmt: skip
    config = ric_config()
    policy = load_policy(config.policy, config.names, trained=run / "policy")
    out = rollout(
        policy,
        [Request(Prompt("x", "Write a new song."), (0.8, 0.2))],
        max_new_tokens=6,
        temperature=0.0,
        seed=0,
    )
    lo, hi = held["goals"]["lo"], held["goals"]["hi"]
    length = 0.68**0.5
    said = [w / length * (hi[k] - lo[k]) + lo[k] for k, w in enumerate((0.8, 0.2))]
    assert out.prefix[0][-len(policy.encode_suffix((0.8, 0.2))) :] == tuple(
        policy.tokenizer(
            f" <rm1_score> {said[0]:.1f} <rm2_score> {said[1]:.1f}{AFTER}",
            add_special_tokens=False,
        )["input_ids"]
    )
    assert capsys.readouterr().out == out.texts[0].strip() + "\n"


def test_without_its_goals_a_run_is_neither_evaluated_nor_asked(run, tmp_path, capfd):
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    path = broken / "policy" / "preference.json"
    (broken / "policy.json").unlink()  # as of a version without its digests
    path.write_text(json.dumps({"objectives": ["first", "second"], "style": "scores"}))
    for command in (lambda: evaluate([str(broken)]), lambda: chat([str(broken), "--prompt", "Hi"])):
        with pytest.raises(SystemExit) as stop:
            command()
        assert stop.value.code == 2
        err = capfd.readouterr().err
        assert err.startswith("meal-fast: error: RiC statistics missing") and err.count("\n") == 1


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("meta_steps", [1, 2], ids=["offline", "online"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, meta_steps):
    config = ric_config(
        meta={"steps": 3, "tasks": 1},
        rollout={"samples": 4},
        ric={"offline": 0.5, "buffer": 20},
        checkpoint_every=1,
    )
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    assert Trainer(config, straight).train()
    first = Trainer(config, halves)

    def stop(metrics):
        first.stop_requested = metrics["meta_step"] + 1 >= meta_steps

    first.on_update = stop
    assert not first.train()
    assert Trainer(config, halves, resume=True).train()
    assert updates(halves) == updates(straight)
    for name in ("model.safetensors", "preference.json"):
        path = f"policy/{name}"
        assert (halves / path).read_bytes() == (straight / path).read_bytes()
    assert [row["online"] for row in updates(straight)] == [False] * 3 + [True] * 3


@pytest.mark.usefixtures("one_thread")
def test_a_budget_of_tokens_counts_offline_responses_too(tmp_path):
    config = ric_config(
        meta={"tokens": 300, "tasks": 1}, rollout={"samples": 4}, ric={"offline": 0.4}
    )
    assert Trainer(config, tmp_path / "run").train()
    rows = updates(tmp_path / "run")
    spent = np.cumsum([row["tokens"] for row in rows])
    assert [row["progress"] for row in rows] == pytest.approx(np.minimum(spent / 300, 1.0))
    n = config.meta.n_inner  # a meta-step's updates share one place
    done = [rows[i - i % n - 1]["progress"] if i >= n else 0.0 for i in range(len(rows))]
    assert [row["online"] for row in rows] == [d >= 0.4 for d in done]
    assert any(row["online"] for row in rows) and rows[-1]["progress"] == 1.0


def test_recipe_ric_settles_what_the_policy_reads():
    assert ric_config().policy.preference_text == "scores"
    again = from_dict({"policy": {"preference_text": "scores"}}, ric_config())
    assert again == ric_config()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ric.offline", "0"], ("ric.offline=0.0", "(0, 1]")),
        (["--ric.quantile", "1"], ("ric.quantile=1.0", "[0, 1)")),
        (["--ric.replay", "-1"], ("ric.replay=-1.0", "negative")),
        (["--ric.buffer", "0"], ("ric.buffer=0", "at least 1")),
        (["--policy.preference_text", "bar"], ("policy.preference_text='bar'", "leave it out")),
        (["--meal.lam", "0.2"], ("meal.lam=0.2", "'ric'", "use meal")),
        (["--recipe", "meal", "--ric.replay", "1"], ("ric.replay=1.0", "'meal'", "use ric")),
        (
            ["--recipe", "weighted-grpo", "--policy.preference_text", "scores"],
            ("policy.preference_text='scores'", "weighted-grpo", "bar or numbers"),
        ),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(capfd, tmp_path, flags, words):
    refused(capfd, ["tiny", "--recipe", "ric", *flags, "--out", str(tmp_path / "x")], *words)
