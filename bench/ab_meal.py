"""What the preference-weight-net and its relabelling cost beside plain rejection-sampled SFT.

    python -m bench.ab_meal --rounds 2

Recipe `meal` with its defaults against the static baseline (lambda = 1, rho = 1: no net, the asked
preference stays), on the quickstart's model, prompts and reward models; alternating (A B A B), each
a new run of two meta-steps of 4 updates. The first update of a run, which warms up, is left out;
the net is updated every second policy update here, where the default is every eighth. The row goes
to bench/results/cpu.jsonl.
"""

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path

from bench import rows
from meal_fast.config.config import Config, MealConfig, PreferenceConfig, WarmupConfig
from meal_fast.config.presets import preset
from meal_fast.training.trainer import Trainer

SIDES = {
    "meal": MealConfig(every=2),
    "static": MealConfig(lam=1.0, rho=1.0),
}


def run(config: Config) -> list[float]:
    """Seconds of each update."""
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, Path(folder) / "run")
        trainer.on_update = lambda metrics: seconds.append(sum(metrics["seconds"].values()))
        trainer.train()
    return seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="meta-steps a run, of 4 updates")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=rows.RESULTS / "cpu.jsonl")
    args = parser.parse_args()
    quick = preset("quickstart")
    base = dataclasses.replace(
        quick,
        recipe="meal",
        threads=args.threads,
        warmup=WarmupConfig(),
        preference=PreferenceConfig(alpha=0.2, rotate=True),
        rollout=dataclasses.replace(quick.rollout, prompts=4, samples=16),
        meta=dataclasses.replace(quick.meta, steps=args.steps, tasks=2),
        score=dataclasses.replace(quick.score, calibration=32),
    )
    before = rows.machine()
    seconds: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    for number in range(args.rounds):
        for side, options in SIDES.items():
            seconds[side].append(run(dataclasses.replace(base, meal=options)))
            print(f"round {number + 1}, {side}: {[round(s, 2) for s in seconds[side][-1]]}")
    medians = {s: statistics.median(x for part in seconds[s] for x in part) for s in SIDES}
    row = {
        "bench": "meal-step",
        "date": rows.now(),
        "commit": rows.commit(),
        "command": f"python -m bench.ab_meal --rounds {args.rounds} --steps {args.steps}",
        "machine": before,
        "threads": args.threads,
        "median_seconds": medians,
        "ratio": round(medians["meal"] / medians["static"], 3),
        "versions": rows.versions("torch", "transformers"),
    }
    rows.append(args.results, [row])
    print(f"meal {medians['meal']:.2f} s, static {medians['static']:.2f} s: {row['ratio']}")


if __name__ == "__main__":
    main()
