"""GRPO under a smooth Tchebycheff score, for two preferences: the whole loop, without the trainer.

    python examples/minimal_loop.py [STEPS]

What is used of meal_fast are its ops, its sampler, and what loads policy, prompts and objectives.
One small random model reads the preference w in its prompt and learns to answer by it, in some
ten seconds on a CPU. `meal_fast.training` adds the outer loop, micro-batches, checkpoints, recipes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

if __name__ == "__main__":  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from meal_fast import ops
from meal_fast.config.config import PolicyConfig
from meal_fast.data.objectives import Objectives, load_objectives
from meal_fast.data.prompts import load_prompts
from meal_fast.data_types import Prompt, Rollout
from meal_fast.models import shared_prefix
from meal_fast.models.network import Network
from meal_fast.models.policy import Policy, load_policy
from meal_fast.models.shared_prefix import Packed
from meal_fast.rollout import Request, Sampling, open_backend

NAMES = ("first", "second")
OBJECTIVES = ("first=world:first", "second=world:second")
PREFERENCES = ((0.9, 0.1), (0.1, 0.9))  # w, on the simplex
UTOPIA, MU = (1.1, 1.1), 0.1  # z*, a little above the best reward; smoothing of the score
PROMPTS, SAMPLES, TOKENS = 2, 16, 6  # of a step; a group; a response
LR, BETA, TEMPERATURE = 1e-2, 0.02, 1.0  # BETA: of the KL term to the model before training


def sample(policy: Policy, prompts: list[Prompt], step: int, samples: int = SAMPLES) -> Rollout:
    """Draw a group of responses to each prompt under each w, every prefix computed once."""
    requests = [Request(p, w, samples) for p in prompts for w in PREFERENCES]
    sampling = Sampling(TOKENS, TEMPERATURE, seed=0, rng_key=("minimal", step))
    with open_backend("engine", policy) as sampler:  # on the weights as they are now
        return sampler.generate(requests, sampling)


def rewards_of(objectives: Objectives, rolled: Rollout) -> torch.Tensor:
    """Give rewards (R, K), raw."""
    return objectives.rewards([rolled.prompts[g].text for g in rolled.groups], rolled.texts)


def hidden_of(network: Network, packed: Packed) -> torch.Tensor:
    """Give the hidden states (M, D) that predict the M sampled tokens."""
    return packed.predicting(shared_prefix.forward(network.body, packed))


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, rolled: Rollout, advantage_R: torch.Tensor
) -> dict[str, float]:
    """Take one step of AdamW along the gradient of GRPO's loss; give loss and KL."""
    packed = shared_prefix.pack(rolled.prefix, rolled.groups, rolled.lengths, rolled.tokens_RT)
    target_M = rolled.tokens_RT.reshape(-1)[packed.sampled_M]
    with policy.reference() as base, torch.no_grad():  # the model before training
        base_logp_M, _ = ops.linear_logprob(
            hidden_of(base, packed), base.weight, target_M, temperature=TEMPERATURE, bias=base.bias
        )
    network = policy.network
    loss, metrics = ops.linear_policy_loss(  # head, log-probabilities, ratio and KL in one sweep
        hidden_of(network, packed),
        network.weight,
        target_M,
        advantage_R[packed.row_M],
        old_logp=rolled.logp_RT.reshape(-1)[packed.sampled_M],
        ref_logp=base_logp_M,
        sequence=packed.row_M,
        beta=BETA,
        reduce="grpo",
        temperature=TEMPERATURE,
        bias=network.bias,
    )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.trainable, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": float(loss.detach()), "kl": float(metrics["kl"])}


def measured(policy: Policy, objectives: Objectives, prompts: list[Prompt]) -> list[list[float]]:
    """Give the mean rewards under each w, from 32 responses a prompt."""
    rolled = sample(policy, prompts, step=-1, samples=32)
    reward_RK = rewards_of(objectives, rolled)
    w_R = torch.tensor([group % len(PREFERENCES) for group in rolled.groups])
    return [reward_RK[w_R == i].mean(0).tolist() for i in range(len(PREFERENCES))]


def show(when: str, table: list[list[float]]) -> None:
    """Print mean rewards by w."""
    for w, row in zip(PREFERENCES, table, strict=True):
        rewards = "  ".join(f"{name} {x:+.2f}" for name, x in zip(NAMES, row, strict=True))
        print(f"{when:>7}  w={w[0]:.1f},{w[1]:.1f}  {rewards}")


def main(steps: int = 60) -> tuple[list[list[float]], list[list[float]]]:
    """Train, and give the mean rewards by w before and after."""
    torch.set_num_threads(1)  # two layers: more threads would only wait for each other
    config = PolicyConfig(
        path="world:tiny", lora_rank=4, lora_alpha=8, preference_text="numbers", device="cpu"
    )
    policy = load_policy(config, NAMES, seed=0)
    objectives = load_objectives(OBJECTIVES)
    prompts = list(load_prompts("world:tiny", "train"))
    held_out = list(load_prompts("world:tiny", "evaluation"))
    optimizer = torch.optim.AdamW(policy.trainable, lr=LR, weight_decay=0.0)
    before = measured(policy, objectives, held_out)
    show("before", before)
    for step in range(steps):
        asked = [prompts[(step * PROMPTS + i) % len(prompts)] for i in range(PROMPTS)]
        rolled = sample(policy, asked, step)
        score_R, advantage_R = ops.group_advantages(
            rewards_of(objectives, rolled),
            rolled.condition_RK,
            rolled.group_R,
            utopia=UTOPIA,
            mu=MU,
        )
        metrics = update(policy, optimizer, rolled, advantage_R)
        if step % 10 == 0:
            print(f"step {step:2}  score {score_R.mean():+.3f}  KL {metrics['kl']:.4f}")
    after = measured(policy, objectives, held_out)
    show("after", after)
    return before, after


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
