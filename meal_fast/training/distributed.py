"""The processes of a run: which one this is, and what they tell each other. One alone is no case.

    everyone   all processes                                    stop, and errors before the updates
    group      those that learn the same preferences            answers, and their shards' gradients
    across     one of each group, those in the same place       one delta and v a meta-step

What is collective must be called by every process of a kind, in the same order. What can fail on
one alone goes through `agreed`, `in_group` or `across_groups`: it then fails on all of them.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from meal_fast.common import first_line, require
from meal_fast.config.config import Config
from meal_fast.config.errors import GivenUp, ProcessLost
from meal_fast.config.mesh import Layout, check_meeting, layout, world_of
from meal_fast.data.preferences import Preference
from meal_fast.models.threads import automatic

from .losses.sequences import Part
from .tree_sum import TreeSum, summed_over

T = TypeVar("T")
E = TypeVar("E", bound=BaseException)
Drawn = list[tuple[int, Preference]]  # tasks of a meta-step: number, preference
ONE = Layout()
SHUTDOWN = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # torchrun's: seconds from a stop to its kill; or 30


class Mesh:
    """Hold this process's place among those of a run, and what it needs to speak to the others.

    `sent`: bytes that this process has sent of gradients ("group") and of what a meta-step makes
    ("across"); what text and rewards are does not count.
    """

    def __init__(
        self, laid: Layout = ONE, rank: int = 0, timeout: float = 1800.0, *, ends: bool = False
    ) -> None:
        self.layout, self.rank, self.timeout = laid, rank, timeout
        self.number, *_ = laid.place(rank)  # of its group
        self._ends = ends  # the group of all processes, when it is closed
        self.sent = {"group": 0, "across": 0}
        self._everyone = self._group = self._across = None
        self._sums: dict[str, dist.ProcessGroup] = {}
        if laid.world > 1:
            self._open()

    @property
    def world(self) -> int:
        """Count the processes."""
        return self.layout.world

    @property
    def threads(self) -> int:
        """Count the threads of each process where a machine's cores are shared out; 0: it is alone.

        How many processes are on this machine, launchers say.
        """
        here = os.environ.get("LOCAL_WORLD_SIZE", "1") if self.world > 1 else "1"
        return max(automatic() // int(here), 1) if here.isdecimal() and int(here) > 1 else 0

    @property
    def main(self) -> bool:
        """Say whether it is the one that writes the run's files."""
        return self.rank == 0

    @property
    def leads(self) -> bool:
        """Say whether it is the first of its group."""
        return self.rank % self.layout.parts == 0

    @property
    def of_group(self) -> range:
        """Give the ranks of its group."""
        first = self.number * self.layout.parts
        return range(first, first + self.layout.parts)

    @property
    def shards(self) -> range:
        """Give the numbers of the parts of an update that it samples and differentiates."""
        return self.layout.shards(self.rank)

    @property
    def parts(self) -> list[Part]:
        """Give the same as losses have it."""
        even = self.layout.shard > 1  # one model is held together: each pass is everybody's
        return [Part(number, self.layout.virtual, even) for number in self.shards]

    def shares(self, preferences: Sequence[Preference], *, together: bool) -> list[Drawn]:
        """Share out a meta-step's tasks among the groups.

        together: tasks of one preference go to one group, which has what the one before left.
        """
        drawn = list(enumerate(preferences))
        if not together:
            numbers = (self.layout.tasks(g, len(drawn)) for g in range(self.layout.groups))
            return [[drawn[n] for n in own] for own in numbers]
        distinct = list(dict.fromkeys(preferences))
        found = []
        for g in range(self.layout.groups):
            own = {distinct[n] for n in self.layout.tasks(g, len(distinct))}
            found.append([(n, w) for n, w in drawn if w in own])
        return found

    # What all must do, or none

    def agreed(self, action: Callable[[], T], *, first: bool = False) -> T:
        """Do something on every process; what it raises on one, it raises on all.

        first: on the main process first; the others find the files that it has left.
        """
        if not first or self.world == 1:
            return self._alike(action, True)
        found = self._alike(action, self.main)
        others = self._alike(action, not self.main)
        return found if self.main else others

    def main_alone(self, action: Callable[[], T]) -> T:
        """Do something on the main process, and give what it gave on all."""
        found: list[Any] = self._together(lambda: action() if self.main else None, self._everyone)
        return found[0]

    def in_group(self, action: Callable[[], T]) -> list[T]:
        """Do something on every process of the group; give what each of them gave, by rank."""
        return self._together(action, self._group)

    def across_groups(self, action: Callable[[], T]) -> list[T]:
        """Do something in every group, and give what each of them gave."""
        return self._together(action, self._across)

    def any(self, flag: bool) -> bool:
        """Say whether it is so on any process."""
        return self._any(flag, self._everyone)

    def any_in_group(self, flag: bool) -> bool:
        """Say whether it is so on any process of the group."""
        return self._any(flag, self._group)

    def same(self, value: str, what: str) -> None:
        """Raise ValueError where processes that must have the same have not."""
        found = self._together(lambda: value, self._everyone)
        for rank, other in enumerate(found):
            if other != found[0]:
                raise ValueError(
                    f"{what}: rank 0 has {found[0]}, rank {rank} has {other}; all processes must "
                    "compute alike: use machines of one kind, with the same versions"
                )

    def beside(self) -> Any:
        """Make one more group of all processes, for what goes on beside the training; alone: None.

        Each user has its own, for calls of two threads in one group would be taken for each other.
        """
        return self._new([list(range(self.world))], 0, "gloo")

    # Sums

    def summed(self, parts: dict[int, list[Tensor]]) -> list[Tensor]:
        """Add up what each of an update's parts has, in one order whatever process has it.

        parts: of this process's, by number; they are its own from then on.
        """
        tree = TreeSum(self.layout.virtual)
        like = next(iter(parts.values()))
        for number, terms in parts.items():
            tree.add(number, terms)
        owners = [self.layout.shards(rank) for rank in self.of_group]
        return self._whole(tree, owners, "group", like)

    def summed_across(
        self, tree: TreeSum, shares: Sequence[Drawn], like: Sequence[Tensor]
    ) -> list[Tensor]:
        """Add up what the groups have of a meta-step's tasks."""
        owners = [[number for number, _ in share] for share in shares]
        return self._whole(tree, owners, "across", like)

    def close(self) -> None:
        """Leave the others, who have no more to ask."""
        if self.world > 1 and dist.is_initialized():
            self._call(dist.barrier, group=self._everyone)
            if self._ends:
                dist.destroy_process_group()

    def _whole(
        self,
        tree: TreeSum,
        owners: Sequence[Sequence[int]],
        kind: str,
        like: Sequence[Tensor],
    ) -> list[Tensor]:
        if len(owners) == 1:
            return tree.whole
        found, sent = summed_over(tree, owners, self._sums[kind], like, self._call)
        self.sent[kind] += sent
        return found

    def _open(self) -> None:
        laid, within = self.layout, self.rank % self.layout.parts
        everyone = list(range(laid.world))
        groups = [everyone[g * laid.parts :][: laid.parts] for g in range(laid.groups)]
        places = [everyone[p :: laid.parts] for p in range(laid.parts)]
        # Objects go through gloo; tensors through what the device has.
        self._everyone = self._new([everyone], 0, "gloo")
        self._group = self._new(groups, self.number, "gloo")
        self._across = self._new(places, within, "gloo")
        self._sums = {
            "group": self._new(groups, self.number, None),
            "across": self._new(places, within, None),
        }

    def _new(self, among: list[list[int]], mine: int, backend: str | None) -> Any:
        """Make process groups, all of them on every process; give this one's, if it is of many."""
        limit = timedelta(seconds=self.timeout)
        if len(among[0]) == 1:
            return None
        made = [self._call(dist.new_group, ranks, limit, backend) for ranks in among]
        return made[mine]

    def _alike(self, action: Callable[[], T], mine: bool) -> T:
        """Do it where it is `mine`, and raise on all what it raises there."""
        found: list[T] = []
        self._together(lambda: found.append(action()) if mine else None, self._everyone)
        return found[0] if found else None  # type: ignore[return-value]

    def _any(self, flag: bool, group: Any) -> bool:
        if group is None:
            return flag
        value = torch.tensor(int(flag))
        self._call(dist.all_reduce, value, dist.ReduceOp.MAX, group)
        return bool(value)

    def _together(self, action: Callable[[], T], group: Any) -> list[T]:
        if group is None:
            return [action()]
        found: T | None = None
        error: BaseException | None = None
        try:
            found = action()
        except ProcessLost:
            raise
        except (Exception, KeyboardInterrupt) as raised:
            error = raised
        held: list[Any] = [None] * dist.get_world_size(group)
        self._call(dist.all_gather_object, held, (found, _portable(error)), group)
        raised_by = [other for _, other in held if other is not None]
        if raised_by:
            shown = error or raised_by[0]
            raise of_all(shown)
        return [value for value, _ in held]

    def _call(self, operation: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Call what the others must call as well; raise ProcessLost where they do not."""
        try:
            return operation(*arguments, **named)
        except RuntimeError as error:
            raise ProcessLost(
                f"rank {self.rank} of {self.world}: another process has ended, or did not answer "
                f"within mesh.timeout={self.timeout:g} s; its own message says why "
                f"({first_line(error)})"
            ) from error


class Grace:
    """Decide, between inner updates, whether a meta-step can still be ended after a stop.

    A launcher kills what has not left some time after it was told to; two thirds of that are for
    updates. One process alone always ends its meta-step; its user can press Ctrl-C again.
    """

    def __init__(self, mesh: Mesh, updates: int) -> None:
        self._mesh, self._left, self._made = mesh, updates, 0
        self._begun, self._asked = time.monotonic(), 0.0
        given = os.environ.get(SHUTDOWN, "")
        self._grace = (int(given) if given.isdecimal() else 30) * 2 / 3

    def check(self, asked: bool) -> None:
        """Raise GivenUp, on every process of the group, where it cannot; before each update."""
        if self._mesh.world == 1:
            return
        now, made, left = time.monotonic(), self._made, self._left - self._made
        self._made += 1
        if not self._mesh.any_in_group(asked):
            return
        self._asked = self._asked or now
        needs = left * (now - self._begun) / made if made else 0.0
        if self._mesh.any_in_group(needs > self._grace - (now - self._asked)):
            raise GivenUp("the meta-step would not have ended in time")


ALONE = Mesh()


def start(config: Config) -> Mesh:
    """Take this process's place among those that a launcher has started; alone: ask nobody.

    Raises ValueError for a number of processes that the run's options cannot be laid out on.
    """
    rank, world = world_of(os.environ)
    laid = layout(config, world)
    if world == 1:
        return Mesh(laid)
    on_cpu = config.policy.device == "cpu" or not torch.cuda.is_available()
    with _deadline(rank, world, config.mesh.timeout) as limit:
        # A launcher (Ray Train's) may have made it. Tensors go where they are, objects by gloo.
        made = not dist.is_initialized()
        if made:
            check_meeting(os.environ)
            backend = "gloo" if on_cpu else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, timeout=limit, **_restarted(rank, world, limit))
        # Here, not above: a run of one process does without.
        from accelerate import PartialState

        state = PartialState(cpu=on_cpu)  # it takes that group, and this process's own device
        require(state.num_processes == world, "WORLD_SIZE", world, "no such group of processes")
        return Mesh(laid, rank, config.mesh.timeout, ends=made)


def _restarted(rank: int, world: int, limit: timedelta) -> dict[str, Any]:
    """Give what processes meet by that torchrun has started again; empty: what they would take.

    torch 2.13 hands them the store of those before them, in which these have left where they were
    to be reached: names of their own keep them apart.
    """
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if start == "0":
        return {}
    store, rank, world = next(dist.rendezvous("env://", rank, world, timeout=limit))
    store.set_timeout(limit)
    own = dist.PrefixStore(f"start {start}", store)
    return {"store": own, "rank": rank, "world_size": world}


@contextmanager
def _deadline(rank: int, world: int, seconds: float) -> Iterator[timedelta]:
    try:
        yield timedelta(seconds=seconds)
    except RuntimeError as error:  # of the store that processes meet at
        raise ProcessLost(
            f"rank {rank} of {world}: not all processes came within mesh.timeout={seconds:g} s "
            f"({first_line(error)})"
        ) from error


def check_shared(out: Path, seconds: float = 10.0) -> None:
    """Raise ValueError where this process does not see the run folder that the main one wrote."""
    until = time.monotonic() + seconds
    while not (out / "config.json").is_file():
        if time.monotonic() > until:
            raise ValueError(
                f"out={str(out)!r}: this machine does not see what rank 0 wrote there; name a "
                "folder on a file system that all machines share"
            )
        time.sleep(0.1)


def of_all(error: E) -> E:
    """Mark an error that all processes have: the main one says it."""
    error.agreed = True  # type: ignore[attr-defined]
    return error


def _portable(error: BaseException | None) -> BaseException | None:
    """Give an error that another process can raise."""
    if error is None:
        return None
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
