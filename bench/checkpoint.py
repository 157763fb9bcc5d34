"""What the training waits for at a checkpoint, and when that is on the disk: one JSON row.

    python bench/checkpoint.py --tuning lora     SmolLM2-135M, rank 16, one thread
    python bench/checkpoint.py --tuning full     all its parameters

One meta-step is learnt, then the same state is saved again and again; between, each is waited for.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from meal_fast.config.config import from_dict
from meal_fast.config.presets import preset
from meal_fast.training.trainer import Trainer

SMALL = {
    "threads": 1,
    "meta": {"steps": 2, "tasks": 1},
    "rollout": {"prompts": 1, "samples": 2, "max_new_tokens": 4},
    "score": {"calibration": 2},
    "warmup": {"steps": 0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tuning", choices=("lora", "full"), default="lora")
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    config = from_dict(SMALL | {"policy": {"tuning": args.tuning}}, preset("quickstart"))
    with tempfile.TemporaryDirectory(dir=".") as folder:
        out = Path(folder) / "run"
        trainer = Trainer(config, out)
        trainer.meta_step()
        waited, done = [], []
        for _ in range(args.rounds):
            trainer.step += 1
            began = time.perf_counter()
            trainer.save_checkpoint()
            waited.append(time.perf_counter() - began)
            trainer.checkpoints.finish()
            done.append(time.perf_counter() - began)
        trainer.checkpoints.close()
        last = out / "ckpt" / (out / "ckpt" / "LATEST").read_text().strip()
        row = {
            "bench": "checkpoint",
            "tuning": args.tuning,
            "trained": sum(p.numel() for p in trainer.policy.trainable),
            "bytes": sum(p.stat().st_size for p in last.iterdir()),
            "waited_s": [round(x, 4) for x in waited],
            "on_disk_s": [round(x, 4) for x in done],
            "median_waited_s": round(statistics.median(waited), 4),
            "median_on_disk_s": round(statistics.median(done), 4),
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
        }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
