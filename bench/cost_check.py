"""What the cost model says of real meta-steps on this machine's CPU, beside what they took.

    python -m bench.cost_check [--steps 3] [--threads 1] [--section.option VALUE ...]

First the card: FLOP/s of a product of the model's shapes, bytes/s of a sum over a large array, the
best of several. Then the quickstart preset's updates, without its supervised start. The model is
given the lengths that prompts and answers had; nothing else of it is fitted. Of one thread, seconds
are the process's own on the CPU: other work does not count, though what it takes of caches and
memory does. A table on standard output, and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from meal_fast.config import from_dict, preset
from meal_fast.config.cli import add_options, nested
from meal_fast.config.cost import cost
from meal_fast.config.hardware import card_named
from meal_fast.config.mesh import layout
from meal_fast.config.mesh_plan import size
from meal_fast.config.mesh_plan import time as seconds_of
from meal_fast.config.model_shape import shape_of
from meal_fast.config.workload import work_of
from meal_fast.ops.gemm import linear
from meal_fast.training.batch import Batch, Task
from meal_fast.training.metrics import note_cost
from meal_fast.training.trainer import Trainer

ROUNDS = 9
ROWS, NUMBERS = 1024, 64 << 20


def best(work: Callable[[], object]) -> float:
    """Give the least seconds of ROUNDS calls, after one."""
    work()
    taken = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken)


def measured_card() -> tuple[float, float]:
    """Give FLOP/s of a product (1024, 1536) x (1536, 576) and bytes/s of reading 256 MiB."""
    x, weight, long = torch.randn(ROWS, 1536), torch.randn(576, 1536), torch.randn(NUMBERS)
    flops = 2 * ROWS * 1536 * 576 / best(lambda: linear(x, weight))
    return flops, 4 * NUMBERS / best(long.sum)


def main() -> None:
    """Measure, predict, print."""
    base = preset("quickstart")
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=3, help="meta-steps")
    add_options(parser, base, leave_out=("meta.steps", "warmup.steps"))
    found = vars(parser.parse_args())
    steps = found.pop("steps")
    found |= {"threads": found.get("threads", 1)}
    given = nested(found)
    given["meta"] = given.get("meta", {}) | {"steps": steps}
    given["warmup"] = {"steps": 0}
    config = from_dict(given, base)
    torch.set_num_threads(config.threads)
    if config.threads == 1:
        time.perf_counter = time.process_time  # the trainer's clock, and the sampler's
    flops, bandwidth = measured_card()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        lines: list[dict[str, Any]] = []
        trainer = Trainer(config, out, on_update=lines.append)
        prefixes: list[int] = []
        learn: Any = trainer.update_policy

        def watched(batch: Batch, tasks: Sequence[Task]) -> Any:
            prefixes.extend(map(len, batch.rolled.prefix))
            return learn(batch, tasks)

        trainer.update_policy = watched  # type: ignore[assignment]
        trainer.train()
        note_cost(out, trainer.policy.device)
        peak = json.loads((out / "cost.json").read_text())["peak_bytes"]
        saved = (out / "checkpoint.pt").stat().st_size
    answer = sum(x["tokens"] for x in lines) / (len(lines) * work_of(config).rows)
    work = work_of(config, statistics.mean(prefixes), answer)
    card = card_named("cpu", flops=flops, bandwidth=bandwidth)
    laid = layout(config, 1)
    said = cost(work, shape_of(config.policy.path), card, laid)
    row: dict[str, Any] = {
        "flops": flops, "bandwidth": bandwidth, "threads": config.threads,
        "prompt_tokens": work.prompt_tokens, "response_tokens": answer, "updates": len(lines),
    }  # fmt: skip
    print(f"card: {flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s, threads {config.threads}")
    print(f"lengths: {work.prompt_tokens:.1f} of a prefix, {answer:.1f} of an answer")
    print(f"{'of an update':<16}{'model':>10}{'median':>10}{'ratio':>7}{'least':>10}{'ratio':>7}")
    for ours, theirs in (("rollout", "rollout"), ("reward", "reward"), ("learn", "learn")):
        one = said.seconds[ours] / said.updates
        taken = [x["seconds"][theirs] for x in lines]
        middle, least = statistics.median(taken), min(taken)
        row[ours] = {"model": one, "median": middle, "least": least}
        print(
            f"{ours:<16}{seconds_of(one):>10}{seconds_of(middle):>10}{one / middle:>7.2f}"
            f"{seconds_of(least):>10}{one / least:>7.2f}"
        )
    for name, model, real in (
        ("memory", said.memory.most, peak),
        ("checkpoint", said.checkpoint, saved),
    ):
        row[name] = {"model": model, "measured": real}
        print(f"{name:<16}{size(model):>10}{size(real):>10}{model / real:>7.2f}")
    row |= {
        "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(), "load": os.getloadavg()[0],
    }  # fmt: skip
    print(json.dumps(row))


if __name__ == "__main__":
    main()
