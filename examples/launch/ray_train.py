"""Train with Ray Train: a worker a GPU, started again from the last checkpoint when one fails.

    python examples/launch/ray_train.py --workers 16 --gpu -- steering --out /shared/runs/steering

What stands behind `--` is given to meal_fast.train. --out is on a file system that all workers see.
Needs `pip install "ray[train]"`.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def work(config: dict[str, Any]) -> None:
    """Train in a worker: Ray has set RANK and the like, and made a process group.

    Raises RuntimeError for an exit code that is not 0, so that Ray sees it.
    """
    from meal_fast.train import main

    try:
        main([*config["argv"], "--resume-or-start"])
    except SystemExit as left:
        if left.code:
            raise RuntimeError(f"meal_fast.train ended with exit code {left.code}") from None


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2, metavar="N")
    parser.add_argument("--gpu", action="store_true", help="a GPU a worker")
    parser.add_argument("--restarts", type=int, default=3, metavar="N", help="after failures")
    parser.add_argument("--storage", metavar="DIR", help="Ray's own files (default: its own)")
    parser.add_argument("--timeout", type=int, default=1800, metavar="S", help="to find each other")
    parser.add_argument("argv", nargs="+", help="what meal_fast.train is given, behind --")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train on a cluster that runs already, else on this machine."""
    args = parsed(argv)
    backend = "cpu:gloo,cuda:nccl" if args.gpu else "gloo"
    trainer = TorchTrainer(
        work,
        train_loop_config={"argv": args.argv},
        torch_config=TorchConfig(backend=backend, timeout_s=args.timeout),
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=args.gpu),
        run_config=RunConfig(
            name="meal-fast",
            storage_path=args.storage,
            failure_config=FailureConfig(max_failures=args.restarts),
        ),
    )
    ray.init(ignore_reinit_error=True)
    trainer.fit()


if __name__ == "__main__":
    main()
