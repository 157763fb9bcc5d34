"""Where the time goes: a decode step and an update, at the shapes of real models."""

from __future__ import annotations

import functools
import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.profiler import ProfilerActivity, profile

from meal_fast.config.config import GRPOConfig
from meal_fast.data_types import Rollout, Scored
from meal_fast.models.policy import Policy
from meal_fast.rollout import Sampling, engine
from meal_fast.training.losses.grpo import grpo
from tools.contact.here import Cases, Here
from tools.contact.shapes import (
    SHAPES,
    kv_bytes,
    prefix_tokens,
    random_policy,
    requests,
    weights,
)

KERNELS = 8  # of a profile, by their share of the time
# Names of the CUDA runtime's and driver's calls.
LAUNCH = re.compile(r"cu(da)?(LaunchKernel|LaunchCooperativeKernel|GraphLaunch)")
WAIT = re.compile(r"cu(da)?(Device|Stream|Event|Ctx)Synchronize")


def cases(here: Here) -> Cases:
    made: Cases = {}
    for name in SHAPES:
        for rows in (4, 8) if here.rehearsal else (64, 256):
            made[f"decode, {name}, {rows} rows"] = functools.partial(decode, here, name, rows)
    for name in SHAPES:
        for beta in (0.0, 0.04):
            made[f"learner, {name}, beta {beta}"] = functools.partial(learner, here, name, beta)
    return made


def decode(here: Here, name: str, rows: int) -> None:
    """Steps of one engine whose prompts are computed: bfloat16, 8 answers to a prompt."""
    policy = random_policy(here, name, "bfloat16")
    samples, tokens, new = (2, 16, 4) if here.rehearsal else (8, 200, 64)
    given = requests(policy, rows // samples, tokens, samples)
    with engine(policy, max_rows=rows) as sampler:

        def draw(length: int = new) -> Rollout:
            return sampler.generate(given, Sampling(length, 1.0, seed=0))

        begin = time.perf_counter()
        draw()
        first = time.perf_counter() - begin
        draw()
        step = here.median_s(draw) / new
        seen = profiled(here, functools.partial(draw, new // 4))
    moved = weights(policy)[1] + kv_bytes(policy, prefix_tokens(policy, given) + rows * new / 2)
    floor, note = here.floor_s(moved=moved), f"reads {moved / 1e6:.0f} MB at least"
    here.row("a step", step * 1e3, "ms", floor=floor * 1e3, note=note)
    here.row("decoded", rows / step, "tokens/s")
    here.row("first call: prompts, compiling, capturing", first, "s")
    say(here, seen, new // 4, "step")


def learner(here: Here, name: str, beta: float) -> None:
    """GRPO's loss and gradient of 8,192 sampled tokens, bfloat16 with LoRA."""
    policy = random_policy(here, name, "bfloat16", drawn=0.02)
    count, tokens, samples, new = (2, 16, 2, 4) if here.rehearsal else (8, 200, 8, 128)
    given = requests(policy, count, tokens, samples)
    with engine(policy) as sampler:
        rolled = sampler.generate(given, Sampling(new, 1.0, seed=0))
    scored = random_scores(rolled, here.device)
    options = GRPOConfig(beta=beta, micro_tokens=16_384)

    def update() -> None:
        for p in policy.trainable:
            p.grad = None
        grpo(policy, rolled, scored, options, 1.0)

    update()
    seconds, answered = here.median_s(update), int(rolled.mask_RT.sum())
    flops = update_flops(policy, answered, prefix_tokens(policy, given), reference=beta > 0)
    floor, note = here.floor_s(flops=flops), f"{flops / 1e12:.2f} TFLOP of products at least"
    here.row("loss and gradient", seconds * 1e3, "ms", floor=floor * 1e3, note=note)
    here.row("learnt from", answered / seconds, "tokens/s")
    if here.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        update()
        here.row("memory at its peak", torch.cuda.max_memory_allocated() / 2**30, "GiB")
    say(here, profiled(here, update), 1, "update")


def update_flops(policy: Policy, answered: int, shared: int, *, reference: bool) -> float:
    """Operations of the products that an update with frozen weights cannot do without.

    Two for each weight and token forward, as many back to the layer's input; nothing for weights
    that are not trained. The head sees the answers' tokens alone; prefixes go through it never.
    """
    weight = policy.network.weight
    head, whole = weight.numel(), weights(policy)[0]
    body = whole - head
    passes = 6 if reference else 4
    return float(passes * (body * (answered + shared) + head * answered))


def random_scores(rolled: Rollout, device: str) -> Scored:
    """Advantages drawn at random: what they are worth does not change the work."""
    rows = len(rolled.group_R)
    generator = torch.Generator().manual_seed(0)
    advantage = torch.randn(rows, generator=generator).to(device)
    reward = torch.rand(rows, 2, generator=generator).to(device)
    return Scored(reward, advantage, advantage)


@dataclass
class Seen:
    """What a profile says of a piece of work."""

    took: Counter[str] = field(default_factory=Counter)  # µs by kernel; on a CPU by op
    kernels: int = 0  # that ran, of graphs too
    launches: int = 0  # by the host: a graph is one
    waits: int = 0  # of the host for the card


def profiled(here: Here, work: Callable[[], object]) -> Seen:
    on_card = here.device == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_card else [])
    with profile(activities=activities) as profiler:
        work()
        if on_card:
            torch.cuda.synchronize()  # a wait that is not the work's
    seen = Seen(waits=-1 if on_card else 0)
    for event in profiler.key_averages():
        seen.launches += event.count * bool(LAUNCH.match(event.key))
        seen.waits += event.count * bool(WAIT.match(event.key))
        if on_card == ("CUDA" in str(event.device_type)):
            time_us = event.self_device_time_total if on_card else event.self_cpu_time_total
            seen.took[event.key] += time_us
            seen.kernels += event.count
    return seen


def say(here: Here, seen: Seen, times: int, what: str) -> None:
    here.row(f"kernels a {what}", seen.kernels / times)
    here.row(f"launches by the host a {what}", seen.launches / times)
    here.row(f"waits of the host a {what}", seen.waits / times)
    total = sum(seen.took.values()) or 1
    for name, took in seen.took.most_common(KERNELS):
        here.row(f"share of {name[:60]}", took / total, "of 1")
