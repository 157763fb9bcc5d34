"""The sampler against transformers' `generate`: alternating processes, medians, one row a case.

    python -m bench.ab_generate --rounds 2

What the cases are: bench/sampler_side.py. The rows go to bench/results/cpu.jsonl.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from bench import rows
from bench.ab_trl import Lines, one_process

HERE = Path(__file__).resolve().parent
SIDES = ("meal-fast", "generate")


def summary(rounds: list[Lines]) -> dict[str, Any]:
    runs = [lines[-1] for lines in rounds]
    seconds = statistics.median(run["seconds"] for run in runs)
    last = runs[-1]
    return {
        "median_seconds": seconds,
        "seconds": [run["seconds"] for run in runs],
        "tokens": last["tokens"],
        "tokens_per_second": round(last["tokens"] / seconds, 1),
        "prefill_tokens": last["prefill_tokens"],
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
        "added_bytes": max(run["peak_rss_bytes"] - run["loaded_bytes"] for run in runs),
        "versions": last["versions"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a transformers folder (default: the packaged model)")
    parser.add_argument("--cases", nargs="+", default=["long", "short", "sweep"])
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side: A B A B")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "cpu.jsonl")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if args.model is None:
        from meal_fast.data.assets import asset

        args.model = str(asset("smollm2-135m"))
    for case in args.cases:
        before = rows.machine()
        rounds: dict[str, list[Lines]] = {side: [] for side in SIDES}
        for number in range(args.rounds):
            for side in SIDES:
                options = ["--side", side, "--case", case, "--model", args.model]
                options += ["--threads", str(args.threads)]
                script = HERE / "sampler_side.py"
                rounds[side].append(one_process(sys.executable, script, options, args.threads))
                print(f"{case}, round {number + 1}, {side}: {rounds[side][-1][-1]}", flush=True)
        ours, theirs = (summary(rounds[side]) for side in SIDES)
        row = {
            "bench": "sampler",
            "date": rows.now(),
            "commit": rows.commit(),
            "command": f"python -m bench.ab_generate --rounds {args.rounds} --cases {case}",
            "machine": before,
            "threads": args.threads,
            "case": case,
            "speedup": round(theirs["median_seconds"] / ours["median_seconds"], 2),
            "memory_ratio": round(ours["peak_rss_bytes"] / theirs["peak_rss_bytes"], 3),
            "added_memory_ratio": round(ours["added_bytes"] / theirs["added_bytes"], 3),
            "meal-fast": ours,
            "generate": theirs,
        }
        rows.append(args.results, [row])
        print(
            f"{case}: {row['speedup']} times the speed, {row['memory_ratio']} of the peak memory "
            f"({row['added_memory_ratio']} of what is added to the loaded model)",
            flush=True,
        )


if __name__ == "__main__":
    main()
