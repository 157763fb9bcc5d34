"""The decode step at fixed shapes: on a GPU captured once as a CUDA graph, and replayed.

A step of a small model launches some hundred short kernels; replayed as a graph they cost one
launch. So its shapes are those of a bucket: rows up to a power of two, tails up to a multiple of 64
tokens, prompts to the room of their pool. Rows that are not there have a slot that no row uses.
Graphs last as long as the memory they were captured on: an engine's, until a larger draw comes.

The steps themselves run on a CPU too (tests do that); the capture has never been run: that needs a
GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import Groups
from ..policy import Network
from .cache import Pool, Tails, TokenPass

_TAIL = 64
_WARM_UPS = 3  # runs before the capture: kernels are compiled, and libraries make their workspaces


class FixedStep:
    """One decode step for at most `rows` rows with tails of at most `longest` tokens."""

    def __init__(
        self, network: Network, prompts: Pool, tails: Tails, rows: int, longest: int
    ) -> None:
        device = prompts.shape.device
        self.network, self.prompts, self.tails, self.longest = network, prompts, tails, longest
        self.inputs_4R = torch.zeros(4, rows, dtype=torch.int64, device=device)
        self.order_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self.offset = torch.zeros(prompts.places + 1, dtype=torch.int64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._hidden_RD = torch.empty(0)

    def __call__(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        places: Sequence[int],
        at: Sequence[int],
    ) -> Tensor:
        """Hidden states (n, D) of the rows in the first n slots; the next call overwrites them."""
        n, rows = len(tokens), self.inputs_4R.shape[1]
        spare = [0] * (rows - n)
        given = [[*values, *spare] for values in (tokens, positions, places, at)]
        self.inputs_4R.copy_(torch.tensor(given))
        groups = Groups.of(self.inputs_4R[2], self.prompts.places)
        self.order_R.copy_(groups.order_R)
        self.offset.copy_(groups.offset)
        if self.inputs_4R.device.type != "cuda":
            self._hidden_RD = self._run()
        else:
            if self._graph is None:
                self._graph = self._capture()
            self._graph.replay()
        return self._hidden_RD[:n]

    def _run(self) -> Tensor:
        token_R, position_R, place_R, at_R = self.inputs_4R
        one_token = TokenPass(
            prompts=self.prompts,
            low=0,
            high=self.prompts.places,
            width=self.prompts.room,
            groups=Groups(self.prompts.places, place_R, self.order_R, self.offset),
            tails=self.tails,
            at_R=at_R,
            at=None,
            seen_R=at_R + 1,
            longest=self.longest,
        )
        hidden: Tensor = self.network.body(
            input_ids=token_R[:, None],
            position_ids=position_R[:, None],
            use_cache=False,
            tree=one_token,
        ).last_hidden_state
        return hidden[:, 0]

    def _capture(self) -> torch.cuda.CUDAGraph:
        # The warm-ups and the capture write what the replay writes: the same keys and values.
        side = torch.cuda.Stream(self.inputs_4R.device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # thread_local: a reward model may be at work on the same GPU in the scorer's thread
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._hidden_RD = self._run()
        return graph


def bucket(rows: int, longest: int, slots: int, room: int) -> tuple[int, int]:
    """The fixed shape that a step of so many rows and tokens runs at."""
    power = 1 << (rows - 1).bit_length()
    return min(power, slots), min(-(-longest // _TAIL) * _TAIL, room)
