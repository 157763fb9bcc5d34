"""The values that flow through a step, and the letters their shapes are written in.

    B  prompts in a batch          T  tokens of a row, padded       K  objectives
    G  samples per prompt          P  tokens of a prefix, padded    D  hidden width
    R  rows = B * G                N  packed tokens (no padding)    V  vocabulary

A suffix on a name gives its shape where it could be any of several: `reward_RK`, `mask_RT`.
Every stage makes a new frozen value; nothing is overwritten:

    Prompt -> Rollout -> Scored (GRPO, DPO) or Weighted (SFT) -> (the learner packs: a loss)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One prompt of a prompt set."""

    id: str  # stable: a hash of the text
    text: str  # stripped; what the reward models see


@dataclass(frozen=True)
class Rollout:
    """R sampled responses. Row r answers prompt `group_R[r]` under `condition_RK[r]`.

    `prefix[b]` are the tokens that all rows of group b share: prompt, preference, assistant header.
    """

    prompts: tuple[Prompt, ...]  # B, one per group
    prefix: tuple[tuple[int, ...], ...]  # B, token ids
    group_R: Tensor  # int64, non-decreasing, into prompts and prefix
    condition_RK: Tensor  # float32, what a row is asked for: w, on the simplex; RiC: K rewards
    tokens_RT: Tensor  # int64, the sampled tokens (an end-of-turn token included), padded
    mask_RT: Tensor  # bool, true on sampled tokens
    logp_RT: Tensor  # float32, of the sampler, at its temperature; 0 where masked
    finish: tuple[str, ...]  # R, "stop" or "length"
    texts: tuple[str, ...]  # R, decoded, special tokens left out
    on_policy: bool  # each row is one draw, untruncated: logp_RT is the behaviour policy's
    prefill_tokens: int  # of prompts and preferences, that went through the model
    reused_tokens: int  # of the rows' prefixes, that did not have to
    seconds: float
    task_id: tuple[int, ...] = ()  # B, the task whose adapter answered; empty: there is one adapter
    # float32, where another program sampled: its log-probabilities; logp_RT are the learner's own.
    behaviour_logp_RT: Tensor | None = None

    @cached_property
    def groups(self) -> tuple[int, ...]:
        """`group_R` on the host."""
        return tuple(self.group_R.tolist())

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens each row has, on the host."""
        return tuple(self.mask_RT.sum(1).tolist())

    def told(self, groups: Sequence[int], lengths: Sequence[int]) -> Rollout:
        """Itself, after its maker has said what it knows: nothing is then read from a device."""
        self.__dict__.update(groups=tuple(groups), lengths=tuple(lengths))
        return self

    @property
    def tasks(self) -> tuple[slice, ...]:
        """The rows of each task, in order."""
        if not self.task_id:
            return (slice(0, len(self.groups)),)
        task_R = [self.task_id[g] for g in self.groups]
        starts = [r for r, t in enumerate(task_R) if r == 0 or t != task_R[r - 1]]
        return tuple(slice(*ends) for ends in pairwise([*starts, len(task_R)]))

    def of_task(self, rows: slice) -> Rollout:
        """One of `tasks`, as a rollout of its own: no wider than its longest row."""
        if not self.task_id:
            return self
        groups, lengths = self.groups[rows], self.lengths[rows]
        first, last = groups[0], groups[-1]
        prefix = self.prefix[first : last + 1]
        fresh = sum(map(len, set(prefix)))
        width, behaviour = max(lengths), self.behaviour_logp_RT
        rollout = replace(
            self,
            prompts=self.prompts[first : last + 1],
            prefix=prefix,
            group_R=self.group_R[rows] - first,
            condition_RK=self.condition_RK[rows],
            tokens_RT=self.tokens_RT[rows, :width],
            mask_RT=self.mask_RT[rows, :width],
            logp_RT=self.logp_RT[rows, :width],
            behaviour_logp_RT=None if behaviour is None else behaviour[rows, :width],
            finish=self.finish[rows],
            texts=self.texts[rows],
            prefill_tokens=fresh,
            reused_tokens=sum(len(self.prefix[g]) for g in groups) - fresh,
            seconds=self.seconds / len(self.tasks),
            task_id=(),
        )
        return rollout.told([g - first for g in groups], lengths)

    def of_rows(self, rows: Tensor, numbers: Sequence[int] | None = None) -> Rollout:
        """Some rows (their numbers, int64), the groups left as they are.

        numbers: the same on the host, where they are known there.
        """
        behaviour = self.behaviour_logp_RT
        at, numbers = rows.to(self.group_R.device), rows.tolist() if numbers is None else numbers
        rollout = replace(
            self,
            group_R=self.group_R[at],
            condition_RK=self.condition_RK[at],
            tokens_RT=self.tokens_RT[at],
            mask_RT=self.mask_RT[at],
            logp_RT=self.logp_RT[at],
            behaviour_logp_RT=None if behaviour is None else behaviour[at],
            finish=tuple(self.finish[i] for i in numbers),
            texts=tuple(self.texts[i] for i in numbers),
        )
        return rollout.told([self.groups[i] for i in numbers], [self.lengths[i] for i in numbers])


@dataclass(frozen=True)
class _OfRows:
    """Values of the R rows of a rollout, all where the rollout is."""

    reward_RK: Tensor  # float32, raw; NaN: the objective does not apply to the row
    score_R: Tensor  # float32, higher is better

    def of_rows(self, rows: Tensor | slice) -> Self:
        """Give the values of some rows."""
        return type(self)(*(getattr(self, f.name)[rows] for f in fields(self)))


@dataclass(frozen=True)
class Scored(_OfRows):
    """Rewards of a rollout, and how much better each row is than its group."""

    advantage_R: Tensor  # float32


@dataclass(frozen=True)
class Weighted(_OfRows):
    """Rewards of responses that are imitated, and how much each counts in the loss."""

    loss_weight_R: Tensor  # float32, 1 on average


def rng_seed(*parts: int | str) -> int:
    """A 63-bit key of anything: the same everywhere, whatever the rank, slot or batch size.

    All randomness of a run hangs on such keys: a sampled row's id is the key of (step, task, inner
    step, prompt, sample, attempt); there is no global generator.
    """
    text = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
