"""Real processes that train together: gloo, on this machine, as a launcher would start them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from meal_fast.config.config import from_dict
from meal_fast.config.presets import preset
from meal_fast.config.run_dir import read_metrics
from meal_fast.models.shards import gathered
from meal_fast.training.distributed import start
from meal_fast.training.trainer import Trainer
from tests.helpers.ranks import free_port

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 540  # seconds for all runs of a session


@dataclass(frozen=True)
class Run:
    """One run of the `tiny` preset: options by section, and the folder to train in."""

    out: str
    options: Mapping[str, Any] = field(default_factory=dict)
    resume: bool = False
    stop_after: int = 0  # meta-steps; the main process alone is told

    def train(self) -> dict[str, Any]:
        """Train, as one of however many processes there are; give what it knows of itself."""
        config = from_dict({"threads": 1, **self.options}, preset("tiny"))
        mesh = start(config)
        trainer = Trainer(config, Path(self.out), resume=self.resume, mesh=mesh)
        if self.stop_after:

            def told(line: dict[str, Any]) -> None:
                trainer.stop_requested |= line["meta_step"] + 1 >= self.stop_after

            trainer.on_update = told
        finished = trainer.train()
        theta = [gathered(p) for p in trainer.policy.trainable]
        state = {"experience": trainer.collector.state(), "theta": theta}
        return {
            "finished": finished,
            "step": trainer.step,
            "tokens": trainer.tokens,
            "state": digest_of(state),
            "sent": mesh.sent,
        }


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What a launcher tells a process."""
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }


def session(world: int, runs: Sequence[Run]) -> list[list[dict[str, Any]]]:
    """Let `world` processes make the runs, one after the other; what each says of each."""
    plan = json.dumps([run.__dict__ for run in runs])
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.mesh_runs", plan],
            env=environment(rank, world, port),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        ends = [process.communicate(timeout=LIMIT) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, err) in zip(started, ends, strict=True):
        assert process.returncode == 0, err[-3000:]
    said = [json.loads(out.splitlines()[-1]) for out, _ in ends]
    return [list(of_run) for of_run in zip(*said, strict=True)]


def digest_of(value: Any) -> str:
    """A digest of nested values, bit by bit."""
    import torch

    found = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            found.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(part, Mapping):
            for name, inner in part.items():
                found.update(repr(name).encode())
                add(inner)
        elif isinstance(part, list | tuple):
            for inner in part:
                add(inner)
        else:
            found.update(repr(part).encode())

    add(value)
    return found.hexdigest()


def left_by(run: Path) -> dict[str, str]:
    """Digests of what a finished run's folder holds, less seconds and what names the start."""
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(run)]
    found = {"metrics": hashlib.sha256(json.dumps(lines).encode()).hexdigest()}
    for name in ("completions.jsonl", "statistics.json", "policy/model.safetensors"):
        found[name] = hashlib.sha256((run / name).read_bytes()).hexdigest()
    for path in sorted(run.glob("*.safetensors")):
        found[path.name] = digest_of(load_file(path))  # its header's entries are in no order
    return found


if __name__ == "__main__":
    print(json.dumps([Run(**values).train() for values in json.loads(sys.argv[1])]), flush=True)
