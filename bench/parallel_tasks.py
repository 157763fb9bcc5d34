"""A Reptile meta-step with its tasks in one batch against one after the other, in turn (A B A B).

    python -m bench.parallel_tasks --steps 3

SmolLM2-135M with LoRA, rank 16, B_w tasks of 2 inner updates each, GRPO with beta = 0.1; both sides
sample the same tokens, and no token ends a response. A row a case goes to bench/results/cpu.jsonl.
Cases (prompts x samples of a task, new tokens):

    few         1 x 8, 32
    bps         2 x 8, 64: the prompts and samples of the preset hh-qwen2, shorter responses
    quickstart  4 x 8, 24: the preset of that name
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import rows
from bench.endless import endless
from meal_fast.config.config import Config, from_dict
from meal_fast.config.presets import preset
from meal_fast.training.trainer import Trainer

CASES = {"few": (1, 8, 32), "bps": (2, 8, 64), "quickstart": (4, 8, 24)}
SIDES = ("sequential", "parallel")


def vowels(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Costs nothing, and differs between the samples of a prompt."""
    return [sum(c in "aeiou" for c in r) / max(len(r), 1) for r in responses]


def brief(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [1 / (1 + len(r)) for r in responses]


def config_of(case: str, tasks: int, steps: int, model: str | None) -> Config:
    prompts, samples, new = CASES[case]
    changes: dict[str, Any] = {
        "objectives": ["vowels=bench.parallel_tasks:vowels", "brief=bench.parallel_tasks:brief"],
        "policy": {"path": model} if model else {},
        "rollout": {"prompts": prompts, "samples": samples, "max_new_tokens": new},
        "warmup": {"steps": 0},
        "preference": {"alpha": 0.2, "rotate": True, "per_prompt": 1},
        "score": {"calibration": 2},
        "grpo": {"beta": 0.1},
        "meta": {"tasks": tasks, "n_inner": 2, "steps": steps},
    }
    return from_dict(changes, preset("quickstart"))


def side_of(config: Config, parallel: bool, out: Path) -> Trainer:
    meta = dataclasses.replace(config.meta, parallel=parallel)
    threads = torch.get_num_threads()
    trainer = Trainer(dataclasses.replace(config, meta=meta, threads=threads), out)
    endless(trainer.policy)
    return trainer


def meta_step(trainer: Trainer) -> dict[str, Any]:
    """One meta-step: seconds, those of its parts, and the sampled tokens' number."""
    lines: list[dict[str, Any]] = []
    trainer.on_update = lines.append
    begin = time.perf_counter()
    trainer.meta_step()
    seconds = time.perf_counter() - begin
    trainer.step += 1
    parts = {name: sum(line["seconds"][name] for line in lines) for name in lines[0]["seconds"]}
    return {
        "seconds": seconds,
        "parts": {name: round(value, 3) for name, value in parts.items()},
        "tokens": sum(line["tokens"] for line in lines),
        "losses": [line["loss"] for line in lines],
    }


def measured(case: str, args: argparse.Namespace) -> dict[str, Any]:
    config = config_of(case, args.tasks, args.steps + 1, args.model)
    before = rows.machine()
    steps: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        sides = {side: side_of(config, side == "parallel", Path(folder) / side) for side in SIDES}
        for number in range(args.steps + 1):  # the first warms up
            for side, trainer in sides.items():
                steps[side].append(meta_step(trainer))
                print(f"{case}, step {number}, {side}: {steps[side][-1]}", flush=True)
    found: dict[str, Any] = {}
    for side, ran in steps.items():
        warm = ran[1:]
        found[side] = {
            "median_seconds": round(statistics.median(s["seconds"] for s in warm), 3),
            "seconds": [round(s["seconds"], 3) for s in warm],
            "parts": [s["parts"] for s in warm],
            "tokens": warm[-1]["tokens"],
        }
    sequential, parallel = (found[side] for side in SIDES)
    prompts, samples, new = CASES[case]
    return {
        "bench": "parallel-tasks",
        "date": rows.now(),
        "commit": rows.commit(),
        "command": f"python -m bench.parallel_tasks --steps {args.steps} --tasks {args.tasks} "
        f"--threads {args.threads} --cases {case}"
        + (f" --model {args.model}" if args.model else ""),
        "machine": before,
        "threads": args.threads,
        "versions": rows.versions("torch", "transformers", "peft"),
        "case": f"{case}: B_w={args.tasks}, {prompts} x {samples} x {new} tokens",
        "speedup": round(sequential["median_seconds"] / parallel["median_seconds"], 2),
        **found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", help="a transformers folder (default: the packaged model)")
    parser.add_argument("--cases", nargs="+", choices=tuple(CASES), default=list(CASES))
    parser.add_argument("--tasks", type=int, default=4, help="preferences of a meta-step, B_w")
    parser.add_argument(
        "--steps", type=int, default=3, help="meta-steps of each side; one more warms up"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--results", type=Path, default=rows.RESULTS / "cpu.jsonl")
    args = parser.parse_args()
    if args.steps < 1 or args.tasks < 2:
        parser.error("--steps must be at least 1 and --tasks at least 2")
    torch.set_num_threads(args.threads)
    for case in args.cases:
        row = measured(case, args)
        rows.append(args.results, [row])
        spent = {side: row[side]["median_seconds"] for side in SIDES}
        print(f"{row['case']}: {json.dumps(spent)} s a meta-step, {row['speedup']} times as fast")


if __name__ == "__main__":
    main()
