"""What samplers share that take every row by itself, and can do nothing that only some can."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch

from meal_fast.data_types import Rollout
from meal_fast.models.policy import Policy

from ..protocol import Capability, check_capable
from ..sequence import (
    Drawn,
    Request,
    Sampling,
    Tokens,
    check_logp,
    encode,
    gathered,
    row_id,
    told_apart,
)


class Plain(ABC):
    """A backend that is given prefixes and the rows' ids, and gives back what was drawn."""

    name: ClassVar[str]
    foreign: ClassVar[bool] = False
    capabilities: ClassVar[frozenset[Capability]] = frozenset()

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    @abstractmethod
    def drawn(
        self,
        prefixes: Sequence[Tokens],  # of each row
        row_ids: Sequence[int],
        tasks: Sequence[int],  # whose adapter each goes through; all 0 without that capability
        sampling: Sampling,
        ended: Callable[[int], None],
    ) -> tuple[list[Drawn], int]:
        """Draw every row; give them in order, and how many tokens of prefixes were there before."""

    def forget(self) -> None:  # noqa: B027  (not abstract: most have nothing to forget)
        """Do nothing: nothing of a request is kept."""

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        ended: Callable[[int], None] | None = None,
    ) -> Rollout:
        """Sample every request: see `Backend.generate`."""
        started, policy = time.perf_counter(), self.policy
        if any(q.task_id for q in requests):
            check_capable(self, "adapters")
        parts = encode(policy, requests, sampling.max_new_tokens)
        rows = [(b, s) for b, q in enumerate(requests) for s in range(q.samples)]
        prefixes = [parts[b][0] + parts[b][1] for b, _ in rows]
        tasks = [requests[b].task_id for b, _ in rows]
        apart = told_apart(requests)
        ids = [row_id(sampling.rng_key, apart[b], s) for b, s in rows]
        drawn, reused = self.drawn(prefixes, ids, tasks, sampling, ended or (lambda count: None))
        for (b, _), row in zip(rows, drawn, strict=True):
            check_logp(requests[b], sum(row.logp))
        return gathered(
            policy,
            requests,
            drawn,
            started=started,
            prefill_tokens=sum(map(len, prefixes)) - reused,
            reused_tokens=reused,
            on_policy=sampling.on_policy,
        )

    def ended_at(self, tokens: list[int], logp: list[float], sampling: Sampling) -> Drawn:
        """Keep what was drawn up to the first stop token or string: the rest is padding."""
        stop = self.policy.stop_ids
        for t, token in enumerate(tokens):
            if token in stop or sampling.said_stop(self.policy, tokens[: t + 1]):
                return Drawn(tokens[: t + 1], logp[: t + 1], "stop")
        return Drawn(tokens, logp[: len(tokens)], "length")
