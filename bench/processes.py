"""A meta-step on one process and on two, alternating: `python -m bench.processes`.

The tasks of a meta-step (B_w = 2) on one process, one after the other; and in two groups, a process
and a thread each. Prints the seconds of every meta-step but each start's first, and what was sent.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from meal_fast.config.config import from_dict
from meal_fast.config.presets import preset
from meal_fast.training.distributed import start
from meal_fast.training.trainer import Trainer

SHAPE = {
    "threads": 1,
    "completions": False,
    "warmup": {"steps": 0},
    "score": {"calibration": 8},
    "meta": {"tasks": 2, "n_inner": 2},
    "mesh": {"virtual": 1},
}


def measured(out: Path, steps: int, options: dict) -> dict:
    """Train `steps` meta-steps, as one of the processes that there are."""
    shape = {**SHAPE, "meta": {**SHAPE["meta"], "steps": steps}, **options}
    config = from_dict(shape, preset("quickstart"))
    mesh = start(config)
    trainer = Trainer(config, out, mesh=mesh)
    seconds = []
    for _ in range(steps):
        begun = time.perf_counter()
        trainer.meta_step()
        trainer.step += 1
        seconds.append(time.perf_counter() - begun)
    trained = sum(p.numel() for p in trainer.policy.trainable)
    mesh.close()
    return {"seconds": seconds, "sent": mesh.sent, "trained": trained}


def run(processes: int, steps: int, options: dict) -> dict:
    """Start so many processes; give what the first one says."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        job = json.dumps([str(Path(folder) / "run"), steps, options])
        started = [
            subprocess.Popen(
                [sys.executable, "-m", "bench.processes", "--job", job],
                env=os.environ
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                | {"LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
                | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
        said = [process.communicate()[0] for process in started]
    return json.loads(said[0].splitlines()[-1])


def main() -> None:
    """Alternate one process and two."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=3, help="meta-steps of a start")
    parser.add_argument("--rounds", type=int, default=2, help="starts of each number of processes")
    parser.add_argument("--options", default="{}", help="options by section, JSON")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        out, steps, options = json.loads(args.job)
        print(json.dumps(measured(Path(out), steps, options)), flush=True)
        return
    found: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(args.rounds):
        for processes in found:
            said = run(processes, args.steps, json.loads(args.options))
            found[processes] += said["seconds"][1:]
            each = ", ".join(f"{x:.2f}" for x in said["seconds"])
            print(f"{processes} process(es): {each} s; sent {said['sent']}", flush=True)
    one, two = (statistics.median(found[n]) for n in found)
    floor = 2 * 4 * said["trained"]
    sent = said["sent"]["across"] / args.steps
    print(f"a meta-step, medians: {one:.2f} s on one, {two:.2f} s on two: {one / two:.2f} times")
    print(f"sent a meta-step: {sent:,.0f} bytes; one delta and one v: {floor:,}")


if __name__ == "__main__":
    main()
