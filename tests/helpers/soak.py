"""A tiny run of 200 meta-steps: what the process holds after every tenth, as JSON on stdout."""

import gc
import json
import os
import sys
import threading
from pathlib import Path

from meal_fast.config.config import from_dict
from meal_fast.config.presets import preset
from meal_fast.training.trainer import Trainer

OPTIONS = {
    "meta": {"steps": 200},
    "rollout": {"prompts": 1, "samples": 4},
    "score": {"calibration": 4},
    "checkpoint_every": 10,
}


def resident() -> int:
    """Bytes of memory that are in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    trainer = Trainer(from_dict(OPTIONS, preset("tiny")), Path(sys.argv[1]))
    seen = []

    def look(line: dict) -> None:
        if line["update"] % 40 == 39:
            gc.collect()
            open_files = len(os.listdir("/proc/self/fd"))
            objects = len(gc.get_objects())
            seen.append((resident(), objects, open_files, threading.active_count()))

    trainer.on_update = look
    assert trainer.train()
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
