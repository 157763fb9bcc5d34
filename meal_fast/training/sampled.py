"""Responses as a run samples them: its backend, its length and temperature, its seed."""

from __future__ import annotations

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
    options = config.rollout
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
    return _own(policy, rolled, config) if learnt and sampler.foreign else rolled


def _own(policy: Policy, rolled: Rollout, config: Config) -> Rollout:
    """Compute log-probabilities again, by the model code that the loss goes through."""
    logp_RT = token_logp_RT(
        policy.network, rolled, config.rollout.temperature, micro_tokens=config.grpo.micro_tokens
    )
    own = replace(rolled, logp_RT=logp_RT, behaviour_logp_RT=rolled.logp_RT)
    return own.told(rolled.groups, rolled.lengths)
