"""Which rows wait and which have a slot: slots that stay full, rows that can be cut and resumed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from .memory import Memory
from .sequence import Prefix, Row, Tokens

Suffix = tuple[Prefix, Tokens]  # what a suffix's keys and values are known by


@dataclass(frozen=True)
class Admitted:
    """Rows that have just been given slots, and what is missing in memory for them."""

    rows: list[Row]
    own: list[int]  # of each row its suffix's place; -1: the prompt holds it
    prompts: dict[Prefix, int]  # to be computed -> place
    suffixes: dict[Suffix, tuple[int, int]]  # likewise -> the prompt's place, and its own

    @property
    def reused(self) -> int:
        """Tokens of the rows' prefixes that are there already."""
        whole = sum(len(row.prompt) + len(row.suffix) for row in self.rows)
        fresh = sum(len(p) for _, p in self.prompts) + sum(len(s) for _, s in self.suffixes)
        return whole - fresh


class Scheduler:
    """Rows of one drawing: `live`, the row in each slot, and `waiting`, for a slot."""

    def __init__(self, memory: Memory, max_rows: int) -> None:
        self.memory, self.max_rows = memory, max_rows
        self.live: list[Row] = []
        self.waiting: deque[Row] = deque()

    def start(self, rows: Iterable[Row], max_new_tokens: int) -> None:
        """Begin with these rows, all waiting, and with memory for them."""
        self.live, self.waiting = [], deque(rows)
        if self.waiting:
            self.memory.fit(self.waiting, max_new_tokens, self.max_rows)

    @property
    def busy(self) -> bool:
        """Whether any row has not ended."""
        return bool(self.waiting or self.live)

    def add(self, rows: Iterable[Row]) -> None:
        """Let more rows wait behind the others.

        Raises ValueError for one whose prompt or suffix is longer than what there is memory for:
        than all of those that the drawing began with.
        """
        for row in rows:
            prompts, suffixes = self.memory.prompts.room, self.memory.suffixes.room
            if len(row.prompt) > prompts or len(row.suffix) > suffixes:
                raise ValueError(
                    f"row of prompt {row.request.prompt.id}: {len(row.prompt)} tokens and a suffix "
                    f"of {len(row.suffix)}, but there is memory for {prompts} and {suffixes}; draw "
                    "it with the first ones"
                )
            self.waiting.append(row)

    def cut(self, row: Row, keep: int) -> None:
        """Cut a row in a slot back to its first `keep` tokens: see `Row.cut`.

        One that has ended in this step goes on. Raises ValueError for a row that has no slot.
        """
        if row not in self.live:
            raise ValueError(f"row of prompt {row.request.prompt.id}: is in no slot; cut live ones")
        row.cut(keep)

    def cancel(self, row: Row) -> None:
        """Stop a row that waits or grows. Raises ValueError for one that has ended."""
        if row.finish:
            raise ValueError(f"row of prompt {row.request.prompt.id}: has ended ({row.finish})")
        row.finish = "cancelled"

    def admit(self) -> Admitted:
        """Give free slots to rows that wait, and places in memory to their prompts and suffixes.

        What is missing there must be computed before anything else happens.
        """
        memory, waiting = self.memory, self.waiting
        in_use = {row.place for row in self.live}
        needed: set[int] = set()  # places of suffixes
        new = Admitted([], [], {}, {})
        most = min(memory.tails.places, self.max_rows)
        while waiting and len(self.live) + len(new.rows) < most:
            row = waiting[0]
            if row.finish:  # cancelled while it waited
                waiting.popleft()
                continue
            place = memory.prompts.find(row.prefix)
            if place is None:
                place = memory.prompts.take(row.prefix, in_use)
                if place is None:
                    break  # until a row ends and leaves its prompt's place
                new.prompts[row.prefix] = place
            in_use.add(place)
            own = -1
            if row.suffix:
                both = (row.prefix, row.suffix)
                found = memory.suffixes.find(both)
                if found is None:
                    found = memory.suffixes.take(both, needed)
                    if found is None:
                        break  # until the next step
                    new.suffixes[both] = (place, found)
                needed.add(own := found)
            row.place, row.key = place, -1
            new.rows.append(waiting.popleft())
            new.own.append(own)
        return new

    def release(self) -> None:
        """Close the ranks: the last rows move to the slots of those that ended."""
        live = self.live
        again = [row for row in live if not row.tokens and not row.finish]  # cut to nothing
        self.waiting.extendleft(reversed(again))
        stay = [i for i, row in enumerate(live) if row.tokens and not row.finish]
        n = len(stay)
        holes = sorted(set(range(n)) - set(stay))
        movers = [i for i in stay if i >= n]
        if movers:
            longest = max(len(live[i].suffix) + len(live[i].tokens) for i in movers)
            self.memory.tails.move(movers, holes, longest)
        left = live[:n]
        for i, hole in zip(movers, holes, strict=True):
            left[hole] = live[i]
        self.live = left
