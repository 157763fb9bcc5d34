"""What every committed row of a measurement says: machine, commit, date; and the file of rows."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def machine() -> dict[str, Any]:
    """Name and number of the CPUs that this process may use, and how busy they are."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((s.partition(":")[2].strip() for s in lines if "model name" in s), model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": model, "cores": cores, "load_before": round(os.getloadavg()[0], 2)}


def commit(root: Path = HERE.parent) -> str:
    """Name the commit measured, with `+` where tracked files were changed since.

    Without git, or outside of a repository: what MEAL_FAST_COMMIT says, or else the file COMMIT
    beside the README, which whoever copies the files can write; or else "unknown".
    """

    def git(*words: str) -> str:
        ran = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
        return ran.stdout.strip()

    try:
        # A copy of the files may lie inside another repository.
        if Path(git("rev-parse", "--show-toplevel")).resolve() == root.resolve():
            changed = git("status", "--porcelain", "--untracked-files=no")
            return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    if told := os.environ.get("MEAL_FAST_COMMIT"):
        return told
    file = root / "COMMIT"
    return file.read_text(encoding="utf-8").strip() if file.is_file() else "unknown"


def slug(device: str) -> str:
    """A device's name as a file's: `h100-80gb-hbm3` of "NVIDIA H100 80GB HBM3"."""
    words = re.findall(r"[a-z0-9]+", device.lower())
    return "-".join([w for w in words if w not in ("nvidia", "geforce")] or words)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def versions(*packages: str) -> dict[str, str]:
    """Of those packages that are installed."""
    found = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    return {p: found[p] for p in ("python", *packages) if p in found} | {
        "python": platform.python_version()
    }


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
