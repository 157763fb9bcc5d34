"""The sampler: graphs beside eager steps beside `generate`, and its log-probabilities."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from meal_fast.data_types import Rollout
from meal_fast.models.policy import Policy
from meal_fast.rollout import Sampling, backend, engine
from meal_fast.training.losses import sequences
from tools.contact.here import Cases, Here
from tools.contact.shapes import random_policy, requests

# How far from 1 ratios may be before the first update: the largest, and the root of their mean
# square. In bfloat16 the layers of a decode step and of a long pass round apart now and then; on a
# GPU both kinds of attention round their probabilities, each in its own order.
RATIO = {"float32": 1e-3, "bfloat16": 3e-2}
RATIO_RMS = {"float32": 1e-3, "bfloat16": 4e-3}


def cases(here: Here) -> Cases:
    made: Cases = {}
    for name in ("two layers", "SmolLM2-135M"):
        for dtype in ("float32", "bfloat16"):
            made[f"log-probabilities, {name}, {dtype}"] = functools.partial(
                log_probabilities, here, name, dtype
            )
            made[f"three ways, {name}, {dtype}"] = functools.partial(three, here, name, dtype)
    return made


def sizes(here: Here) -> tuple[int, int, int, int]:
    """Prompts, tokens of each, answers to each, tokens of an answer."""
    return (2, 20, 2, 6) if here.rehearsal else (8, 128, 8, 64)


def log_probabilities(here: Here, name: str, dtype: str) -> None:
    """How far the sampler's are from the learner's, as ratios; LoRA at its start, and drawn."""
    count, tokens, samples, new = sizes(here)
    for drawn, what in ((0.0, "before the first update"), (0.02, "with LoRA drawn")):
        policy = random_policy(here, name, dtype, drawn=drawn)
        given = requests(policy, count, tokens, samples)
        sampling = Sampling(new, 1.0, seed=0)
        with engine(policy) as sampler:
            rolled = sampler.generate(given, sampling)
        apart = (learner_logp(policy, rolled, 1.0) - rolled.logp_RT[rolled.mask_RT]).abs()
        worst, rms = float(apart.max().expm1()), float(apart.square().mean().sqrt())
        ok = worst <= RATIO[dtype] and rms <= RATIO_RMS[dtype] if drawn == 0 else None
        here.row(f"largest |ratio − 1|, {what}", worst, ok=ok, note=f"rms {rms:.1e}")


@torch.no_grad()
def learner_logp(policy: Policy, rolled: Rollout, temperature: float) -> torch.Tensor:
    """The log-probabilities of all sampled tokens, as the learners compute them."""
    runs = sequences.micro_batches(rolled, 1 << 14)
    batches = [sequences.packed(rolled, rows) for rows in runs]
    network = policy.network
    return torch.cat([sequences.token_logp(network, rolled, b, temperature) for b in batches])


def three(here: Here, name: str, dtype: str) -> None:
    """The same answers three ways: how many are equal, and tokens a second."""
    policy = random_policy(here, name, dtype, drawn=0.02)
    count, tokens, samples, new = sizes(here)
    given = requests(policy, count, tokens, samples)
    made = {}
    for way, fixed in (("graphs", True), ("eager", False)):
        with engine(policy) as sampler:
            # On a CPU the steps at fixed shapes run as they are: there is nothing to capture.
            sampler.runner.fixed_shapes = fixed
            draw = functools.partial(sampler.generate, given, Sampling(new, 1.0, seed=0))
            made[way] = draw()
            speed(here, way, made[way], here.median_s(draw))

    def generate() -> Rollout:
        return backend("generate")(policy, given, max_new_tokens=new, temperature=1.0, seed=0)

    made["generate"] = generate()
    speed(here, "generate", made["generate"], here.median_s(generate, 3))
    for way in ("eager", "generate"):
        equal = same_rows(made["graphs"], made[way])
        # In bfloat16 rounding decides a token in a few hundred; in float32 one in a million.
        ok = equal >= 0.9 if dtype == "float32" else None
        here.row(f"answers of graphs that {way} gives too", equal, "of 1", ok=ok)


def speed(here: Here, way: str, rolled: Rollout, seconds: float) -> None:
    who = "meal-fast" if way == "graphs" else way
    note = "" if way == "generate" else "its prompts are kept from the call before"
    here.row("sampled", int(rolled.mask_RT.sum()) / seconds, "tokens/s", who=who, note=note)


def same_rows(a: Rollout, b: Rollout) -> float:
    """The share of answers that are equal, token for token."""
    width = min(a.tokens_RT.shape[1], b.tokens_RT.shape[1])
    left, right = (replace(x, tokens_RT=x.tokens_RT[:, :width]) for x in (a, b))
    return float((left.tokens_RT == right.tokens_RT).all(1).float().mean())
