"""The values that flow through a step, and the letters their shapes are written in.

    B  prompts in a batch          T  tokens of a row, padded       K  objectives
    G  samples per prompt          P  tokens of a prefix, padded    D  hidden width
    R  rows = B * G                N  packed tokens (no padding)    V  vocabulary

A suffix on a name gives its shape where it could be any of several: `reward_RK`, `mask_RT`.
Every stage makes a new frozen value; nothing is overwritten:

    Prompt -> Rollout -> Scored -> (the learner packs, and returns a loss)
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One prompt of a prompt set."""

    id: str  # stable: a hash of the text
    text: str  # stripped; what the reward models see


@dataclass(frozen=True)
class Rollout:
    """R sampled responses. Row r answers prompt `group_R[r]` under the preference `w_RK[r]`.

    `prefix[b]` are the tokens that all rows of group b share: prompt, preference, assistant header.
    """

    prompts: tuple[Prompt, ...]  # B, one per group
    prefix: tuple[tuple[int, ...], ...]  # B, token ids
    group_R: Tensor  # int64, non-decreasing, into prompts and prefix
    w_RK: Tensor  # float32, on the simplex
    tokens_RT: Tensor  # int64, the sampled tokens (an end-of-turn token included), padded
    mask_RT: Tensor  # bool, true on sampled tokens
    logp_RT: Tensor  # float32, of the sampler, at its temperature; 0 where masked
    finish: tuple[str, ...]  # R, "stop" or "length"
    texts: tuple[str, ...]  # R, decoded, special tokens left out
    on_policy: bool  # each row is one draw, untruncated: logp_RT is the behaviour policy's
    prefill_tokens: int  # of prompts and preferences, that went through the model
    reused_tokens: int  # of the rows' prefixes, that did not have to
    seconds: float
    adapter: tuple[int, ...] = ()  # B, the task whose adapter answered; empty: there is one adapter

    @property
    def tasks(self) -> tuple[slice, ...]:
        """The rows of each task, in order."""
        if not self.adapter:
            return (slice(0, len(self.group_R)),)
        task_R = [self.adapter[g] for g in self.group_R.tolist()]
        starts = [r for r, t in enumerate(task_R) if r == 0 or t != task_R[r - 1]]
        return tuple(slice(*ends) for ends in pairwise([*starts, len(task_R)]))

    def of_task(self, rows: slice) -> Rollout:
        """One of `tasks`, as a rollout of its own: no wider than its longest row."""
        if not self.adapter:
            return self
        groups = self.group_R[rows]
        first, last = int(groups[0]), int(groups[-1])
        prefix = self.prefix[first : last + 1]
        fresh = sum(map(len, set(prefix)))
        wide_RT = self.mask_RT[rows]
        width = int(wide_RT.sum(1).max())
        return replace(
            self,
            prompts=self.prompts[first : last + 1],
            prefix=prefix,
            group_R=groups - first,
            w_RK=self.w_RK[rows],
            tokens_RT=self.tokens_RT[rows, :width],
            mask_RT=wide_RT[:, :width],
            logp_RT=self.logp_RT[rows, :width],
            finish=self.finish[rows],
            texts=self.texts[rows],
            prefill_tokens=fresh,
            reused_tokens=sum(len(self.prefix[g]) for g in groups.tolist()) - fresh,
            seconds=self.seconds / len(self.tasks),
            adapter=(),
        )

    def of_rows(self, rows: Tensor) -> Rollout:
        """Some rows (their numbers, int64), the groups left as they are."""
        at = rows.to(self.group_R.device)
        return replace(
            self,
            group_R=self.group_R[at],
            w_RK=self.w_RK[at],
            tokens_RT=self.tokens_RT[at],
            mask_RT=self.mask_RT[at],
            logp_RT=self.logp_RT[at],
            finish=tuple(self.finish[i] for i in at.tolist()),
            texts=tuple(self.texts[i] for i in at.tolist()),
        )


@dataclass(frozen=True)
class Scored:
    """Rewards of a rollout and what the learner needs of them."""

    reward_RK: Tensor  # float32, raw
    normalized_RK: Tensor  # float32
    score_R: Tensor  # float32, higher is better
    advantage_R: Tensor  # float32


def key(*parts: int | str) -> int:
    """A 63-bit key of anything: the same everywhere, whatever the rank, slot or batch size.

    All randomness of a run hangs on such keys: a sampled row's id is the key of (step, task, inner
    step, prompt, sample, attempt); there is no global generator.
    """
    text = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
