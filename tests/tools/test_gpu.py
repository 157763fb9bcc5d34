"""The whole path on a card, each test with its twin on the CPU; the kernels' own tests lie apart.

Never run on a card so far.
"""

import dataclasses
import json
import math

import pytest
import torch

from meal_fast.config.config import GRPOConfig, PolicyConfig
from meal_fast.config.presets import preset
from meal_fast.data.prompts import load_prompts
from meal_fast.data_types import Scored
from meal_fast.models.policy import load_policy
from meal_fast.rollout import Request, Sampling, engine
from meal_fast.training.losses.grpo import grpo
from meal_fast.training.recipes import RECIPES
from meal_fast.training.trainer import Trainer
from tools.contact.sampler import RATIO, RATIO_RMS, learner_logp

NAMES = ("first", "second")
ON_BOTH = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def policy_on(device, dtype="float32", drawn=0.1):
    """The tiny world's, its LoRA factors all drawn."""
    config = PolicyConfig(
        path="world:tiny", lora_rank=4, lora_alpha=8, preference_text="numbers", device=device,
        dtype=dtype,
    )  # fmt: skip
    policy = load_policy(config, NAMES)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named.items():
            if drawn and "lora_B" in name:
                parameter.copy_(drawn * torch.randn(parameter.shape, generator=generator))
    return policy


def some_requests(samples=4):
    prompts = load_prompts("world:tiny", "train")[:4]
    return [Request(p, w, samples) for p in prompts for w in ((0.2, 0.8), (0.9, 0.1))]


@pytest.mark.parametrize("device", ON_BOTH)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_takes_a_meta_step(tmp_path, recipe, device):
    tiny = preset("tiny")
    tuning = "bilinear" if recipe == "parm" else "lora"
    config = dataclasses.replace(
        tiny,
        recipe=recipe,
        policy=dataclasses.replace(tiny.policy, tuning=tuning, device=device),
        meta=dataclasses.replace(tiny.meta, steps=1),
    )
    trainer = Trainer(config, tmp_path / "run")
    assert trainer.policy.device.type == device
    assert trainer.train()
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    learned = [line for line in lines if not line.get("skipped")]
    assert learned and all(math.isfinite(x[k]) for x in learned for k in ("loss", "grad_norm"))
    assert (tmp_path / "run" / "policy" / "model.safetensors").is_file()


@pytest.mark.parametrize("device", ON_BOTH)
def test_steps_at_fixed_shapes_draw_the_tokens_of_others_and_of_the_cpu(device):
    """On a card the steps at fixed shapes are graphs."""
    drawn = []
    for where, fixed in ((device, True), (device, False), ("cpu", False)):
        with engine(policy_on(where), max_rows=16) as sampler:
            sampler.runner.fixed_shapes = fixed
            for _ in range(2):  # the second time from graphs that are there
                out = sampler.generate(some_requests(), Sampling(12, 1.0, seed=3))
        drawn.append(out)
    fixed, plain, on_cpu = drawn
    assert fixed.texts == plain.texts == on_cpu.texts
    torch.testing.assert_close(fixed.logp_RT, plain.logp_RT, rtol=0, atol=1e-4)
    torch.testing.assert_close(fixed.logp_RT.cpu(), on_cpu.logp_RT, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", "float32"),
        pytest.param("cuda", "float32", marks=pytest.mark.gpu),
        pytest.param("cuda", "bfloat16", marks=pytest.mark.gpu),
    ],
)
def test_before_the_first_update_the_ratio_is_one(device, dtype):
    policy = policy_on(device, dtype, drawn=0.0)
    with engine(policy) as sampler:
        out = sampler.generate(some_requests(), Sampling(12, 0.9, seed=3))
    logp = learner_logp(policy, out, 0.9)
    ratio = (logp - out.logp_RT[out.mask_RT]).exp()
    apart = (ratio - 1).abs()
    assert float(apart.max()) <= RATIO[dtype]
    assert float(apart.square().mean().sqrt()) <= RATIO_RMS[dtype]


@pytest.mark.parametrize("device", ON_BOTH)
def test_the_loss_and_its_gradient_are_those_of_float64(device):
    with engine(policy_on("cpu")) as sampler:
        rolled = sampler.generate(some_requests(), Sampling(12, 1.0, seed=3))
    rows = len(rolled.group_R)
    options, advantage = GRPOConfig(beta=0.1, kl="exact"), torch.linspace(-1, 1, rows)
    found = []
    for where, dtype in ((device, torch.float32), ("cpu", torch.float64)):
        policy = policy_on(where)
        policy.model.to(dtype)
        moved = {
            f.name: value.to(where, dtype if value.is_floating_point() else None)
            for f in dataclasses.fields(rolled)
            if isinstance(value := getattr(rolled, f.name), torch.Tensor)
        }
        given = advantage.to(where, dtype)
        scored = Scored(moved["condition_RK"], given, given)
        metrics = grpo(policy, dataclasses.replace(rolled, **moved), scored, options, 1.0)
        flat = torch.cat([p.grad.flatten() for p in policy.trainable])
        found.append((metrics["loss"].double().cpu(), flat.double().cpu()))
    (loss, gradient), (true_loss, true_gradient) = found
    torch.testing.assert_close(loss, true_loss, rtol=1e-3, atol=1e-5)
    assert (gradient - true_gradient).norm() < 5e-3 * true_gradient.norm()
