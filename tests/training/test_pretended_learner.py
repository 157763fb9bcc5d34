"""The learner on a pretended GPU: the CPU's values, and what an update launches and waits for.

An update's launches are those of the model's layers, which grow with the model, and the rest:
score, packing, loss, metrics. The rest is what is stated here.
"""

import dataclasses
from collections import Counter

import pytest
import torch

from meal_fast import ops
from meal_fast.config.recipes import spec_of
from meal_fast.data.reward_statistics import Normalizer, Scales
from meal_fast.data_types import Prompt, Scored, Weighted
from meal_fast.models import shared_prefix
from meal_fast.models.policy import load_policy
from meal_fast.rollout import Request, rollout
from meal_fast.training.collectors.base import Sampled
from meal_fast.training.losses.dpo import dpo
from meal_fast.training.losses.grpo import grpo
from meal_fast.training.losses.parm import parm
from meal_fast.training.losses.sequences import micro_batches, packed
from meal_fast.training.losses.sft import sft
from tests.helpers import pretend
from tests.helpers.run_folder import tiny_config

TEMPERATURE = 0.9
close = torch.testing.assert_close
PROMPTS = [Prompt("a", "Write a short word."), Prompt("b", "Hi"), Prompt("c", "Say more.")]


def setting(recipe="weighted-meta-grpo", tuning="lora", **policy_options):
    """A policy on the CPU that has moved a little, rows of uneven length, and their scores."""
    tuning = "bilinear" if recipe == "parm" else tuning
    settings = {"tuning": tuning, "dtype": "float32", **policy_options}
    config = tiny_config(recipe=recipe, policy=settings)
    policy = load_policy(config.policy, config.names)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable:
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    with policy.reference() as base:
        rolled = rollout(
            policy,
            [Request(p, (0.7, 0.3), 4) for p in PROMPTS],
            max_new_tokens=7,
            temperature=TEMPERATURE,
            seed=0,
            network=base,
        )
    lengths = 2 + torch.arange(12)[:, None] % 5
    mask = rolled.mask_RT & (torch.arange(rolled.mask_RT.shape[1]) < lengths)
    old = rolled.logp_RT + 0.3 * torch.randn(mask.shape, generator=generator)
    rolled = dataclasses.replace(rolled, mask_RT=mask, logp_RT=old * mask)
    reward, advantage = torch.randn(2, 12, 2, generator=generator)
    kind = Weighted if spec_of(config).loss == "sft" else Scored
    return config, policy, rolled, kind(reward, advantage[:, 0], advantage[:, 0])


def moved(rolled):
    tensors = {n: x.to("cuda") for n, x in vars(rolled).items() if isinstance(x, torch.Tensor)}
    return dataclasses.replace(rolled, **tensors).told(rolled.groups, rolled.lengths)


def on_cuda(config, policy, rolled, scored):
    """The same on the device that is there."""
    settings = dataclasses.replace(config.policy, device="cuda", dtype="float32")
    copied = load_policy(settings, config.names)
    for mine, theirs in zip(copied.trainable, policy.trainable, strict=True):
        mine.data = theirs.detach().to("cuda")
    return copied, moved(rolled), type(scored)(*(x.to("cuda") for x in vars(scored).values()))


def gradients(policy):
    made = {n: p.grad for n, p in policy.named.items() if p.grad is not None}
    for parameter in policy.trainable:
        parameter.grad = None
    return {n: g.cpu().clone() for n, g in made.items()}


def learner_of(recipe):
    if recipe == "parm":
        return lambda *args: parm(*args, beta_r=0.1)
    return {"mo-odpo": dpo, "meal": sft}.get(recipe, grpo)


WAITS = {  # of the host for the device, in a learner's step
    "weighted-meta-grpo": 0,
    "full": 6,  # two a run, for the embedding's padding_idx
    "keep": 1,  # which rows are worth learning from
    "mo-odpo": 1,  # whether a pair has an order
    "meal": 0,
    "parm": 2,  # that, and a check
}


@pytest.mark.parametrize(
    ("recipe", "tuning", "options"),
    [
        ("weighted-meta-grpo", "lora", {"beta": 0.3}),
        ("weighted-meta-grpo", "lora", {"beta": 0.3, "kl": "exact", "reduce": "grpo"}),
        ("weighted-meta-grpo", "lora", {"beta": 0.0, "reduce": "dr_grpo", "keep": 3}),
        ("weighted-meta-grpo", "full", {"beta": 0.3, "recompute": True}),
        ("mo-odpo", "lora", {"beta": 0.3}),
        ("meal", "lora", {"beta": 0.3}),
        ("parm", "bilinear", {"beta": 0.0}),
    ],
)
def test_a_learner_on_a_gpu_makes_the_gradient_of_the_cpu(interpreter, recipe, tuning, options):
    config, policy, rolled, scored = setting(recipe, tuning)
    grpo_options = dataclasses.replace(config.grpo, micro_tokens=60, **options)
    learner = learner_of(recipe)
    assert len(list(micro_batches(rolled, 60))) > 1
    want_metrics = learner(policy, rolled, scored, grpo_options, TEMPERATURE)
    want = gradients(policy)
    with pretend.device(kernels="interpreted") as cuda:
        there = on_cuda(config, policy, rolled, scored)
        cuda.reset()
        metrics = learner(*there, grpo_options, TEMPERATURE)
        waits = sum(cuda.syncs.values())
        found = {name: value.cpu() for name, value in metrics.items()}
        got = gradients(there[0])
    assert got.keys() == want.keys() and want
    for name, value in want.items():
        close(got[name], value, atol=2e-6, rtol=1e-3, msg=name)
    for name, value in want_metrics.items():
        close(found[name], value, atol=1e-5, rtol=1e-4, check_dtype=False, msg=name)
    # Their gradient would walk through equal indices one by one.
    assert not {n for n in cuda.launches if "index_put" in n}
    key = tuning if tuning == "full" else "keep" if "keep" in options else recipe
    assert waits == WAITS[key], [at for at in cuda.where if at[0] == "sync"]


def counted(cuda):
    """What has been launched since the last time."""
    launches = Counter(cuda.launches)
    cuda.reset()
    return launches


def test_a_rollouts_scores_are_one_launch(interpreter):
    """From raw rewards to advantages; `tanh` is no line, and is taken outside."""
    config, _, rolled, scored = setting()
    for mode, launches in (("max", 1), ("standard", 1), ("none", 1), ("tanh", 4)):
        normalizer = Normalizer(mode, (0.1, 0.2), (0.7, 1.3))
        scales = Scales(normalizer, (1.0, 1.5))
        sampled = Sampled(None, None, scales, config, "smooth-tchebycheff")
        want = sampled.score(scored.reward_RK, rolled)
        with pretend.device(kernels="interpreted") as cuda:
            there, reward = moved(rolled), scored.reward_RK.to("cuda")
            sampled.score(reward, there)  # the normaliser's constants go to the device once
            cuda.reset()
            got = sampled.score(reward, there)
            assert (sum(cuda.launches.values()), cuda.syncs) == (launches, Counter())
            assert got.advantage_R.device.type == "cuda"
            close(got.score_R.cpu(), want.score_R, atol=1e-6, rtol=1e-5)
            close(got.advantage_R.cpu(), want.advantage_R, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("interpreter")
def test_what_an_update_launches_outside_the_layers():
    """One run of rows, with a KL term: packing, states picked, the reference's log-probabilities,
    the loss and its gradient, metrics."""
    config, policy, rolled, scored = setting()
    options = dataclasses.replace(config.grpo, beta=0.1)
    with pretend.device(kernels="counted") as cuda:
        policy, rolled, scored = on_cuda(config, policy, rolled, scored)
        batch = packed(rolled, range(12))
        cuda.reset()
        states = shared_prefix.forward(policy.network.body, batch)
        with policy.reference() as reference, torch.no_grad():
            shared_prefix.forward(reference.body, batch)
        torch.autograd.grad(states, policy.trainable, torch.ones_like(states))
        layers = counted(cuda)
        grpo(policy, rolled, scored, options, TEMPERATURE)
        assert not cuda.syncs
        outside = counted(cuda) - layers
    assert outside.total() <= 60, outside
    kernels = {"_stats": 2, "loss_kernel": 1, "_gradient": 1, "total_kernel": 1}
    assert kernels.items() <= outside.items()


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("options", [{}, {"level": "sequence"}], ids=["token", "sequence"])
@pytest.mark.parametrize("frozen", [True, False])
def test_what_a_further_chunk_of_the_vocabulary_launches(options, frozen):
    """The product, three kernels, and a product for each factor that is trained."""
    found = []
    with pretend.device(kernels="counted") as cuda:
        hidden = torch.randn(12, 8, device="cuda").requires_grad_()
        weight = torch.randn(50, 8, device="cuda").requires_grad_(not frozen)
        target, advantage = torch.zeros(12, dtype=torch.int64), torch.randn(12)
        given = [x.to("cuda") for x in (target, advantage, advantage)]
        sequence = torch.arange(12, device="cuda") // 4
        for chunks in (1, 3):
            cuda.reset()
            ops.linear_policy_loss(
                hidden, weight, *given[:2], old_logp=given[2], ref_logp=given[2], beta=0.1,
                sequence=sequence, max_bytes=12 // chunks * 50 * 4, **options,
            )  # fmt: skip
            assert not cuda.syncs
            found.append(counted(cuda))
    more = found[1] - found[0]
    again = bool(options)  # the second sweep makes the tile once more, for the gradient
    want = {
        "mm": 2 * (2 + again),
        "_stats": 2,
        "_gradient": 2,
        "mul": 2,
        "addmm_": 2 * (not frozen),
    }
    want |= {} if again else {"loss_kernel": 2}
    assert more == Counter(want)
