"""The sampler: slots that stay full, every prefix computed once, rows that can be cut and resumed.

A row is one response. It waits for a slot, starts behind its prompt and preference suffix (which
are computed if no earlier row needed them), and gets one token a step until it ends; its slot then
goes to the next row that waits. A token's randomness is keyed by (seed, row id, position), so a
row's text depends neither on the slot nor on the rows beside it, up to the rounding of the model.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import ClassVar

import torch

from meal_fast.data_types import Rollout
from meal_fast.models.network import Network
from meal_fast.models.policy import Policy
from meal_fast.models.sizes import ON_A_CPU

from .kv_cache import Shape
from .memory import Memory, default_budget, memory_of
from .model_runner import ModelRunner
from .protocol import Capability
from .scheduler import Scheduler
from .sequence import (
    Counts,
    Delta,
    Drawn,
    Request,
    Row,
    Sampling,
    TextStream,
    encode,
    gathered,
    told_apart,
)


class Engine:
    """Samples from one network whose weights stay as they are: see `engine`."""

    name: ClassVar[str] = "engine"
    foreign: ClassVar[bool] = False
    capabilities: ClassVar[frozenset[Capability]] = frozenset(
        ("adapters", "any-network", "rejection")
    )

    def __init__(
        self,
        policy: Policy,
        network: Network,
        max_rows: int = ON_A_CPU.slots,
        max_cache_bytes: int = 0,
        join: bool = False,
        memory: Memory | None = None,  # default: of its own
        pass_tokens: int = ON_A_CPU.pass_tokens,  # padded, of a pass over prompts or suffixes
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows}: must be at least 1")
        if max_cache_bytes < 0:
            raise ValueError(f"max_cache_bytes={max_cache_bytes}: 0 (automatic) or positive")
        self.policy, self.network, self.join = policy, network, join
        self.shape = Shape.of(network)
        if memory is None:
            memory = Memory(self.shape, max_cache_bytes or default_budget(self.shape.device))
        self.memory = memory
        self.scheduler = Scheduler(memory, max_rows)
        self.runner = ModelRunner(policy, network, memory, max_rows, pass_tokens)

    @property
    def counts(self) -> Counts:
        """Tokens through the model so far."""
        return self.runner.counts

    @property
    def live(self) -> list[Row]:
        """The row in each slot."""
        return self.scheduler.live

    @property
    def waiting(self) -> deque[Row]:
        """Rows that wait for a slot."""
        return self.scheduler.waiting

    def forget(self) -> None:
        """Forget every prefix. Memory is given back, unless it is kept with the policy."""
        self.memory.forget()

    def rows(self, requests: Sequence[Request], max_new_tokens: int) -> list[Row]:
        """Give the rows of the requests, in their order.

        Raises ValueError for no request, one of no samples, and a prompt that is empty or too long.
        """
        requests = told_apart(requests)
        parts = encode(self.policy, requests, max_new_tokens)
        whole = [(q.task_id, *part) for q, part in zip(requests, parts, strict=True)]
        preferences = Counter((a, prompt) for a, prompt, _ in dict.fromkeys(whole))
        rows = []
        for index, (request, (prompt, suffix)) in enumerate(zip(requests, parts, strict=True)):
            if self.join and preferences[request.task_id, prompt] == 1:
                prompt, suffix = prompt + suffix, ()
            rows += [Row(request, index, s, prompt, suffix) for s in range(request.samples)]
        return rows

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        ended: Callable[[int], None] | None = None,
    ) -> Rollout:
        """Sample every request: see `Backend.generate`."""
        started, before = time.perf_counter(), replace(self.counts)
        rows = self.rows(requests, sampling.max_new_tokens)
        done = 0
        for finished in self.draw(rows, sampling):
            done += len(finished)
            if ended and finished:
                ended(done)
        used = self.counts
        return gathered(
            self.policy,
            requests,
            [Drawn(row.tokens, row.logp, row.finish) for row in rows],
            started=started,
            prefill_tokens=used.prompt + used.suffix - before.prompt - before.suffix,
            reused_tokens=used.reused - before.reused,
            on_policy=sampling.on_policy,
        )

    sample = generate  # the name that it had

    def stream(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Delta]:
        """Sample every request, and yield what each step adds to each row.

        A row's texts together are what `generate` gives for it. Whoever stops asking cancels what
        is left. Raises ValueError as `generate` does, at once. For many callers: `Service`.
        """
        rows = self.rows(requests, sampling.max_new_tokens)
        texts = {id(row): TextStream(self.policy) for row in rows}

        def deltas() -> Iterator[Delta]:
            for _ in self.draw(rows, sampling):
                for row in self.live:
                    yield Delta(row, texts[id(row)].more(row), row.finish)

        return deltas()

    @torch.no_grad()
    def draw(self, rows: Iterable[Row], sampling: Sampling) -> Iterator[list[Row]]:
        """Draw one step after the other: yield the rows that ended in it, often none.

        Until the next step is asked for, the caller may `cut` any row in `live` (one that has just
        ended goes on), `cancel` any that has not ended, and `add` rows.
        """
        self.scheduler.start(rows, sampling.max_new_tokens)
        while self.scheduler.busy:
            self.runner.step(self.scheduler, sampling)
            yield [row for row in self.live if row.finish]
            self.scheduler.release()

    def add(self, rows: Iterable[Row]) -> None:
        """Let more rows wait, in a drawing that goes on: see `Scheduler.add`."""
        self.scheduler.add(rows)

    def cut(self, row: Row, keep: int) -> None:
        """Cut a live row back to its first `keep` tokens: see `Scheduler.cut`."""
        self.scheduler.cut(row, keep)

    def cancel(self, row: Row) -> None:
        """Stop a row that waits or grows: see `Scheduler.cancel`."""
        self.scheduler.cancel(row)


@contextmanager
def engine(
    policy: Policy,
    *,
    network: Network | None = None,
    max_rows: int = 0,
    max_cache_bytes: int = 0,
    join: bool = False,
    adapters: int = 1,  # no effect: of tasks there may be any number
) -> Iterator[Engine]:
    """Open an `Engine` on the policy as it is now, or on `network`: its reference, or any other.

    The policy's weights must not change while it is open: what is computed once is used to its end.
    `max_rows`: slots; 0: as suits the device. `max_cache_bytes`: of keys and values, in all; 0:
    2 GiB on a CPU, half of the free memory on a GPU. What does not fit is computed again when it is
    needed. `join`: a prompt with one preference in a call is computed as one with it: a pass less,
    but a later call with another preference computes the prompt again.

    Where the policy samples from a copy of its weights (on a GPU), memory and graphs are the
    policy's, and the next engine takes them up; one is open at a time.

    Raises ValueError, when rows are drawn, for a budget that holds no row.
    """
    with policy.merged() if network is None else nullcontext(network) as sampled:
        memory = memory_of(policy, sampled, max_cache_bytes)
        slots = max_rows or policy.sizes.slots
        passes = policy.sizes.pass_tokens
        yield Engine(policy, sampled, slots, max_cache_bytes, join, memory, passes)
