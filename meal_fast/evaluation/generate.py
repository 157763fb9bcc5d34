"""The answers of a sweep: every prompt, weight and sample of one model, in both modes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, Protocol

from meal_fast.config.config import Config
from meal_fast.data.preferences import Preference
from meal_fast.data_types import Prompt

if TYPE_CHECKING:
    from meal_fast.models.policy import Network, Policy
    from meal_fast.rollout import Capability

MODES = ("greedy", "sampled")
Progress = Callable[[str], None]


class Served(Protocol):
    """What makes a policy serve a preference where it is not told in words: a family of models, or
    the guides of PARM."""

    def groups(self, weights: Sequence[Preference]) -> list[list[int]]:
        """Group the places in `weights` that the same parameters serve."""

    def at(self, policy: Policy, w: Preference) -> AbstractContextManager[None]:
        """Make the policy what serves w, within it; afterwards it is what it was before."""


@dataclass
class Sweep:
    """The answers of one model in one mode: rows ordered by prompt, then weight, then sample."""

    rows: list[tuple[str, int, str]]  # P * W * S: text, length in tokens, how it ended
    prefill_tokens: int = 0
    tokens: int = 0  # sampled: an answer that several weights share is sampled once
    seconds: float = 0.0

    @property
    def texts(self) -> list[str]:
        return [text for text, _, _ in self.rows]

    def cost(self) -> dict[str, Any]:
        """Sum up what the answers took, and how long they are."""
        count = len(self.rows)
        return {
            "answers": count,
            "length": sum(length for _, length, _ in self.rows) / count,
            "stopped": sum(finish == "stop" for _, _, finish in self.rows) / count,
            "prefill_tokens": self.prefill_tokens,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / max(self.seconds, 1e-9),
        }


def answers(
    policy: Policy,
    network: Network | None,  # the reference, to ask the base model; None: the policy
    model: str,
    prompts: Sequence[Prompt],
    weights: Sequence[Preference],
    config: Config,
    say: Progress,
    family: Served | None = None,  # what the policy becomes for a weight
    modes: Sequence[str] = MODES,
) -> dict[str, Sweep]:
    """Sample the sweeps of one model, by mode: greedy answers, sampled ones, or both.

    One sampler answers all weights that the same parameters serve, in all modes: the engine then
    computes a prompt once. Without a family those are all weights. It is the run's
    `rollout.backend`, but where that cannot answer for a guide: then `say` is told.
    """
    from meal_fast.rollout import Request, Sampling, capable, open_backend

    guided: tuple[Capability, ...] = ("any-network",) if policy.adapter and network is None else ()
    backend = capable(config.rollout.backend, guided, say)
    groups = [list(range(len(weights)))] if family is None else family.groups(weights)
    samples = {mode: 1 if mode == "greedy" else config.evaluation.samples for mode in modes}
    asked = {
        "greedy": [_read_alike(policy, weights, group) for group in groups],
        "sampled": [[[place] for place in group] for group in groups],
    }
    sweeps, said, before = {}, {}, dict.fromkeys(MODES, 0)
    for mode, n in samples.items():
        sweeps[mode] = Sweep([("", 0, "")] * (len(prompts) * len(weights) * n))
        whole = len(prompts) * sum(map(len, asked[mode])) * n
        said[mode] = in_eighths(f"evaluation: {model}, {mode}", whole, say)
    for g, group in enumerate(groups):
        placed = nullcontext() if family is None else family.at(policy, weights[group[0]])
        with (
            placed,
            open_backend(
                backend,
                policy,
                network=network,
                max_cache_bytes=config.rollout.max_cache_bytes,
            ) as sampler,
        ):
            for mode, n in samples.items():
                together, sweep = asked[mode][g], sweeps[mode]
                requests = [
                    Request(p, weights[places[0]], n) for p in prompts for places in together
                ]
                sampling = Sampling(
                    max_new_tokens=config.rollout.max_new_tokens,
                    temperature=config.rollout.temperature if mode == "sampled" else 0.0,
                    seed=config.seed,
                    rng_key=("evaluation",),
                )
                out = sampler.generate(requests, sampling, partial(said[mode], before[mode]))
                before[mode] += len(out.texts)
                lengths = out.mask_RT.sum(1).tolist()
                rows = zip(out.texts, lengths, out.finish, strict=True)
                order = product(range(len(prompts)), together, range(n))
                for (p, places, s), row in zip(order, rows, strict=True):
                    for place in places:
                        sweep.rows[(p * len(weights) + place) * n + s] = row
                sweep.prefill_tokens += out.prefill_tokens
                sweep.tokens += sum(lengths)
                sweep.seconds += out.seconds
    return sweeps


def _read_alike(policy: Policy, weights: Sequence[Preference], group: list[int]) -> list[list[int]]:
    """The group's places, those together that the policy reads as the same tokens."""
    found: dict[tuple[int, ...], list[int]] = {}
    for place in group:
        found.setdefault(policy.encode_suffix(weights[place]), []).append(place)
    return list(found.values())


def in_eighths(what: str, whole: int, say: Progress) -> Callable[[int, int], None]:
    """Say how far the answers are, eight times: told of `n` ended, and of those before them."""
    due = [1]

    def ended(before: int, n: int) -> None:
        done = before + n
        if done * 8 >= due[0] * whole:
            say(f"{what}: {done} of {whole} answers")
            due[0] = done * 8 // whole + 1

    return ended
