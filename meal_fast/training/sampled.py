"""Responses as a run samples them: its backend, its length and temperature, its seed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from meal_fast.config.config import Config
from meal_fast.data_types import Rollout
from meal_fast.models.policy import Network, Policy
from meal_fast.rollout import Request, Sampling, open_backend

from .batch import RngKey
from .losses.sequences import token_logp_RT


def sampled(
    policy: Policy,
    requests: Sequence[Request],
    config: Config,
    rng_key: RngKey,
    network: Network | None = None,
    *,
    learnt: bool = False,  # whether a loss reads log-probabilities of them
) -> Rollout:
    """Draw the policy's responses, or another network's.

    Where another program samples, and they are learnt from, `logp_RT` are the policy's own, and
    what the sampler said is kept beside them.
    """
    options, started = config.rollout, time.perf_counter()
    sampling = Sampling(options.max_new_tokens, options.temperature, config.seed, rng_key)
    with open_backend(
        options.backend,
        policy,
        network=network,
        max_cache_bytes=options.max_cache_bytes,
        join=True,
        adapters=config.meta.tasks if config.meta.parallel else 1,
    ) as sampler:
        rolled = sampler.generate(requests, sampling)
    if not (learnt and sampler.foreign):
        return rolled
    # By the model code that the loss goes through.
    logp_RT = token_logp_RT(
        policy.network, rolled, config.rollout.temperature, micro_tokens=config.grpo.micro_tokens
    )
    own = replace(
        rolled,
        logp_RT=logp_RT,
        behaviour_logp_RT=rolled.logp_RT,
        seconds=time.perf_counter() - started,  # pushing weights, and this, included
    )
    return own.told(rolled.groups, rolled.lengths)
