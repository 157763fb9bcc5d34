"""The decode step at fixed shapes: on a GPU captured as a CUDA graph, and replayed.

A step of a small model launches some hundred short kernels; replayed as a graph they cost one
launch. So its shapes are those of a bucket: rows up to a power of two, tails and prompts to the
room of their memory, since attention stops at each row's own length. Rows that are not there have
a slot that no row uses. A bucket's first steps run as they are, which also compiles their kernels;
what is used a third time is captured. Graphs share one pool of memory, and last as long as what
they read and write stays where it is: `memory.Memory`.

The steps themselves run on a CPU too (tests do that); the capture has never been run: that needs a
GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from meal_fast.models.policy import Network
from meal_fast.ops import Groups

from .kv_cache import Pool, Tails, TokenPass
from .sequence import Row

FEWEST = 16  # rows of a bucket: fewer take a GPU as long
USES = 3  # of a bucket: at the last of them it is captured
_FIELDS = 7  # numbers of a row, see `FixedStep`


class Staging:
    """int64 numbers on their way to the device: one copy, which nobody waits for.

    What is written must not be overwritten before the copy is done: a step that ends with a look at
    what the device has drawn has waited for it.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._host = torch.zeros(size, dtype=torch.int64, pin_memory=cuda)
        self.numbers = self._host.numpy()
        self.there = torch.zeros_like(self._host, device=device) if cuda else self._host

    def send(self) -> None:
        if self.there is not self._host:
            self.there.copy_(self._host, non_blocking=True)


class FixedStep:
    """One decode step for at most `rows` rows."""

    def __init__(
        self,
        network: Network,
        prompts: Pool,
        tails: Tails,
        rows: int,
        pool: Any = None,  # of the memory that graphs share
        side: torch.cuda.Stream | None = None,  # on which they are captured, and share it
    ) -> None:
        self.network, self.prompts, self.tails, self.rows = network, prompts, tails, rows
        self._pool, self._side, self._uses = pool, side, 0
        self._staging = Staging(_FIELDS * rows + prompts.places + 1, prompts.shape.device)
        fields = self._staging.there[: _FIELDS * rows].view(_FIELDS, rows)
        self._token_R, self._position_R, self._place_R, self._at_R, self._order_R = fields[:5]
        self.key_R, self.drawn_R = fields[5:]  # of the rows' next tokens, for the sampler
        self._offset = self._staging.there[_FIELDS * rows :]
        self._slots_R = torch.arange(rows, device=prompts.shape.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._hidden_RD = torch.empty(0)

    def __call__(self, live: Sequence[Row]) -> Tensor:
        """Hidden states (n, D) of the rows in the first n slots; the next call overwrites them."""
        self._stage(live)
        self._uses += 1
        if self._token_R.is_cuda and self._uses >= USES:
            if self._graph is None:
                self._graph = self._capture()
            self._graph.replay()
        else:
            self._hidden_RD = self._run()
        return self._hidden_RD[: len(live)]

    def _stage(self, live: Sequence[Row]) -> None:
        n, numbers = len(live), self._staging.numbers
        fields = numbers[: _FIELDS * self.rows].reshape(_FIELDS, self.rows)
        fields[:, n:] = 0
        drawn = [len(row.tokens) for row in live]
        at = [len(row.suffix) + t - 1 for row, t in zip(live, drawn, strict=True)]
        fields[0, :n] = [row.tokens[-1] for row in live]
        fields[1, :n] = [len(row.prompt) + a for row, a in zip(live, at, strict=True)]
        fields[2, :n] = [row.place for row in live]
        fields[3, :n] = at
        fields[4] = fields[2].argsort(kind="stable")
        fields[5, :n] = [row.key for row in live]
        fields[6, :n] = drawn
        counts = np.bincount(fields[2], minlength=self.prompts.places)
        numbers[_FIELDS * self.rows :] = np.concatenate([[0], counts.cumsum()])
        self._staging.send()

    def _run(self) -> Tensor:
        one_token = TokenPass(
            prompts=self.prompts,
            low=0,
            high=self.prompts.places,
            width=self.prompts.room,
            groups=Groups(self.prompts.places, self._place_R, self._order_R, self._offset),
            tails=self.tails,
            slots_R=self._slots_R,
            at_R=self._at_R,
            at=None,
            seen_R=self._at_R + 1,
            longest=self.tails.room,
        )
        hidden: Tensor = self.network.body(
            input_ids=self._token_R[:, None],
            position_ids=self._position_R[:, None],
            use_cache=False,
            tree=one_token,
        ).last_hidden_state
        return hidden[:, 0]

    def _capture(self) -> torch.cuda.CUDAGraph:
        # The warm-up and the capture write what the replay writes: the same keys and values.
        side = self._side or torch.cuda.Stream(self._token_R.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # thread_local: a reward model may be at work on the same GPU in the scorer's thread
        with torch.cuda.graph(
            graph, pool=self._pool, stream=side, capture_error_mode="thread_local"
        ):
            self._hidden_RD = self._run()
        return graph


class Steps(dict[int, FixedStep]):
    """The decode steps of one memory, by their number of rows."""

    # Which their graphs share: memory, and the stream of their captures, since what is freed on one
    # stream is not used again on another.
    _pool: Any = None
    _side: torch.cuda.Stream | None = None

    def fitting(self, network: Network, prompts: Pool, tails: Tails, rows: int) -> FixedStep:
        """Give the step for so many rows; it is the same memory in every call."""
        size = bucket(rows, tails.places)
        if size not in self:
            if self._pool is None and prompts.shape.device.type == "cuda":
                self._pool = torch.cuda.graph_pool_handle()
                self._side = torch.cuda.Stream(prompts.shape.device)
            self[size] = FixedStep(network, prompts, tails, size, self._pool, self._side)
        return self[size]


def bucket(rows: int, slots: int) -> int:
    """Give the fixed number of rows that a step of so many runs at."""
    return min(max(FEWEST, 1 << (rows - 1).bit_length()), slots)
