"""Responses as a run samples them: its backend, its length and temperature, its seed."""

from __future__ import annotations

from collections.abc import Sequence

from meal_fast.config.config import Config
from meal_fast.data_types import Rollout
from meal_fast.models.policy import Network, Policy
from meal_fast.rollout import Request, Sampling, open_backend

from .batch import RngKey


def sampled(
    policy: Policy,
    requests: Sequence[Request],
    config: Config,
    rng_key: RngKey,
    network: Network | None = None,
) -> Rollout:
    """Draw the policy's responses, or another network's."""
    options = config.rollout
    sampling = Sampling(options.max_new_tokens, options.temperature, config.seed, rng_key)
    with open_backend(
        options.backend,
        policy,
        network=network,
        max_cache_bytes=options.max_cache_bytes,
        join=True,
    ) as sampler:
        return sampler.generate(requests, sampling)
