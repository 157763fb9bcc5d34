"""What a sampler holds on its device: prompts, suffixes, tails, and the steps that run on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from meal_fast.models.policy import Network, Policy
from meal_fast.models.sizes import free_bytes

from .cuda_graph import Steps
from .kv_cache import Pool, Shape, Tails
from .sequence import Row

_MULTIPLE = 16  # rooms are multiples of it
_KEPT_MULTIPLE = 64  # of what is kept, which should seldom have to grow


class Memory:
    """Keys and values within a budget of bytes: all that rows want, or what the budget allows.

    kept: it is kept for the next engine on the same network. Graphs read and write it by address,
    so it is made a little larger than is wanted, and then need not be made anew.
    """

    def __init__(self, shape: Shape, max_bytes: int, kept: bool = False) -> None:
        self.shape, self.max_bytes, self.kept = shape, max_bytes, kept
        self.release()

    def release(self) -> None:
        """Give back all memory: no prefix is known any more."""
        self._drop_tails()
        self.prompts, self.suffixes = Pool(self.shape, 0, 0), Pool(self.shape, 0, 0)
        self._limited = False  # there is less than was wanted: all that the budget allows

    def forget(self) -> None:
        """Forget every prefix. Memory is given back, unless it is kept."""
        if self.kept:
            self.prompts.clear()
            self.suffixes.clear()
        else:
            self.release()

    def _drop_tails(self) -> None:
        """With them the steps, which hold on to all memory."""
        self.tails, self.steps = Tails(self.shape, 0, 0), Steps()

    def fit(self, rows: Sequence[Row], new: int, max_rows: int) -> None:
        """Make memory for these rows, of at most `new` tokens each, `max_rows` at a time.

        What there is stays as it is where it suffices, and what grows keeps what it holds where old
        and new fit the budget side by side.
        """
        suffix = max(len(row.suffix) for row in rows)
        longest = (suffix + new, max(len(row.prompt) for row in rows), suffix)
        prompts = {row.prefix for row in rows}
        pairs = {(row.prefix, row.suffix) for row in rows if row.suffix}
        slots = min(max_rows, len(rows))
        need = (slots, len(prompts | self.prompts.keys), len(pairs | self.suffixes.keys))
        self.reserve(need, longest, least=(slots, len(prompts), len(pairs)), most=max_rows)

    def reserve(
        self,
        need: tuple[int, int, int],  # slots, places of prompts, of suffixes
        longest: tuple[int, int, int],  # tokens of each
        *,
        least: tuple[int, int, int] | None = None,  # where nothing that is known is kept
        most: int | None = None,  # slots
    ) -> None:
        """Make memory of these sizes: as much of it as the budget allows. No row may be live.

        Raises ValueError for a budget that does not hold one of each.
        """
        least, most = least or need, most or need[0]
        least_rooms = tuple(map(rounded, longest))
        here = (self.tails, self.prompts, self.suffixes)
        have, rooms = tuple(x.places for x in here), tuple(x.room for x in here)
        del here  # what is replaced below must not live on
        roomy = all(r >= least for r, least in zip(rooms, least_rooms, strict=True))
        enough = all(h >= n for h, n in zip(have, need, strict=True))
        some = all(h or not n for h, n in zip(have, need, strict=True))
        if roomy and (enough or (self._limited and some)):
            return
        token = self.shape.token_bytes
        self._drop_tails()
        old = max(n * r * token for n, r in zip(have[1:], rooms[1:], strict=True))
        counts, rooms = tuple(map(max, have, need)), tuple(map(max, rooms, least_rooms))
        if self.kept:
            ample = (min(most, _power(counts[0])), *map(_power, counts[1:]))
            wide = tuple(rounded(room, _KEPT_MULTIPLE) for room in rooms)
            if _tokens(ample, wide) * token + old <= self.max_bytes:
                counts, rooms = ample, wide
        if _tokens(counts, rooms) * token + old > self.max_bytes:
            self.release()
            rooms = least_rooms
            sizes = tuple(room * token for room in rooms)
            counts = shares(self.max_bytes, wanted=least, each=sizes)
            self._limited = counts != least
        self.prompts = self.prompts.resized(counts[1], rooms[1])
        self.suffixes = self.suffixes.resized(counts[2], rooms[2])
        self.tails = Tails(self.shape, counts[0], rooms[0])


def memory_of(policy: Policy, network: Network, max_bytes: int) -> Memory:
    """Give the memory to sample `network` with: kept with the policy where the network stays.

    There no prefix is known, since weights may have changed since it was last used.
    """
    shape = Shape.of(network)
    budget = max_bytes or default_budget(shape.device)
    if not policy.stays(network):
        return Memory(shape, budget)
    kept = policy.kept
    if not isinstance(kept, Memory) or (max_bytes and kept.max_bytes != max_bytes):
        policy.kept = None  # before there is another
        policy.kept = kept = Memory(shape, budget, kept=True)
    kept.forget()
    return kept


def rounded(tokens: int, multiple: int = _MULTIPLE) -> int:
    return -(-tokens // multiple) * multiple


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length() if n else 0


def _tokens(counts: Sequence[int], rooms: Sequence[int]) -> int:
    return sum(n * r for n, r in zip(counts, rooms, strict=True))


def shares(budget: int, wanted: tuple[int, ...], each: tuple[int, ...]) -> tuple[int, ...]:
    """Share a budget of bytes among slots, prompts' and suffixes' places: all that are wanted, or
    half of it to the slots and a quarter of the rest to the suffixes."""
    if sum(n * size for n, size in zip(wanted, each, strict=True)) <= budget:
        return wanted
    least = each[0] + each[1] + (each[2] if wanted[2] else 0)
    if least > budget:
        raise ValueError(
            f"max_cache_bytes={budget}: one row of these prompts needs {least}; raise it, or lower "
            "prompts.max_tokens or rollout.max_new_tokens"
        )
    rest = budget - least
    slots = min(wanted[0], 1 + rest // 2 // each[0])
    rest -= (slots - 1) * each[0]
    pairs = min(wanted[2], 1 + rest // 4 // each[2]) if wanted[2] else 0
    rest -= max(pairs - 1, 0) * each[2]
    return slots, min(wanted[1], 1 + rest // each[1]), pairs


def default_budget(device: torch.device) -> int:
    """Give half of a GPU's free memory (a copy of the weights is there already), 2 GiB on a CPU."""
    return free_bytes(device) // 2 if device.type == "cuda" else 2 << 30
