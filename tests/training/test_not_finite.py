"""A loss or a gradient that is not finite: the step is left out, and nothing else knows of it."""

import json
import math
import sys

import pytest
import torch
from safetensors.torch import load_file

from meal_fast import ops
from meal_fast.config.config import GRPOConfig, MetaConfig, from_dict
from meal_fast.config.presets import preset
from meal_fast.config.recipes import RECIPES
from meal_fast.data_types import Prompt
from meal_fast.models.policy import load_policy
from meal_fast.rollout import Request, rollout
from meal_fast.training import outer
from meal_fast.training.batch import Task
from meal_fast.training.net_trainer import NetTrainer
from meal_fast.training.preference_net import PreferenceNet
from meal_fast.training.skips import Skips
from meal_fast.training.trainer import Trainer
from meal_fast.training.warmup import learned
from tests.helpers.checkpoints import saved
from tests.helpers.processes import train_here

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*not finite.*it is skipped"),
]


def every_tensor(value):
    """All tensors in a checkpoint's nested values."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from every_tensor(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from every_tensor(part)


def broken_at(monkeypatch, broken, value=float("nan")):
    """Put `value` into the gradient of the steps with these numbers, the first being 1."""
    steps, advance = [0], outer.Joint.advance

    def spoilt(self, lr, max_grad_norm):
        steps[0] += 1
        if steps[0] in broken:
            self.parameters[0].grad.view(-1)[0] = value
        return advance(self, lr, max_grad_norm)

    monkeypatch.setattr(outer.Joint, "advance", spoilt)


CASES = [
    *(
        (recipe, {"policy": {"tuning": "bilinear"}} if recipe == "parm" else {})
        for recipe in RECIPES
    ),
    ("weighted-meta-grpo", {"policy": {"tuning": "full"}}),
    ("weighted-meta-grpo", {"meta": {"adam": "per_preference"}}),
    ("weighted-meta-grpo", {"meta": {"parallel": True}}),
    ("weighted-meta-grpo", {"grpo": {"epochs": 2}}),
]


@pytest.mark.reliability("lost", "one gradient that is not finite, in every recipe")
@pytest.mark.parametrize(("recipe", "more"), CASES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_broken_gradient_is_skipped(tmp_path, monkeypatch, recipe, more, value):
    values = {"recipe": recipe, "checkpoint_every": 1, **more}
    values["meta"] = {"steps": 3, **more.get("meta", {})}
    config = from_dict(values, preset("tiny"))
    epochs = config.grpo.epochs
    broken_at(monkeypatch, range(2 * epochs + 1, 3 * epochs + 1), value)
    with pytest.warns(UserWarning, match=r"grad_norm (nan|inf) is not finite; it is skipped"):
        assert Trainer(config, tmp_path / "run").train()
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [row["skipped"] for row in rows if "skipped" in row] == ["not finite"]
    (row,) = [row for row in rows if "skipped" in row]
    assert row["not_finite"].keys() == {"grad_norm"} and row["left_out"] == epochs
    assert "loss" not in row and "loss" in rows[0]
    tensors = list(every_tensor(saved(tmp_path / "run").load()["outer"]))
    assert tensors and all(bool(x.isfinite().all()) for x in tensors)


@pytest.mark.parametrize("adam", ["persist_v", "reset", "per_preference"])
def test_a_skipped_step_moves_nothing(adam):
    """Neither parameters nor Adam's state, at first and later on; the others' mean is theirs."""
    torch.manual_seed(0)
    start, gradient = torch.randn(4), torch.randn(4)
    loops, once = [], ()
    for bad in (False, True):
        # Of two tasks' deltas, one of them zero, the mean is half.
        meta = MetaConfig(n_inner=2, tasks=2, adam=adam, epsilon=2.0 if bad else 1.0)
        parameter = torch.nn.Parameter(start.clone())
        loop = outer.Reptile([parameter], meta, GRPOConfig(lr=0.1))
        shares = [[(number, (1.0, 0.0)) for number in range(1 + bad)]]
        # At first without a state of Adam's; then one that stays is one of those that are averaged.
        for _ in range(1 if adam == "persist_v" and bad else 2):
            loop.begin(shares)
            with loop.tasks([(0, (1.0, 0.0))]):
                for _ in range(2):
                    parameter.grad = gradient.clone()
                    loop.advance(0.1, 1.0)
                    assert float(loop.left_out) == 0
            if bad:
                with loop.tasks([(1, (0.0, 1.0))]):
                    for value in (math.nan, math.inf):
                        parameter.grad = torch.full((4,), value)
                        loop.watch(torch.tensor(1.0))
                        norm = loop.advance(0.1, 1.0)
                        assert not norm.isfinite() and float(loop.left_out) == 1
                        loop.settle()
                    if adam == "persist_v":  # it stays as the task found it
                        for name, values in loop._start.items():
                            assert all(map(torch.equal, loop._adam()[name], values))
                        assert bool(loop._adam()) == bool(loop._start)
            loop.end(0.0)
            if not bad and not once:
                once = (parameter.detach().clone(), loop.state()["adam"])
        state = loop.state()
        kept = state["by_preference"][1.0, 0.0] if adam == "per_preference" else state["adam"]
        loops.append((parameter.detach(), kept))
    if adam == "persist_v":
        assert loops[1][1] and torch.equal(once[0], loops[1][0])
        loops[0] = once
    assert torch.equal(loops[0][0], loops[1][0])
    if adam == "reset":  # no task sees what another one left
        return
    assert loops[0][1].keys() == loops[1][1].keys()
    for name, values in loops[0][1].items():
        assert all(torch.equal(a, b) for a, b in zip(values, loops[1][1][name], strict=True))


def test_a_loss_that_is_not_finite_leaves_the_step_out_as_well():
    parameter = torch.nn.Parameter(torch.ones(3))
    loop = outer.Joint([parameter], MetaConfig(), GRPOConfig(lr=0.1))
    for loss, left_out in ((math.inf, 1), (1.0, 0)):
        parameter.grad = torch.ones(3)
        loop.watch(torch.tensor(loss))
        loop.advance(0.1, 0.0)
        assert float(loop.left_out) == left_out
        assert torch.equal(parameter.detach(), torch.ones(3)) == bool(left_out)
    parameter.grad = torch.full((3,), 1e25)  # its square is what Adam would keep
    loop.advance(0.1, 0.0)
    assert float(loop.left_out) == 1


@pytest.mark.reliability("lost", "every gradient from some update on is not finite")
@pytest.mark.parametrize("limit", [1, 5])
def test_too_many_in_a_row_end_the_run_with_what_it_had(tmp_path, capfd, monkeypatch, limit):
    broken_at(monkeypatch, range(6, 1000))
    run = tmp_path / "run"
    argv = ["tiny", "--meta.steps", "9", "--no-evaluate", "--grpo.skip_limit", str(limit)]
    assert train_here(*argv, "--out", str(run)) == 2
    err = capfd.readouterr().err
    last = err[err.rindex("meal-fast: error") :]
    assert last.count("\n") == 1
    for words in (f"update {4 + limit}: grad_norm nan", f"skip_limit={limit}", "lower grpo.lr"):
        assert words in last
    assert saved(run).step == (2 if limit == 1 else 3)
    tensors = list(every_tensor(saved(run).load()["outer"]))
    assert all(bool(x.isfinite().all()) for x in tensors)
    monkeypatch.undo()
    assert train_here("--resume", "--no-evaluate", "--out", str(run)) == 0  # it was a passing one


def test_an_update_without_an_answer_is_counted_apart(tmp_path):
    """Such a one neither ends a row of broken updates nor makes it longer."""
    task = Task(3, 0, 0, 0, (0.5, 0.5), (), (), 0.0, 1e-3)
    skips = Skips(GRPOConfig(skip_limit=2))
    bad = {"loss": math.nan, "grad_norm": 1.0, "left_out": 1.0}
    assert skips.said(task, bad)["not_finite"] == {"loss": "nan"}
    assert skips.said(task, {}) == {} and not skips.too_many
    skips.said(task, bad)
    assert "update 3: loss nan" in skips.too_many


@pytest.mark.reliability("lost", "a preference net whose step is not finite")
@pytest.mark.parametrize("way", ["step", "descend"])
@pytest.mark.filterwarnings("ignore:preference net")
def test_the_preference_net_is_put_back(way):
    net = PreferenceNet(("a", "b"), 8, 4, seed=0)
    trainer = NetTrainer(net)
    prompts = [Prompt("x", "x"), Prompt("y", "y")]
    trainer.add(prompts, torch.randn(2, 8), torch.full((2, 2), 0.5), torch.arange(2))
    assert "net_loss" in trainer.step()
    before = trainer.state()
    if way == "descend":
        surrogate = net(torch.randn(2, 8)).sum() * math.nan
        assert trainer.descend(surrogate) == {"net_skipped": 1.0}
    else:
        trainer._held["x"] = (torch.full((8,), math.inf), torch.tensor([0.5, 0.5]))
        assert trainer.step() == {"net_skipped": 1.0}
    after = trainer.state()
    for name in ("net", "adam"):
        old, new = (list(every_tensor(state[name])) for state in (before, after))
        assert old and all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


@pytest.mark.reliability("lost", "a warm start whose gradient is not finite")
@pytest.mark.parametrize("broken", [1, 100])
def test_a_warm_start_skips_and_gives_up(tmp_path, monkeypatch, broken):
    values = {"warmup": {"steps": 8, "draws": 16}, "meta": {"steps": 1}}
    config = from_dict(values, preset("tiny"))
    clip, calls = torch.nn.utils.clip_grad_norm_, [0]

    def spoilt(parameters, norm):
        parameters, calls[0] = list(parameters), calls[0] + 1
        if 2 <= calls[0] < 2 + broken:
            parameters[0].grad.view(-1)[0] = math.nan
        return clip(parameters, norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoilt)
    run = tmp_path / "run"
    if broken == 1:
        assert Trainer(config, run).train()
        assert all(bool(x.isfinite().all()) for x in learned(run).values())
        report = json.loads((run / "warmup" / "report.json").read_text())
        assert report["nll"][1] == 0 and all(math.isfinite(x) for x in report["nll"])
    else:
        with pytest.raises(ValueError, match=r"warm start, step 5.*lower warmup.lr"):
            Trainer(config, run)


HUGE = """
calls = [0]
def score(prompts, responses):
    calls[0] += 1
    size = 2e38 if calls[0] > 4 else 1.0
    return [(size if i % 2 else -size) * (1 + 0.01 * len(r)) for i, r in enumerate(responses)]
"""


@pytest.mark.reliability("lost", "rewards so large that their mean and their scores overflow")
@pytest.mark.parametrize("recipe", ["weighted-meta-grpo", "mo-odpo", "meal", "ric"])
def test_rewards_that_overflow(tmp_path, monkeypatch, recipe):
    (tmp_path / "objective_huge.py").write_text(HUGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "objective_huge", raising=False)
    run = tmp_path / "run"
    argv = ["tiny", "--recipe", recipe, "--objectives", "a=world:first", "b=objective_huge:score"]
    assert train_here(*argv, "--meta.steps", "2", "--no-evaluate", "--out", str(run)) == 0
    rows = [
        json.loads(line, parse_constant=pytest.fail)
        for name in ("metrics.jsonl", "completions.jsonl")
        for line in (run / name).read_text().splitlines()
    ]
    assert any(row["rewards"]["b"] is None for row in rows)
    saved = load_file(run / "policy" / "model.safetensors")
    assert all(bool(x.isfinite().all()) for x in saved.values())


@pytest.mark.reliability("lost", "rewards whose squares are no float32, in statistics.json")
def test_large_rewards_leave_statistics_that_can_be_read(tmp_path):
    from meal_fast.config.config import ScoreConfig
    from meal_fast.data.reward_statistics import Scales

    large = torch.tensor([[1e38, 0.0], [2e38, 1.0], [3e38, 0.5]])
    scales = Scales.fit(large, ScoreConfig(), standard=False)
    scales.save(tmp_path / "statistics.json", ("a", "b"), 0.1, large)
    assert Scales.load(tmp_path / "statistics.json").normalizer == scales.normalizer
    held = json.loads((tmp_path / "statistics.json").read_text())["calibration"]
    assert held["mean"][0] == pytest.approx(2e38) and held["std"][0] == pytest.approx(1e38, rel=0.3)


@pytest.mark.reliability("silent", "a policy whose logits are not finite is asked for answers")
@pytest.mark.parametrize("backend", ["engine", "generate"])
def test_logits_that_are_not_finite_are_no_answer(backend, monkeypatch):
    config = preset("tiny")
    policy = load_policy(config.policy, config.names)
    prompt = Prompt("0f1e", "Write a note.")
    asked = {"max_new_tokens": 3, "temperature": 0.9, "seed": 0, "backend": backend}
    assert rollout(policy, [Request(prompt, (0.5, 0.5), 2)], **asked).texts
    with torch.no_grad():
        next(iter(policy.named.values())).fill_(math.nan)
    named = "prompt 0f1e: the model's logits are not finite"
    with pytest.raises(ValueError, match=named if backend == "engine" else "row 0 has a NaN"):
        rollout(policy, [Request(prompt, (0.5, 0.5), 2)], **asked)
    # On a GPU the op does not look: what it gives is seen where it is read anyway.
    real = ops.sample

    def unseeing(logits, **options):
        token, logp, cut = real(logits.nan_to_num(0.0), **options)
        return token, torch.where(logits.isnan().any(1), math.nan, logp), cut

    monkeypatch.setattr(ops, "sample", unseeing)
    with pytest.raises(ValueError, match=named):
        rollout(policy, [Request(prompt, (0.5, 0.5), 2)], **asked)
