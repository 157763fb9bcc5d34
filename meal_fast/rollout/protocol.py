"""What every sampler can be asked for, and what only some of them can do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar, Literal, Protocol

from meal_fast.data_types import Rollout
from meal_fast.models.policy import Policy

from .sequence import Counts, Request, Row, Sampling

Capability = Literal["adapters", "any-network", "rejection"]
MEANING: dict[Capability, str] = {
    "adapters": "several tasks' adapters at once",
    "any-network": "a network that is neither the policy's model nor its reference's",
    "rejection": "rows that are cut back, cancelled and added while others are drawn",
}


class Backend(Protocol):
    """A sampler that is open on one network, whose weights stay as they are: `open_backend`."""

    name: ClassVar[str]  # as `rollout.backend` has it
    foreign: ClassVar[bool]  # whether log-probabilities come of other model code than the learner's
    capabilities: ClassVar[frozenset[Capability]]

    @property
    def policy(self) -> Policy: ...

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        ended: Callable[[int], None] | None = None,  # told how many rows have ended so far
    ) -> Rollout:
        """Sample every request; the rows in the order of the requests.

        Raises ValueError for no request, one of no samples, and a prompt that is empty or too long.
        """

    def forget(self) -> None:
        """Forget what it has computed of earlier requests."""


class Rejecting(Backend, Protocol):
    """A sampler with the capability `rejection`."""

    @property
    def counts(self) -> Counts: ...

    @property
    def live(self) -> list[Row]:
        """The row in each slot."""

    def rows(self, requests: Sequence[Request], max_new_tokens: int) -> list[Row]:
        """Give the rows of the requests, in their order, not drawn yet."""

    def draw(self, rows: Iterable[Row], sampling: Sampling) -> Iterator[list[Row]]:
        """Draw one step after the other, and yield the rows that ended in it."""

    def add(self, rows: Iterable[Row]) -> None:
        """Let more rows wait."""

    def cut(self, row: Row, keep: int) -> None:
        """Cut a live row back to its first `keep` tokens; what follows is drawn anew."""

    def cancel(self, row: Row) -> None:
        """Stop a row that waits or grows."""


def check_capable(backend: Backend | type[Backend], *needs: Capability) -> None:
    """Raise ValueError where a backend lacks one of the capabilities `needs`."""
    for need in needs:
        if need not in backend.capabilities:
            raise ValueError(
                f"rollout.backend={backend.name!r}: has no capability {need!r} ({MEANING[need]}); "
                "use rollout.backend=engine"
            )
