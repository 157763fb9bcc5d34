"""How a run's processes are laid out: groups of preferences, an update's prompts, shards. No torch.

    rank = (group * data + d) * shard + s          world = groups * data * shard

`groups` processes' worth of preferences are learnt at the same time; within a group `data * shard`
processes share each update's prompts, and `shard` of them hold one copy of the weights together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from meal_fast.common import require

from .schema import opt

if TYPE_CHECKING:
    from .config import Config


@dataclass(frozen=True)
class MeshConfig:
    """How many processes do what; docs/scale.md."""

    groups: int = opt(
        0,
        "Groups of processes that learn a meta-step's preferences at the same time; 0 takes as "
        "many as there are processes and preferences for.",
    )
    data: int = opt(
        0,
        "Processes of a group, times mesh.shard, that share an update's prompts; 0 takes what the "
        "groups leave.",
    )
    shard: int = opt(
        1, "Processes that hold the model's weights together (FSDP2), each a part of them."
    )
    virtual: int = opt(
        0,
        "Equal parts of an update's prompts, each sampled and differentiated by itself: results "
        "depend on it and not on the number of processes. 0 takes data x shard.",
    )
    timeout: float = opt(
        1800.0, "Seconds that a process waits for the others before it ends the run."
    )

    def __post_init__(self) -> None:
        for name, least in (("groups", 0), ("data", 0), ("shard", 1), ("virtual", 0)):
            value = getattr(self, name)
            ok = least <= value <= 1 << 20
            require(ok, f"mesh.{name}", value, f"must be {least} or more")
        ok = 0 < self.timeout <= 7 * 86400
        require(ok, "mesh.timeout", self.timeout, "must be seconds, at most a week")


@dataclass(frozen=True)
class Layout:
    """What `layout` made of a run's mesh options: nothing is left open."""

    groups: int = 1
    data: int = 1
    shard: int = 1
    virtual: int = 1

    @property
    def world(self) -> int:
        """Count the processes."""
        return self.groups * self.data * self.shard

    @property
    def parts(self) -> int:
        """Count the processes that share an update's prompts."""
        return self.data * self.shard

    def place(self, rank: int) -> tuple[int, int, int]:
        """Give a rank's group, its place among `data` and its place among `shard`."""
        group, within = divmod(rank, self.parts)
        return group, *divmod(within, self.shard)

    def tasks(self, group: int, count: int) -> range:
        """Give the numbers of the tasks, of `count` in a meta-step, that a group runs.

        Neighbours, and as many as other groups have, or one more.
        """
        return range(group * count // self.groups, (group + 1) * count // self.groups)

    def shards(self, rank: int) -> range:
        """Give the numbers of the virtual shards that a rank samples and differentiates."""
        each = self.virtual // self.parts
        first = (rank % self.parts) * each
        return range(first, first + each)


def layout(config: Config, world: int) -> Layout:
    """Lay out `world` processes as the run's options say, and choose what they leave open.

    The groups come first, for nothing but a delta a meta-step passes between them; then the data.

    Raises ValueError for what cannot be: see the messages.
    """
    from .recipes import spec_of

    mesh, tasks, spec = config.mesh, config.meta.tasks, spec_of(config)
    require(world >= 1, "processes", world, "at least one")
    shard, groups, data = mesh.shard, mesh.groups, mesh.data
    said = f"{world} process{'es' * (world != 1)} started"
    device, remedy = config.policy.device, f"{said}, each with a card of its own; use auto or cuda"
    require(world == 1 or ":" not in device, "policy.device", device, remedy)
    require(world % shard == 0, "mesh.shard", shard, f"{said}, which it must divide")
    if not groups and data:  # what these leave
        groups = max(world // (shard * data), 1)
    elif not groups:
        able = [g for g in range(1, tasks + 1) if tasks % g == 0 and (world // shard) % g == 0]
        groups = max(able) if spec.apart else 1
    if groups > 1:
        remedy = (
            f"recipe {config.recipe} as configured has no preferences that are learnt apart; "
            "use mesh.groups=1 and mesh.data"
        )
        require(spec.apart, "mesh.groups", groups, remedy)
        remedy = f"a meta-step has meta.tasks={tasks}: at most so many groups"
        require(groups <= tasks, "mesh.groups", groups, remedy)
    data = data or max(world // (shard * groups), 1)
    if groups * data * shard != world:
        given = f"mesh.groups={groups} x mesh.data={data} x mesh.shard={shard}"
        raise ValueError(
            f"{given}: is {groups * data * shard} processes, and {said}; make them agree, or leave "
            "one of the options out"
        )
    virtual = mesh.virtual or data * shard
    remedy = (
        f"data x shard = {data} x {shard} processes share its parts: a multiple of {data * shard}; "
        "a run keeps the number that it was started with"
    )
    require(virtual % (data * shard) == 0, "mesh.virtual", virtual, remedy)
    if virtual > 1:
        count = config.rollout.prompts
        remedy = f"an update has rollout.prompts={count}, which it must divide"
        require(count % virtual == 0, "mesh.virtual", virtual, remedy)
    return Layout(groups, data, shard, virtual)


def world_of(environment: Mapping[str, str]) -> tuple[int, int]:
    """Read rank and number of processes from the variables that launchers set; (0, 1) without.

    Raises ValueError for variables that do not go together.
    """
    held = [environment.get(name, "") for name in ("RANK", "WORLD_SIZE")]
    if not any(held):
        return 0, 1
    good = all(text.isdecimal() for text in held)
    require(good and int(held[0]) < int(held[1]), "RANK, WORLD_SIZE", " ".join(held), _START)
    return int(held[0]), int(held[1])


def check_meeting(environment: Mapping[str, str]) -> None:
    """Raise ValueError where the variables do not say where the processes meet."""
    for name, what in (("MASTER_ADDR", "rank 0's address"), ("MASTER_PORT", "a free port of it")):
        held = environment.get(name, "")
        good = held.isdecimal() if name == "MASTER_PORT" else bool(held)
        remedy = f"{what} is needed with RANK and WORLD_SIZE; start with torchrun, or unset these"
        require(good, name, held, remedy)


_START = "no process of a launcher's; start with torchrun or accelerate launch, or unset them"
