"""Scores of finished rows while others are still being decoded, in an order that timing cannot
change.

Rows are cut into chunks of a fixed number in the order they are submitted, and one thread scores
the chunks one after the other: what a chunk holds, and so the padding and the rounding of its
scores, is the same in every run. The thread is worth having because the reward models leave the
interpreter's lock while they compute.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from meal_fast.data.objective_calls import Late, ObjectiveError

Row = tuple[Hashable, str, str]  # key, prompt, response


class OrderedScorer:
    """A reward function at work in one background thread.

        with OrderedScorer(objectives.rewards) as scorer:
            for key, prompt, response in finished:
                scorer.submit(key, prompt, response)
            keys, reward_RK = scorer.results()

    Args:
        score: (prompt texts, response texts) → (R, K) numbers. It is called from the thread alone.
        chunk: rows of a call.
        waiting: chunks that may be submitted and not yet scored; `submit` waits for the oldest
            beyond that, so that decoding cannot run away from scoring.

    A call that fails (`score` raises, gives another number of rows, or one that is not finite) is
    raised by the next call made here, whichever that is, as an `ObjectiveError` naming the rows by
    their keys, the original error chained to it. With that the scorer has forgotten every row it
    was given; it can be used again at once. All methods belong to one thread, the caller's.
    """

    def __init__(
        self,
        score: Callable[[Sequence[str], Sequence[str]], Any],
        *,
        chunk: int = 8,
        waiting: int = 4,
    ) -> None:
        for name, value in (("chunk", chunk), ("waiting", waiting)):
            if value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        self._score, self._chunk, self._waiting = score, chunk, waiting
        self._thread: ThreadPoolExecutor | None = ThreadPoolExecutor(1, "meal-fast-scorer")
        self._forget()

    def __enter__(self) -> OrderedScorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        """Rows submitted and not yet given out by `results`."""
        return len(self._keys)

    @property
    def scored(self) -> int:
        """How many of those have their scores by now. Depends on timing: for display alone."""
        done = sum(len(scores) for scores in self._done)
        return done + sum(n for n, future in self._pending if _finished(future))

    def submit(self, row_key: Hashable, prompt: str, response: str) -> None:
        """Hand over a finished row. Waits while `waiting` chunks are still unscored."""
        self._collect()
        self._keys.append(row_key)
        self._open.append((row_key, prompt, response))
        if len(self._open) == self._chunk:
            self._send()

    def wait_until(self, n: int) -> Tensor:
        """Wait for the first n rows: their scores (n, K), float32 on the CPU, as submitted.

        An unfilled chunk that holds one of the n goes as it is. Raises ValueError for n beyond the
        rows submitted: they would never come.
        """
        self._collect()
        if not 0 <= n <= len(self._keys):
            raise ValueError(f"n={n}: {len(self._keys)} rows have been submitted")
        if n > len(self._keys) - len(self._open):
            self._send()
        while sum(len(scores) for scores in self._done) < n:
            self._take()
        if not self._done:
            return torch.zeros(0, 0)
        return torch.cat(self._done)[:n]

    def results(self) -> tuple[tuple[Hashable, ...], Tensor]:
        """Wait for all rows: their keys and scores (R, K), as submitted; and start anew."""
        scores = self.wait_until(len(self._keys))
        keys = tuple(self._keys)
        self._forget()
        return keys, scores

    def now(self, rows: Sequence[Row]) -> Tensor:
        """Score texts (R, K) that are no part of the results, after what was submitted.

        In the same thread, so that `score` never runs twice at once; a failure is raised here.
        """
        self._collect()
        assert self._thread is not None
        return self._thread.submit(_scores, self._score, rows).result()

    def close(self) -> None:
        """End the thread: at once, or after the call of `score` it is in. Unscored rows are lost.

        Closing again does nothing; using a closed scorer is a ValueError.
        """
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None
            self._forget()

    def _forget(self) -> None:
        self._keys: list[Hashable] = []
        self._open: list[Row] = []  # the chunk being filled
        self._pending: deque[tuple[int, Future[Tensor]]] = deque()
        self._done: list[Tensor] = []

    def _send(self) -> None:
        while len(self._pending) >= self._waiting:
            self._take()
        assert self._thread is not None
        future = self._thread.submit(_scores, self._score, self._open)
        self._pending.append((len(self._open), future))
        self._open = []

    def _collect(self) -> None:
        """Takes what is done, without waiting; this is where a failure comes to light."""
        if self._thread is None:
            raise ValueError("the scorer is closed; make a new one")
        while self._pending and self._pending[0][1].done():
            self._take()

    def _take(self) -> None:
        """Takes the oldest chunk, waiting for it."""
        future = self._pending[0][1]
        try:
            scores = future.result()
            if self._done and scores.shape[1] != self._done[0].shape[1]:
                first = sum(len(scores) for scores in self._done)
                raise ObjectiveError(
                    f"scoring {_named(self._keys[first : first + len(scores)])}: the scorer "
                    f"returned {scores.shape[1]} columns after {self._done[0].shape[1]}"
                )
        except BaseException:  # Ctrl-C while waiting too: what is pending must not go on
            for _, other in self._pending:
                other.cancel()
            self._forget()
            raise
        self._pending.popleft()
        self._done.append(scores)


def _finished(future: Future[Tensor]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _scores(score: Callable[..., Any], rows: Sequence[Row]) -> Tensor:
    """In the thread: a chunk's scores (R, K), checked."""
    try:
        scores = _called(score, rows)
    except Late as error:  # to ask again, row by row, would be to wait as long again
        raise ObjectiveError(f"scoring {_named([key for key, _, _ in rows])}: {error}") from error
    except Exception as error:  # a user's function, so anything
        raise ObjectiveError(f"scoring {_first_failing(score, rows)}: {_said(error)}") from error
    keys = [key for key, _, _ in rows]
    if scores.ndim != 2 or len(scores) != len(rows):
        raise ObjectiveError(
            f"scoring {_named(keys)}: the scorer returned shape {tuple(scores.shape)} for "
            f"{len(rows)} responses; (R, K) is needed, a row for each"
        )
    bad = (~torch.isfinite(scores)).nonzero().tolist()
    if bad:
        at, k = bad[0]
        raise ObjectiveError(
            f"scoring {_named([keys[at]])}: objective {k} (from 0) is {scores[at, k].item()}"
        )
    return scores


def _called(score: Callable[..., Any], rows: Sequence[Row]) -> Tensor:
    scores = score([prompt for _, prompt, _ in rows], [response for _, _, response in rows])
    return torch.as_tensor(scores, dtype=torch.float32).detach().cpu()


def _first_failing(score: Callable[..., Any], rows: Sequence[Row]) -> str:
    """Which row alone makes the scorer raise; only called when it has raised."""
    for row in rows:
        try:
            _called(score, [row])
        except Exception:  # a user's function again: whatever it raises, this row is the one
            return _named([row[0]])
    return f"{_named([key for key, _, _ in rows])}, though no row of them alone"


def _named(keys: Sequence[Hashable]) -> str:
    names = ", ".join(map(str, keys))
    return f"row {names}" if len(keys) == 1 else f"rows {names}"


def _said(error: Exception) -> str:
    """An objective's own message as it is; of anything else its kind as well."""
    return str(error) if isinstance(error, ObjectiveError) else f"{type(error).__name__}: {error}"
