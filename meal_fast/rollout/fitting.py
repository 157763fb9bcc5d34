"""Which prompts leave room in the model's context for the preference and the answer behind them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from meal_fast.config.config import Config
from meal_fast.data.preferences import Preference, evaluation_weights, lattice
from meal_fast.data_types import Prompt
from meal_fast.models.policy import Policy

Say = Callable[[str], None]


def longest_suffix(policy: Policy, config: Config) -> int:
    """Count the most tokens that a run's preferences take, with the assistant's header."""
    k, points = len(config.names), config.preference.grid or (101 if len(config.names) == 2 else 0)
    asked: list[Preference | None] = [None, *evaluation_weights(k, config.evaluation.grid)]
    slack = 0
    if policy.style == "scores":  # rewards, in standard deviations, to one decimal
        asked += [(x,) * k for x in (-88.8, -8.8, 8.8)]
    if points and math.comb(points + k - 2, k - 1) <= 500:
        asked += lattice(k, points)  # with K = 2 and no grid all that have other digits
    else:
        asked += lattice(k, 11)
        slack = k  # other digits may be a token more, each
    return max(len(policy.encode_suffix(w)) for w in asked) + slack


def context_room(policy: Policy, config: Config) -> int:
    """Count the tokens that a prompt may have beside the longest preference and an answer.

    Raises ValueError where there are none.
    """
    length = config.rollout.max_new_tokens
    room = policy.context - longest_suffix(policy, config) - length
    if room < 1:
        raise ValueError(
            f"rollout.max_new_tokens={length}: with the preference's tokens it leaves no room for "
            f"a prompt in the model's context of {policy.context}; lower it"
        )
    return room


def fitting(
    policy: Policy,
    prompts: Sequence[Prompt],
    config: Config,
    option: str,
    say: Say,
    *,
    at_least: int = 1,
) -> tuple[Prompt, ...]:
    """Choose the prompts of at most `prompts.max_tokens` tokens that the model's context has room
    for; those that it has none for are counted to `say`.

    option: where they come from, for messages. Raises ValueError for fewer than `at_least`.
    """
    limit, room = config.prompts.max_tokens, context_room(policy, config)
    lengths = [len(policy.encode_prompt(p.text)) for p in prompts]
    kept = tuple(p for p, n in zip(prompts, lengths, strict=True) if n <= min(limit, room))
    beyond = sum(room < n <= limit for n in lengths)
    if beyond:
        say(
            f"{option}: {beyond} of {len(prompts)} prompts are left out: with a preference and "
            f"{config.rollout.max_new_tokens} new tokens they exceed the model's context of "
            f"{policy.context}"
        )
    if len(kept) < at_least:
        least = f"rollout.prompts={at_least}" if at_least > 1 else "one is needed"
        raise ValueError(
            f"{option}: {len(kept)} of {len(prompts)} prompts have at most {min(limit, room)} "
            f"tokens, but {least}; give more, or shorter, prompts"
            + ("" if room < limit else ", or raise prompts.max_tokens")
        )
    return kept
