"""Many callers, one engine: rows join and leave between steps, each with its own sampling."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from .engine import Engine
from .memory import rounded, shares
from .sequence import Delta, Request, Row, Sampling, TextStream


class Service:
    """Continuous batching. All methods belong to one thread.

        service = Service(engine)
        rows = service.add([Request(prompt, w)], Sampling(64, 0.7, seed=1))
        while service.busy:
            for delta in service.step():
                print(delta.row.index, delta.text, delta.finish)

    A row's text depends on its request and its sampling alone, up to the rounding of the model: it
    is what `Engine.generate` gives for them. Rows start in the order in which they were added. Keys
    and values of prompts are kept for later requests while there is room.

    Memory is made at once, for prompts and answers of the lengths given. For a longer row it is
    made anew when the rows before it have ended; those behind it wait.

    Args:
        engine: that nothing else draws from meanwhile.
        prompt_tokens, suffix_tokens, new_tokens: what most requests keep within.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        prompt_tokens: int = 256,
        suffix_tokens: int = 48,
        new_tokens: int = 256,
    ) -> None:
        self.engine = engine
        self._queue: deque[Row] = deque()  # before the scheduler's
        self._texts: dict[Row, TextStream] = {}
        slots = engine.scheduler.max_rows
        self._places = (slots, slots, 2 * slots)
        engine.scheduler.start([], 0)
        try:
            engine.memory.reserve(
                self._places, (suffix_tokens + new_tokens, prompt_tokens, suffix_tokens)
            )
        except ValueError:  # a small budget: memory for what comes, then
            engine.memory.release()

    @property
    def busy(self) -> bool:
        """Whether any row waits or grows."""
        return bool(self._queue) or self.engine.scheduler.busy

    @property
    def waiting(self) -> int:
        """Count the rows that have no slot yet."""
        return sum(not row.finish for row in (*self._queue, *self.engine.waiting))

    def add(self, requests: Sequence[Request], sampling: Sampling) -> list[Row]:
        """Let the rows of these requests wait, and give them: handles, and what `step` speaks of.

        Raises ValueError as `Engine.generate` does, and for a row too long for the whole budget.
        """
        rows = self.engine.rows(requests, sampling.max_new_tokens)
        for row in rows:
            row.sampling = sampling
        token = self.engine.shape.token_bytes
        for longest in {_longest(row) for row in rows}:
            each = tuple(rounded(n) * token for n in longest)
            shares(self.engine.memory.max_bytes, wanted=(1, 1, 1), each=each)
        self._queue.extend(rows)
        self._texts |= {row: TextStream(self.engine.policy) for row in rows}
        return rows

    @torch.no_grad()
    def step(self) -> list[Delta]:
        """Draw one token of each row that has a slot: what that adds, ends included.

        If it raises, every row is forgotten and the service can be used again.
        """
        scheduler = self.engine.scheduler
        try:
            scheduler.release()  # the slots of rows cancelled since the last step
            self._admit()
            if not scheduler.busy:
                return []
            self.engine.runner.step(scheduler, None)
            deltas = [Delta(row, self._texts[row].more(row), row.finish) for row in scheduler.live]
            scheduler.release()
        except BaseException:
            self._queue.clear()
            self._texts.clear()
            scheduler.start([], 0)
            raise
        for delta in deltas:
            if delta.finish:
                del self._texts[delta.row]
        return deltas

    def cancel(self, row: Row) -> None:
        """Stop a row: its slot is free at the next step. One that has ended stays as it is."""
        if not row.finish:
            row.finish = "cancelled"
            self._texts.pop(row, None)

    def _admit(self) -> None:
        """Hand rows to the scheduler as long as there is memory for such, in their order."""
        scheduler, memory = self.engine.scheduler, self.engine.memory
        while self._queue:
            row = self._queue[0]
            if not row.finish:
                longest = _longest(row)
                rooms = (memory.tails.room, memory.prompts.room, memory.suffixes.room)
                if any(n > room for n, room in zip(longest, rooms, strict=True)):
                    if scheduler.live or any(not r.finish for r in scheduler.waiting):
                        return
                    memory.reserve(self._places, longest)
                scheduler.add([row])
            self._queue.popleft()


def _longest(row: Row) -> tuple[int, int, int]:
    """Tokens of its tail, its prompt and its suffix."""
    assert row.sampling is not None
    suffix = len(row.suffix)
    return suffix + row.sampling.max_new_tokens, len(row.prompt), suffix
