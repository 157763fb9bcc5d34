"""One thread that owns the engine: requests of many clients in, pieces of their answers out."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from meal_fast.data.preferences import Preference
from meal_fast.rollout import Request, Row, Sampling, Service, engine

from .run import ServedRun, Way


class QueueFull(Exception):
    """More is waiting than the server lets wait."""


@dataclass(frozen=True)
class Piece:
    """What there is to tell of one choice; the first says at which w it is answered."""

    choice: int
    text: str = ""
    finish: str = ""  # "stop" or "length" with its last
    tokens: int = 0  # sampled so far
    prompt_tokens: int = 0  # of the first piece
    w: Preference | None = None  # of the first piece
    error: str = ""  # it cannot be answered, and why
    fault: bool = False  # and that is not the client's


@dataclass(eq=False)
class Asked:
    """Samples of one prompt at one preference: what the thread takes up at a time.

    `tell` is called from the thread. `choice`: the number of the first sample among the choices.
    """

    request: Request
    sampling: Sampling
    base: bool
    auto: bool
    choice: int
    tell: Callable[[Piece], None]
    cancelled: bool = False
    left: int = 0  # rows that have not ended


class Worker:
    """Runs a `Service` in a thread, on whatever network the next request needs.

    Rows that the same network answers share its slots. Where the next in line needs another one
    (the base model; a w with parameters of its own; the net, which reads the base model), it waits
    until the rows before it have ended.

    Args:
        slots: rows that are decoded at a time. waiting: rows that may wait besides.
    """

    def __init__(
        self, served: ServedRun, *, slots: int, waiting: int, max_cache_bytes: int = 0
    ) -> None:
        self.served, self.slots, self.most = served, slots, slots + waiting
        self._cache_bytes = max_cache_bytes
        self._line: deque[Asked] = deque()
        self._rows: dict[Row, Asked] = {}
        self._outstanding = 0
        self._change = threading.Condition()
        self._closing = False
        self._open: Way | None = None
        self._service: Service | None = None
        self._held = ExitStack()
        self._thread = threading.Thread(target=self._run, name="meal-fast-engine", daemon=True)
        self._thread.start()

    @property
    def outstanding(self) -> int:
        """Count the rows that wait or grow."""
        return self._outstanding

    def submit(self, asked: Sequence[Asked]) -> None:
        """Put requests in line, all or none. Raises QueueFull."""
        rows = sum(a.request.samples for a in asked)
        with self._change:
            if self._closing or self._outstanding + rows > self.most:
                raise QueueFull(f"{self._outstanding} answers are waiting or being written")
            for a in asked:
                a.left = a.request.samples
            self._outstanding += rows
            self._line.extend(asked)
            self._change.notify()

    def cancel(self, asked: Sequence[Asked]) -> None:
        """Stop what is left of these requests; what has ended stays as it is."""
        with self._change:
            for a in asked:
                a.cancelled = True
            self._change.notify()

    def close(self) -> None:
        """Stop all and end the thread."""
        with self._change:
            self._closing = True
            self._change.notify()
        self._thread.join()

    @torch.no_grad()
    def _run(self) -> None:
        try:
            while True:
                with self._change:
                    while not (self._closing or self._line or self._rows):
                        self._change.wait()
                    if self._closing:
                        return
                self._drop_cancelled()
                self._take()
                if self._rows:
                    self._step()
        finally:
            self._held.close()

    def _drop_cancelled(self) -> None:
        with self._change:
            gone = [asked for asked in self._line if asked.cancelled]
            for asked in gone:
                self._line.remove(asked)
        for asked in gone:
            self._ended(asked, asked.left)
        for row, asked in list(self._rows.items()):
            if asked.cancelled:
                assert self._service is not None
                self._service.cancel(row)
                del self._rows[row]
                self._ended(asked, 1)

    def _take(self) -> None:
        """Let those in line join, up to the first that needs another network before its turn."""
        while True:
            with self._change:
                if not self._line:
                    return
                asked = self._line[0]
            try:
                if not self._joined(asked):
                    return
            except ValueError as error:
                self._failed(asked, str(error), fault=False)
            except Exception as error:
                logging.getLogger("meal_fast").exception("a request failed")
                self._failed(asked, f"{type(error).__name__}: {error}", fault=True)
            with self._change:
                self._line.popleft()

    def _joined(self, asked: Asked) -> bool:
        """Add its rows; False while the network that is open still has others."""
        if asked.auto:
            if self._rows:
                return False
            self._close_network()
            w = self.served.predicted(asked.request.prompt)
            asked.request, asked.auto = replace(asked.request, w=w), False
        way = self.served.way(asked.base, asked.request.w)
        if way != self._open:
            if self._rows:
                return False
            self._close_network()
            network = self._held.enter_context(self.served.network(way))
            sampler = engine(
                self.served.policy,
                network=network,
                max_rows=self.slots,
                max_cache_bytes=self._cache_bytes,
            )
            self._service, self._open = Service(self._held.enter_context(sampler)), way
        assert self._service is not None
        rows = self._service.add([asked.request], asked.sampling)
        for n, row in enumerate(rows):
            self._rows[row] = asked
            length = len(row.prompt) + len(row.suffix)
            asked.tell(Piece(asked.choice + n, prompt_tokens=length, w=asked.request.w))
        return True

    def _close_network(self) -> None:
        self._service = self._open = None
        self._held.close()

    def _step(self) -> None:
        assert self._service is not None
        try:
            deltas = self._service.step()
        except Exception as error:
            logging.getLogger("meal_fast").exception("a step of the engine failed")
            for asked in set(self._rows.values()):
                self._failed(asked, f"{type(error).__name__}: {error}", fault=True)
            self._rows.clear()
            self._close_network()
            return
        for delta in deltas:
            asked = self._rows[delta.row]
            choice, tokens = asked.choice + delta.row.sample, len(delta.row.tokens)
            asked.tell(Piece(choice, delta.text, delta.finish, tokens))
            if delta.finish:
                del self._rows[delta.row]
                self._ended(asked, 1)

    def _failed(self, asked: Asked, error: str, *, fault: bool) -> None:
        asked.tell(Piece(asked.choice, error=error, fault=fault))
        self._ended(asked, asked.left)

    def _ended(self, asked: Asked, rows: int) -> None:
        with self._change:
            asked.left -= rows
            self._outstanding -= rows
