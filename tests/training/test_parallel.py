"""The tasks of a meta-step in one batch: the same bits of mathematics as one after the other."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from meal_fast.config.config import Config, PolicyConfig, from_dict
from meal_fast.config.presets import preset
from meal_fast.config.run_dir import read_config
from meal_fast.data_types import Prompt
from meal_fast.models.policy import LoRAPolicy, load_policy
from meal_fast.rollout import Engine, Request, Sampling
from meal_fast.training.trainer import Trainer
from tests.helpers.processes import SMALL, assert_same_runs, refused, stopped, train_here, updates
from tests.helpers.run_folder import NAMES, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")


class Stopping(LoRAPolicy):
    """A policy that a quarter of all tokens stop, so that rows differ in length."""

    stop_ids = frozenset(range(0, 5000, 4))


class Norm(torch.nn.Module):
    """RMSNorm in the dtype of its input: transformers' own rounds to float32 on the way."""

    def forward(self, x):
        square = x.pow(2).mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(square + self.variance_epsilon)


class Watched:
    """A run in float64, and what went through it: sampled tokens, gradients."""

    def __init__(self, config: Config, out) -> None:
        self.trainer = trainer = Trainer(config, out)
        trainer.policy.__class__ = Stopping
        trainer.policy.model.double()
        for module in trainer.policy.model.modules():
            if type(module) is LlamaRMSNorm:
                module.__class__ = Norm
        trainer.outer = trainer.recipe.outer(trainer.policy.trainable, config.meta, config.grpo)
        self.loss, update = trainer.recipe.loss, trainer.update_policy
        update.outer, update.loss = trainer.outer, self.learn
        self.sampled: list[list[int]] = []
        self.gradients: dict[tuple[int, int, int], list[torch.Tensor]] = {}
        for number, lane in enumerate(trainer.outer.lanes):
            lane.advance = self.advance(number, lane, lane.advance)
        trainer.train()
        self.lines = updates(out)
        self.theta = [p.detach().clone() for p in trainer.policy.trainable]

    def learn(self, policy, rolled, scored, *options):
        rows = zip(rolled.tokens_RT, rolled.mask_RT, rolled.condition_RK.tolist(), strict=True)
        self.sampled += [[*w, *tokens[mask].tolist()] for tokens, mask, w in rows]
        return self.loss(policy, rolled, scored, *options)

    def advance(self, number, lane, step):
        taken = 0
        meta, lanes = self.trainer.config.meta, len(self.trainer.outer.lanes)

        def advance(*options):
            nonlocal taken
            rounds, inner = divmod(taken, meta.n_inner)
            meta_step, task = divmod(rounds * lanes + number, meta.tasks)
            self.gradients[meta_step, task, inner] = [p.grad.clone() for p in lane.parameters]
            taken += 1
            return step(*options)

        return advance


def watched(tmp_path, parallel, **changes):
    """Two meta-steps of three tasks; every micro-batch of the learner holds some of two tasks."""
    small = {
        "seed": 15,
        "meta": {"tasks": 3, "n_inner": 2, "steps": 2, "parallel": parallel},
        "rollout": {"samples": 4},
        "score": {"calibration": 2},
        "grpo": {"micro_tokens": 130},
    }
    config = from_dict(changes, from_dict(small, preset("tiny")))
    return Watched(config, tmp_path / ("parallel" if parallel else "sequential"))


@pytest.mark.parametrize(
    ("adam", "reduce", "recompute"),
    [("persist_v", "dapo", True), ("reset", "grpo", False), ("per_preference", "dr_grpo", False)],
)
def test_meta_steps_in_float64_are_those_of_one_task_after_the_other(
    tmp_path, adam, reduce, recompute
):
    options = {"reduce": reduce, "recompute": recompute, "max_grad_norm": 0.5}
    options["keep"] = 3 if recompute else 0
    changes = {"meta": {"adam": adam}, "grpo": options}
    if reduce == "grpo":
        changes["grpo"] |= {"kl": "exact", "micro_tokens": 4096}
    one, all_ = (watched(tmp_path, parallel, **changes) for parallel in (False, True))
    assert sorted(one.sampled) == sorted(all_.sampled)
    assert len({len(row) for row in one.sampled}) > 3
    assert one.gradients.keys() == all_.gradients.keys() and len(one.gradients) == 12
    for name, gradients in one.gradients.items():
        assert any(g.abs().max() > 1e-6 for g in gradients)
        for mine, theirs in zip(all_.gradients[name], gradients, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    assert max(line["grad_norm"] for line in one.lines) > 0.5  # some are clipped
    for mine, theirs in zip(all_.theta, one.theta, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    if adam == "per_preference":
        preferences = [tuple(line["w"]) for line in one.lines[::2]]
        assert len(set(preferences[:3]) & set(preferences[3:])) == 2  # kept from the first step
    for mine, theirs in zip(all_.lines, one.lines, strict=True):
        assert list(mine) == list(theirs)
        numbers = {name for name, value in theirs.items() if isinstance(value, float)}
        for name in theirs.keys() - numbers:
            assert mine[name] == theirs[name], name
        for name in numbers:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("adam", ["persist_v", "per_preference"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, adam):
    argv = ["tiny", *SMALL, "--meta.parallel", "true", "--meta.adam", adam, "--meta.steps", "4",
            "--no-evaluate"]  # fmt: skip
    assert train_here(*argv, "--out", str(tmp_path / "straight")) == 0
    assert [line["update"] for line in updates(tmp_path / "straight")] == list(range(16))

    config = read_config(tmp_path / "straight")
    assert stopped(config, tmp_path / "broken", after=5).step == 2
    assert train_here(*argv, "--out", str(tmp_path / "broken"), "--resume") == 0
    assert_same_runs(tmp_path / "broken", tmp_path / "straight")


# ---- the engine's rows and the learner's tokens, each through its own adapter


@pytest.fixture(scope="module")
def policy():
    config = tiny_config()
    held = load_policy(config.policy, config.names, seed=config.seed)
    held.__class__ = Stopping
    return held


@pytest.fixture(scope="module")
def tasks(policy):
    """Three tasks' factors, so large that each speaks another language."""
    generator = torch.Generator().manual_seed(3)
    return [
        [torch.randn(p.shape, generator=generator).mul_(0.2) for p in policy.trainable]
        for _ in range(3)
    ]


@torch.no_grad()
def log_probabilities(policy, factors, prefix, tokens):
    """Of one row, by a plain forward with one task's factors as the policy's own."""
    for parameter, value in zip(policy.trainable, factors, strict=True):
        parameter.copy_(value)
    ids = torch.tensor([[*prefix, *tokens]])
    hidden = policy.network.body(input_ids=ids, use_cache=False).last_hidden_state[0]
    logp = torch.log_softmax(policy.network.logits(hidden), -1)[-len(tokens) - 1 : -1]
    return logp.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()


@pytest.mark.parametrize("options", [{}, {"join": True}, {"fixed": True}, {"max_rows": 3}])
def test_rows_of_several_adapters_are_those_of_plain_forwards(policy, tasks, options):
    """The same prompts under the same preferences, so that only the adapter parts their caches."""
    fixed = options.pop("fixed", False)
    prompts = [Prompt(text, text) for text in ("a short one", "and one that is a little longer")]
    requests = [
        Request(p, w, 2, adapter)
        for p in prompts
        for adapter in range(3)
        for w in ((0.5, 0.5), (1.0, 0.0))
    ]
    with policy.stacked(tasks):
        sampler = Engine(policy, policy.network, **options)
        sampler.runner.fixed_shapes = fixed
        rows = sampler.rows(requests, 6)
        list(sampler.draw(rows, Sampling(6, 1.0, seed=1)))
    found = {}
    for row in rows:
        prefix = row.prompt + row.suffix
        want = log_probabilities(policy, tasks[row.request.task_id], prefix, row.tokens)
        assert row.logp == pytest.approx(want, abs=1e-4, rel=0)
        found.setdefault((prefix, row.sample), set()).add((row.tokens[0], row.logp[0]))
    assert all(len(of_adapters) == 3 for of_adapters in found.values())


def test_a_row_s_stream_is_that_of_a_rollout_of_its_own(policy, tasks):
    prompt, w = Prompt("one", "a short one"), (0.5, 0.5)
    with policy.stacked(tasks):
        sampler = Engine(policy, policy.network)
        asked = [Request(prompt, w, 3, 1, ("step", t)) for t in range(2)]
        together = sampler.generate(asked, Sampling(6, 1.0, 5, ("run",)))
        alone = sampler.generate(
            [Request(prompt, w, 3, 1)], Sampling(6, 1.0, 5, ("run", "step", 1))
        )
    assert together.texts[3:] == alone.texts and together.texts[:3] != alone.texts
    assert together.task_id == (1, 1)


def test_stacked_leaves_the_policy_as_it_was(policy, tasks):
    ids = torch.tensor([policy.encode_prompt("a short one")])

    def states():
        with torch.no_grad():
            return policy.network.body(input_ids=ids, use_cache=False).last_hidden_state

    before = states()
    with pytest.raises(KeyError, match="lost"), policy.stacked(tasks):
        raise KeyError("lost")
    assert torch.equal(states(), before)
    with policy.stacked(()):
        assert torch.equal(states(), before)


# ---- what cannot be


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--policy.tuning", "full"], "policy.tuning='full' has no adapters"),
        (["--recipe", "grid-grpo"], "recipe 'grid-grpo' has no tasks that go at once"),
        (["--recipe", "meal"], "recipe 'meal'"),
        (["--rollout.backend", "generate"], "rollout.backend='generate' takes one adapter"),
    ],
)
def test_what_has_no_adapters_or_no_tasks_is_refused(tmp_path, capfd, argv, reason):
    run = tmp_path / "run"
    argv = ["tiny", "--meta.parallel", "true", *argv, "--out", str(run)]
    refused(capfd, argv, "meta.parallel=True", reason, "leave it out")
    assert not run.exists()


def test_adapters_on_other_layers_are_refused(tmp_path, policy):
    """GPT-2's layers are no linear ones: PEFT wraps them, and computes them itself."""
    size = {"vocab_size": len(policy.tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 4}
    GPT2LMHeadModel(GPT2Config(**size)).save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    config = PolicyConfig(path=str(tmp_path), lora_rank=4, device="cpu")
    other = load_policy(config, NAMES)
    with pytest.raises(ValueError, match=r"meta\.parallel=True: GPT2Model has adapters on"):
        with other.stacked([other.trainable]):
            pass
    parallel = {"policy": {"path": str(tmp_path)}, "meta": {"parallel": True}}
    with pytest.raises(ValueError, match=r"meta\.parallel=True: GPT2Model has adapters on"):
        Trainer(from_dict(parallel, preset("tiny")), tmp_path / "run")
    assert not (tmp_path / "run").exists()
