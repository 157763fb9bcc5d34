"""Plant faults in copies of the kernels and see whether their tests notice: `make mutate`.

    python -m tools.mutate [text ...]       only the faults whose line contains one of these

Each fault is a text of a file and what takes its place. The sources are copied to a temporary
folder, the fault is put in, and the kernel's own tests run there. "caught" is a failed test or a
crash; exit status 1 when a fault is missed, or when the tests fail without any.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tools.faults import FAULTS, Fault

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("kernels", "csrc", "meal_fast", "tests", "tools", "pyproject.toml")
PYTEST = ("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--hypothesis-profile=unshrunk")
SELECTED = ("-m", "not gpu and not slow")


def run(fault: Fault | None, tests: list[str]) -> tuple[int, str]:
    """(pytest's exit status, its output) on a copy of the sources with this fault."""
    with tempfile.TemporaryDirectory(prefix="meal-fast-mutate-") as folder:
        for name in COPIED:
            source, copy = ROOT / name, Path(folder) / name
            if source.is_dir():
                shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy)
        if fault is not None:
            path = Path(folder) / fault.file
            path.write_text(fault.planted(path.read_text()))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([folder, *sys.path[1:]])}
        command = [sys.executable, *PYTEST, *SELECTED, *tests]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr


def verdict(status: int) -> str:
    """What pytest's exit status says: 1 is a failed test, below 0 a crash."""
    if status == 0:
        return "MISSED"
    # Anything else (no tests, a usage error) shows that the fault was not tried.
    return "caught" if status == 1 or status < 0 else "BROKEN"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.mutate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("text", nargs="*")
    wanted = parser.parse_args().text
    faults = [
        f for f in FAULTS if not wanted or any(text in f"{f.file} {f.what}" for text in wanted)
    ]
    if not faults:
        parser.error(f"no fault's line contains {' or '.join(wanted)}")
    status, output = run(None, sorted({fault.tests for fault in faults}))
    if status:
        print(output)
        print("the tests fail without a fault")
        return 1
    seen: list[str] = []
    for fault in faults:
        begin = time.monotonic()
        seen.append(verdict(run(fault, [fault.tests])[0]))
        took = time.monotonic() - begin
        print(f"{seen[-1]}  {took:5.1f} s  {fault.file}  {fault.what}", flush=True)
    print(f"{seen.count('caught')} of {len(seen)} caught")
    return int(seen.count("caught") < len(seen))


if __name__ == "__main__":
    sys.exit(main())
