"""One of the processes that save together: argv FOLDER MODE; says what it saw as JSON."""

import errno
import json
import math
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from meal_fast.config.mesh import Layout
from meal_fast.config.presets import preset
from meal_fast.training import checkpoint_store
from meal_fast.training.checkpoint import Checkpoints
from meal_fast.training.checkpoint_saved import Saved
from meal_fast.training.distributed import Mesh, ProcessLost

SHAPES = ((3, 5), (3,), (1, 3), (1,), (7, 1), (7,))  # some of fewer rows than processes
CONFIG = preset("tiny")


def numbers(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of_preferences(rank: int) -> dict[Any, Any]:
    """What a process has of its own, and what it has as all others do."""
    own = (float(rank), 1.0 - rank)
    return {
        (0.5, 0.5): [numbers(7, (2, 3))],
        own: [torch.full((4,), float(rank)), torch.zeros(0, 3, dtype=torch.bfloat16),
              torch.tensor([True, False]), torch.tensor(3), numbers(rank, (3,)).bfloat16()],
    }  # fmt: skip


def experience() -> dict[Any, Any]:
    """Plain values, whose kinds a file may lose."""
    values = [1, 2.5, None, True, "x\ud800/", math.nan, -0.0, (1, [2]), -math.inf, 10**30]
    return {"a": values, 3: "three", "3": 1e-320, "": {}, (): [], "h": [numbers(9, (5,)).half()]}


def sharded(mesh: Any) -> list[Any]:
    """Parameters that the processes hold together."""
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1), nn.Linear(1, 7))
    fully_shard(model, mesh=mesh)
    parameters = list(model.parameters())
    with torch.no_grad():
        for i, (p, shape) in enumerate(zip(parameters, SHAPES, strict=True)):
            p.copy_(distribute_tensor(numbers(100 + i, shape), mesh, p.placements))
    return parameters


def state(step: int, rank: int, theta: list[Any]) -> dict[str, Any]:
    adam = {"exp_avg": [p.detach() * 2 for p in theta], "step": [torch.tensor(3.0) for _ in theta]}
    counts = {"step": step, "tokens": 5, "metrics_bytes": 0, "completions_bytes": 0, "files": {}}
    outer = {"theta": theta, "adam": adam, "by": of_preferences(rank)}
    return {**counts, "outer": outer, "experience": experience()}


def check(saved: Saved, added: float, ranks: int) -> None:
    """Hold what is read, whole, to what was written."""
    held = saved.load()
    for i, (found, shape) in enumerate(zip(held["outer"]["theta"], SHAPES, strict=True)):
        assert torch.equal(found, numbers(100 + i, shape) + added)
    wanted: dict[Any, Any] = {}
    for rank in range(ranks):
        wanted |= of_preferences(rank)
    assert list(held["outer"]["by"]) == list(wanted)
    for w, values in wanted.items():
        for one, other in zip(held["outer"]["by"][w], values, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other), w
    one, other = held["experience"], experience()
    assert torch.equal(one.pop("h")[0], other.pop("h")[0])
    assert repr(one) == repr(other)


def check_parts(saved: Saved, theta: list[Any], added: float) -> None:
    """The same, where a process reads its own part, and not all entries."""

    def like(where: tuple[Any, ...], shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if where[1] == "theta":
            return torch.zeros_like(theta[where[2]].detach())
        return torch.empty(shape, dtype=dtype)

    held = saved.load(like=like, wanted=lambda where: where[:2] != ("outer", "adam"))
    assert held["outer"].keys() == {"theta", "by"}
    for i, found in enumerate(held["outer"]["theta"]):
        assert isinstance(found, DTensor)
        assert found.to_local().numel() < found.numel() or SHAPES[i][0] == 1
        assert torch.equal(found.full_tensor(), numbers(100 + i, SHAPES[i]) + added)


def raised(action: Any) -> str:
    try:
        action()
    except (ValueError, OSError, ProcessLost) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main() -> None:
    out, mode = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = Mesh(Layout(data=world, virtual=world), rank, 60.0)
    theta = sharded(init_device_mesh("cpu", (world,)))
    checkpoints, seen = Checkpoints(out, mesh), {}
    if mode == "load":
        found = checkpoints.open(CONFIG)
        check(found, 1.0, 2)
        check_parts(found, theta, 1.0)
        seen["step"] = found.step
    if mode == "save":
        first = [p.to_local().clone() for p in theta]
        for step in (1, 2, 3):
            with torch.no_grad():
                for p, value in zip(theta, first, strict=True):
                    p.to_local().copy_(value + float(step == 3))
            checkpoints.save(state(step, rank, theta), CONFIG)
            with torch.no_grad():  # what it goes on with is not what it has saved
                for p in theta:
                    p.to_local().zero_()
        checkpoints.finish()
        broken = state(4, rank, theta)
        if rank == world - 1:
            broken["outer"]["by"][(0.5, 0.5)][0][0, 0] = math.nan
        seen["nan"] = raised(lambda: checkpoints.save(broken, CONFIG))
        other = state(4, rank, theta)
        other["experience"]["3"] = rank
        checkpoints.save(other, CONFIG)
        seen["other"] = raised(checkpoints.finish)
        real = os.fsync

        def full(number: int) -> None:
            if rank == world - 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(number)

        os.fsync = full  # type: ignore[assignment]
        checkpoints.save(state(4, rank, theta), CONFIG)
        seen["full"] = raised(lambda: checkpoints.save(state(5, rank, theta), CONFIG))
        os.fsync = real
        seen["latest"] = str(checkpoints.latest)
    if mode == "killed":
        real_write = checkpoint_store._written

        def die(*arguments: Any) -> Any:
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return real_write(*arguments)

        checkpoint_store._written = die
        checkpoints.save(state(4, rank, theta), CONFIG)
        began = time.monotonic()
        seen["killed"] = raised(checkpoints.finish)
        seen["after"] = f"{time.monotonic() - began:.1f}"
        print(json.dumps(seen), flush=True)
        os._exit(3)
    checkpoints.close()
    print(json.dumps(seen), flush=True)
    mesh.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
