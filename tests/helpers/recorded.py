"""What a learner was given, kept as text; and a policy that computes the same on every CPU."""

import json
import math

import pytest
import torch
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from meal_fast.data.toy import _noise as noise
from meal_fast.data_types import Prompt, Rollout, Scored, Weighted
from meal_fast.training.batch import Batch, Task


def task(prompts, preference, rng_key=("test", 0), *, update=0, progress=0.0) -> Task:
    """An inner update, asked for by itself."""
    return Task(update, update, 0, 0, preference, tuple(prompts), rng_key, progress, 0.0)


class Recorder:
    """Stands before a trainer's collector, and keeps what each update learns from."""

    def __init__(self, collector) -> None:
        self._collector, self.batches = collector, []

    def __getattr__(self, name):
        return getattr(self._collector, name)

    def collect(self, tasks):
        self.batches.append(self._collector.collect(tasks))
        return self.batches[-1]


class Recorded:
    """Stands for a trainer's collector: what was recorded, in turn."""

    def __init__(self, collector, batches) -> None:
        self.scales, self._batches = collector.scales, iter(batches)
        self.counts = {}

    def collect(self, tasks):
        return next(self._batches)


def to_text(batches: list[Batch]) -> str:
    """One line of JSON for each rollout; log-probabilities to six digits after the point."""
    return "".join(json.dumps(_values(batch), separators=(",", ":")) + "\n" for batch in batches)


def _values(batch: Batch) -> dict:
    rolled, scored = batch.rolled, batch.scored
    lengths, groups = rolled.mask_RT.sum(1).tolist(), rolled.group_R.tolist()
    assert all(row == sorted(row, reverse=True) for row in rolled.mask_RT.tolist())  # no gaps
    first = [groups.index(g) for g in range(len(rolled.prefix))]
    w_BK = rolled.condition_RK[first]
    assert torch.equal(w_BK[rolled.group_R], rolled.condition_RK) and not rolled.task_id
    return {
        "prefix": rolled.prefix,
        "w": w_BK.tolist(),
        "group": groups,
        "tokens": [row[:n] for row, n in zip(rolled.tokens_RT.tolist(), lengths, strict=True)],
        "logp": [
            [round(x, 6) for x in row[:n]]
            for row, n in zip(rolled.logp_RT.tolist(), lengths, strict=True)
        ],
        "on_policy": rolled.on_policy,
        "reward": scored.reward_RK.tolist(),
        "score": scored.score_R.tolist(),
        "advantage": last(scored).tolist(),
    }


def last(scored: Scored | Weighted) -> torch.Tensor:
    """The advantages, or the weights in the loss."""
    return scored.advantage_R if isinstance(scored, Scored) else scored.loss_weight_R


def from_text(text: str, kind: type[Scored] | type[Weighted] = Scored) -> list[Batch]:
    return [_batch(json.loads(line), kind) for line in text.splitlines()]


def _batch(values: dict, kind: type[Scored] | type[Weighted]) -> Batch:
    group_R = torch.tensor(values["group"])
    lengths = [len(row) for row in values["tokens"]]
    width = max(lengths)

    def padded(rows, **kind):
        return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], **kind)

    rolled = Rollout(
        prompts=tuple(Prompt(str(b), str(b)) for b in range(len(values["prefix"]))),
        prefix=tuple(map(tuple, values["prefix"])),
        group_R=group_R,
        condition_RK=torch.tensor(values["w"])[group_R],
        tokens_RT=padded(values["tokens"]),
        mask_RT=torch.arange(width) < torch.tensor(lengths)[:, None],
        logp_RT=padded(values["logp"], dtype=torch.float32),
        finish=("length",) * len(group_R),
        texts=("",) * len(group_R),
        on_policy=values["on_policy"],
        prefill_tokens=0,
        reused_tokens=0,
        seconds=1.0,
    )
    reward_RK = torch.tensor(values["reward"])
    scored = kind(reward_RK, torch.tensor(values["score"]), torch.tensor(values["advantage"]))
    return Batch(rolled, scored, reward_RK, sum(lengths))


@pytest.fixture
def float64_llama(monkeypatch):
    """transformers' Llama computes its norms and its rotary angles in float32, whatever the dtype;
    within this fixture they are of the dtype that comes in."""

    def norm(self, hidden):
        return F.rms_norm(hidden, hidden.shape[-1:], self.weight, self.variance_epsilon)

    def rotary(self, x, position_ids):
        config = self.config
        width = config.hidden_size // config.num_attention_heads
        exponent = torch.arange(0, width, 2, dtype=torch.float64) / width
        angle = position_ids[..., None] * config.rope_parameters["rope_theta"] ** -exponent
        both = torch.cat((angle, angle), -1)
        return both.cos().to(x.dtype), both.sin().to(x.dtype)

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(LlamaRotaryEmbedding, "forward", rotary)


@torch.no_grad()
def make_exact(trainer) -> None:
    """The trainer's policy in float64, with what it trains at values that no CPU rounds otherwise.

    They lie off the reference, so that ratio, KL and both factors of an adapter count.
    """
    policy, config = trainer.policy, trainer.config
    for model in (policy.model, policy.reference_lm):
        model.double()
    full = config.policy.tuning == "full"
    for name, parameter in policy.named.items():
        drawn = noise(name, parameter.shape, 0.02 if full else 0.1).double()
        parameter.copy_(parameter + drawn if full else drawn)
    trainer.outer = trainer.recipe.outer(policy.trainable, config.meta, config.grpo)
    trainer.update_policy.outer = trainer.outer


def projections(named: dict[str, torch.Tensor], count: int = 8) -> list[float]:
    """The parameters' products with `count` fixed random directions: every one of them counts."""
    sums = [
        [float((noise(f"{name}/{i}", p.shape, 1.0) * p.detach()).sum()) for i in range(count)]
        for name, p in named.items()
    ]
    return [math.fsum(column) for column in zip(*sums, strict=True)]
