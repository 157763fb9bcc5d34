"""One GRPO step, meal-fast against TRL: alternating processes, medians, ratios, one JSON row.

    python -m bench.ab_trl --steps 3 --rounds 2

Each round starts a process of meal-fast and one of TRL on the same model with the same threads. The
first step of a process warms up and is left out. The row goes to bench/results/cpu.jsonl.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import rows

HERE = Path(__file__).resolve().parent
SCRIPTS = {"meal-fast": HERE / "meal_step.py", "trl": HERE / "trl_step.py"}

Lines = list[dict[str, Any]]


def one_process(python: str, script: Path, options: list[str], threads: int) -> Lines:
    """The JSON lines that one side prints; its own stderr passes through when it fails."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE.parent), env.get("PYTHONPATH"))))
    command = [python, str(script), *options]
    ran = subprocess.run(command, env=env, capture_output=True, text=True)
    if ran.returncode:
        sys.exit(f"{ran.stderr}\n{shlex.join(command)} failed with {ran.returncode}")
    # A trainer may print its own summary between ours.
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith('{"framework"')]


def summary(rounds: list[Lines]) -> dict[str, Any]:
    """Median seconds of a step after the first of its process, and the largest peak."""
    steps = [[line for line in lines if "seconds" in line] for lines in rounds]
    ends = [line for lines in rounds for line in lines if "peak_rss_bytes" in line]
    warm = [line["seconds"] for lines in steps for line in lines if line["step"] > 1]
    return {
        "median_step_seconds": round(statistics.median(warm), 3),
        "step_seconds": [[line["seconds"] for line in lines] for lines in steps],
        "tokens_per_step": sorted({line["tokens"] for lines in steps for line in lines}),
        "shares": [lines[-1]["shares"] for lines in steps if "shares" in lines[-1]],
        "peak_rss_bytes": max(line["peak_rss_bytes"] for line in ends),
        "versions": ends[-1]["versions"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a transformers folder (default: the packaged model)")
    parser.add_argument("--steps", type=int, default=3, help="of each process; one warms up")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side: A B A B")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trl-python", default=sys.executable, help="an interpreter that has TRL")
    parser.add_argument(
        "--trl-options", default="", help="passed on, e.g. '--gradient-checkpointing off'"
    )
    parser.add_argument("--meal-options", default="", help="passed on, e.g. '--micro-tokens 2048'")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "cpu.jsonl")
    args = parser.parse_args()
    if args.steps < 2 or args.rounds < 1:
        parser.error("--steps must be at least 2 (the first warms up) and --rounds at least 1")
    if args.model is None:
        from meal_fast.data.assets import asset

        args.model = str(asset("smollm2-135m"))
    before = rows.machine()
    common = ["--model", args.model, "--steps", str(args.steps), "--threads", str(args.threads)]
    extra = {"meal-fast": args.meal_options, "trl": args.trl_options}
    python = {"meal-fast": sys.executable, "trl": args.trl_python}
    rounds: dict[str, list[Lines]] = {side: [] for side in SCRIPTS}
    for number in range(args.rounds):
        for side, script in SCRIPTS.items():
            options = common + shlex.split(extra[side])
            rounds[side].append(one_process(python[side], script, options, args.threads))
            last = [row["seconds"] for row in rounds[side][-1] if "seconds" in row]
            print(f"round {number + 1} {side}: {last} s", flush=True)
    ours, theirs = summary(rounds["meal-fast"]), summary(rounds["trl"])
    row = {
        "bench": "grpo-step",
        "date": rows.now(),
        "commit": rows.commit(),
        "command": shlex.join(
            ["python", "-m", "bench.ab_trl", "--steps", str(args.steps)]
            + ["--rounds", str(args.rounds), "--threads", str(args.threads)]
            + (["--trl-options", args.trl_options] if args.trl_options else [])
            + (["--meal-options", args.meal_options] if args.meal_options else [])
        ),
        "machine": before,
        "threads": args.threads,
        "time_ratio": round(ours["median_step_seconds"] / theirs["median_step_seconds"], 3),
        "memory_ratio": round(ours["peak_rss_bytes"] / theirs["peak_rss_bytes"], 3),
        "meal-fast": ours,
        "trl": theirs,
    }
    rows.append(args.results, [row])
    print(f"{'':10}{'s/step':>9}{'peak GB':>9}")
    for side, values in (("meal-fast", ours), ("trl", theirs)):
        peak = values["peak_rss_bytes"] / 1e9
        print(f"{side:10}{values['median_step_seconds']:9.1f}{peak:9.2f}")
    print(f"{'ratio':10}{row['time_ratio']:9.2f}{row['memory_ratio']:9.2f}")


if __name__ == "__main__":
    main()
