"""Meal's coupling of net and policy: what is asked, kept, relabelled and learnt from."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from meal_fast.chat import main as chat
from meal_fast.config.config import Config, from_dict
from meal_fast.config.presets import preset
from meal_fast.data.objectives import load_objectives
from meal_fast.data.reward_statistics import Normalizer, Scales
from meal_fast.data_types import Prompt
from meal_fast.rollout import Request, rollout
from meal_fast.training.collectors.meal import Meal, relabelled
from meal_fast.training.trainer import Trainer
from tests.helpers.processes import assert_same_runs, refused, stopped, updates
from tests.helpers.recorded import task
from tests.helpers.run_folder import tiny_policy

PROMPTS = [Prompt("a", "Write a short word."), Prompt("b", "Say more."), Prompt("c", "Hi")]


def meal_config(**sections) -> Config:
    return from_dict({"recipe": "meal", **sections}, preset("tiny"))


def meal(**sections) -> Meal:
    config = meal_config(**sections)
    objectives = load_objectives(config.objectives)
    sample = torch.tensor([[0.0, 0.2], [0.4, 0.1], [0.2, 0.6]])
    scales = Scales.fit(sample, config.score, standard=True)
    return Meal(tiny_policy(config), objectives, scales, config, "smooth-tchebycheff")


def test_relabelled_rows_keep_their_tokens_under_their_own_preference():
    policy = tiny_policy(meal_config())
    rolled = rollout(
        policy,
        [Request(p, (0.5, 0.5), 3) for p in PROMPTS],
        max_new_tokens=5,
        temperature=1.0,
        seed=1,
    )
    w = [(0.2, 0.8), (0.7, 0.3), (0.2, 0.8)] + [(0.5, 0.5)] * 3 + [(1.0, 0.0), (0.0, 1.0)] * 2
    new, order = relabelled(policy, rolled, w[:9])
    assert sorted(order.tolist()) == list(range(9))
    assert new.group_R.tolist() == sorted(new.group_R.tolist())
    assert len(new.prompts) == len(new.prefix) == 2 + 1 + 2  # a text is one prefix
    for row, old in enumerate(order.tolist()):
        group = int(new.group_R[row])
        before = int(rolled.group_R[old])
        assert new.prompts[group] == rolled.prompts[before]
        assert new.texts[row] == rolled.texts[old] and new.finish[row] == rolled.finish[old]
        torch.testing.assert_close(new.tokens_RT[row], rolled.tokens_RT[old])
        assert new.condition_RK[row].tolist() == pytest.approx(w[old])
        suffix = policy.encode_suffix(w[old])
        assert new.prefix[group] == policy.encode_prompt(new.prompts[group].text) + suffix


@pytest.mark.parametrize("realized", ["ray", "softmax"])
def test_kept_responses_pass_both_gates_and_learn_the_weighted_preference(realized):
    rejection = {"q": 0.5, "delta": 0.4, "realized": realized, "tau": 0.5}
    source = meal(rejection=rejection, meal={"lam": 0.25, "rho": 1.0})
    batch = source.collect([task(PROMPTS, (0.5, 0.5), ("test", 0))])
    options, scales = source.config.rollout, source.scales
    assert scales.standard is not None
    # All that was sampled, drawn again: the same rng_key.
    asked = source._preferences(task(PROMPTS, (0.5, 0.5), ("test", 0)))[0]
    rolled = rollout(
        source.policy,
        [Request(p, w, options.samples) for p, w in zip(PROMPTS, asked, strict=True)],
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=source.config.seed,
        rng_key=("test", 0),
    )
    texts = [rolled.prompts[g].text for g in rolled.group_R.tolist()]
    reward = source.objectives.rewards(texts, rolled.texts)
    z = torch.tensor(scales.utopia)
    short = rolled.condition_RK * (z - reward) / source.config.score.mu
    score = -source.config.score.mu * short.logsumexp(-1)
    logits = scales.standard.apply(reward) if realized == "softmax" else -(z - reward).log()
    hat = torch.softmax(logits / 0.5, -1).clamp(min=1e-4)
    hat = hat / hat.sum(-1, keepdim=True)
    expected = []
    for g, w in enumerate(asked):
        rows = (rolled.group_R == g).nonzero().squeeze(1).tolist()
        best = sorted(rows, key=lambda r: (-float(score[r]), r))
        passed = [
            r
            for r in best[: len(rows) // 2]
            if float((hat[r] - rolled.condition_RK[r]).abs().sum()) / 2 <= 0.4
        ]
        for r in passed or best[:1]:
            asked_w = np.clip(w, 1e-4, None) / np.clip(w, 1e-4, None).sum()
            star = asked_w**0.25 * hat[r].double().numpy() ** 0.75
            expected.append((g, rolled.texts[r], np.round(star / star.sum() * 10) / 10))
    got = [
        (PROMPTS.index(batch.rolled.prompts[g]), text, w)
        for g, text, w in zip(
            batch.rolled.group_R.tolist(),
            batch.rolled.texts,
            batch.rolled.condition_RK.double().numpy(),
            strict=True,
        )
    ]
    assert len(got) == len(expected) < len(rolled.texts)
    by = lambda row: (row[0], row[1], row[2][0])  # noqa: E731
    for (g, text, w), (g2, text2, w2) in zip(
        sorted(got, key=by), sorted(expected, key=by), strict=True
    ):
        assert (g, text) == (g2, text2)
        np.testing.assert_allclose(w, w2, atol=1e-6)
    assert batch.tokens == int(rolled.mask_RT.sum())
    assert len(batch.reward_RK) == len(rolled.texts)
    assert not batch.rolled.on_policy
    assert batch.log["acceptance"] == pytest.approx(len(expected) / len(rolled.texts))


def test_lambda_one_without_a_net_keeps_what_was_asked():
    source = meal(meal={"lam": 1.0, "rho": 1.0})
    assert source.net is None and "net" not in source.state()
    batch = source.collect([task(PROMPTS, (0.5, 0.5), ("test", 0))])
    chosen, drawn = source._preferences(task(PROMPTS, (0.5, 0.5), ("test", 0)))
    asked = dict(zip(PROMPTS, chosen, strict=True))
    assert all(drawn)
    for g, w in zip(batch.rolled.group_R.tolist(), batch.rolled.condition_RK.tolist(), strict=True):
        assert w == pytest.approx(asked[batch.rolled.prompts[g]])


def test_rho_is_how_often_a_preference_is_drawn():
    source = meal(meal={"rho": 0.3})
    own = (0.5, 0.5)  # of a net that has learnt nothing yet
    tasks = [task(PROMPTS, (0.0, 1.0), ("test", i)) for i in range(200)]
    asked = [w for one in tasks for w in source._preferences(one)[0]]
    drawn = np.mean([w != own for w in asked])
    free = np.mean([f for one in tasks for f in source._preferences(one)[1]])
    assert drawn <= free < 0.37
    assert 0.2 < drawn < 0.37  # 0.3, less the draws that are (0.5, 0.5)
    reptile = meal(meal={"rho": 1.0, "outer": "reptile+net"})
    assert reptile._preferences(task(PROMPTS, (0.0, 1.0), ("test", 0)))[0] == [(0.0, 1.0)] * 3


def test_scores_use_the_run_s_normaliser_and_preferences_the_standard_one():
    source = meal(score={"normalization": "max"}, rejection={"realized": "softmax", "tau": 0.5})
    reward = torch.tensor([[0.4, 0.1], [0.1, 0.3]])
    w = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    score, hat = source._judge(reward, w)
    z = torch.tensor(source.scales.utopia)
    short = w * (z - source.scales.normalizer.apply(reward)) / 0.1
    torch.testing.assert_close(score, -0.1 * short.logsumexp(-1))
    sample = torch.tensor([[0.0, 0.2], [0.4, 0.1], [0.2, 0.6]])
    standard = Normalizer.fit(sample, "standard").apply(reward)
    torch.testing.assert_close(hat, torch.softmax(standard / 0.5, -1), rtol=1e-3, atol=1e-4)
    gap = z - source.scales.normalizer.apply(reward)
    for tau in (1.0, 0.5):
        source = meal(score={"normalization": "max"}, rejection={"tau": tau})
        again, hat = source._judge(reward, w)
        assert torch.equal(again, score)
        ray = gap ** (-1 / tau)
        torch.testing.assert_close(hat, ray / ray.sum(1, keepdim=True), rtol=1e-3, atol=1e-4)


# --- whole runs --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("meal") / "run"
    config = meal_config(meal={"every": 2, "hidden": 16})
    assert Trainer(config, folder).train()
    return folder


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"policy": "grpo"},
        {"outer": "reptile+net"},
        {"update": "hypergradient", "every": 1},
        {"mode": "gradient"},
        {"rho": 1.0, "lam": 1.0},
    ],
    ids=lambda s: ",".join(map(str, s.values())) or "default",
)
def test_every_switch_trains_and_resumes_bit_for_bit(tmp_path, switches):
    config = meal_config(
        meal={"every": 2, "hidden": 16, **switches}, meta={"steps": 3}, checkpoint_every=1
    )
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    assert Trainer(config, straight).train()
    stopped(config, halves)
    assert Trainer(config, halves, resume=True).train()
    assert_same_runs(halves, straight)
    rows = updates(straight)
    assert len(rows) == 12 and all(0 < row["acceptance"] <= 1 for row in rows)
    assert ("delta_norm" in rows[3]) == (switches.get("outer") == "reptile+net")
    net = straight / "preference_net.safetensors"
    assert net.exists() == (switches.get("rho") != 1.0)
    assert any("net_loss" in row for row in rows) == net.exists()


@pytest.mark.usefixtures("one_thread")
def test_nothing_kept_skips_the_step_and_leaves_adam_alone(tmp_path):
    config = meal_config(
        rejection={"rule": "threshold", "threshold": 1e6, "fallback": "none"}, meta={"steps": 1}
    )
    trainer = Trainer(config, tmp_path / "run")
    before = [p.detach().clone() for p in trainer.policy.trainable]
    with pytest.warns(UserWarning, match="no response was kept"):
        assert trainer.train()
    assert not any(trainer.outer.optimizer.state.values())
    for old, new in zip(before, trainer.policy.trainable, strict=True):
        torch.testing.assert_close(new.detach(), old, rtol=0, atol=0)
    rows = updates(tmp_path / "run")
    assert [row["kept"] for row in rows] == [0] * 4 and all(row["skipped"] for row in rows)


def test_chat_auto_asks_the_net(run, capsys):
    chat([str(run), "--w", "auto", "--prompt", "Write a new song.", "--temperature", "0"])
    answer, said = capsys.readouterr()
    w = said.splitlines()[0].removeprefix("w is ")
    chat([str(run), "--w", w, "--prompt", "Write a new song.", "--temperature", "0"])
    assert capsys.readouterr().out == answer


def test_chat_auto_is_refused_where_there_is_no_net(tmp_path, capfd):
    config = dataclasses.replace(
        preset("tiny"), meta=dataclasses.replace(preset("tiny").meta, steps=1)
    )
    Trainer(config, tmp_path / "run").train()
    with pytest.raises(SystemExit) as stop:
        chat([str(tmp_path / "run"), "--w", "auto", "--prompt", "Hi"])
    assert stop.value.code == 2
    assert "no preference-weight-net" in capfd.readouterr().err


def test_statistics_of_the_realised_preference_are_saved(run):
    held = json.loads((run / "statistics.json").read_text())
    assert held["standard"]["mode"] == "standard"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--meal.lam", "1.5"], ("meal.lam=1.5", "[0, 1]")),
        (["--rejection.tau", "0"], ("rejection.tau=0.0", "positive")),
        (["--rejection.q", "0"], ("rejection.q=0.0", "(0, 1]")),
        (["--rollout.backend", "generate"], ("rollout.backend='generate'", "engine")),
        (["--meal.update", "hypergradient", "--rollout.prompts", "1"], ("rollout.prompts=1",)),
        (["--meal.update", "hypergradient", "--meal.policy", "grpo"], ("meal.policy='grpo'",)),
        (["--recipe", "weighted-grpo", "--meal.lam", "0.2"], ("meal.lam=0.2", "meal")),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(capfd, tmp_path, flags, words):
    refused(capfd, ["tiny", "--recipe", "meal", *flags, "--out", str(tmp_path / "x")], *words)
