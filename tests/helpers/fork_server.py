"""Commands of meal_fast in processes that have everything imported: `python -m` this, and ask.

A line of standard input is a JSON list: the command and its arguments. The answer is the child's
number, and when it has ended a second line with its exit status.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.processes import ENVIRONMENT, ROOT


class ForkServer:
    """Start commands in children of one process, whose imports they share."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.fork_server", str(log)],
            cwd=ROOT,
            env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def start(self, command: str, *argv: str) -> int:
        """Start a command; its process's number."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, *argv]) + "\n")
        self._process.stdin.flush()
        return int(self._line())

    def wait(self) -> int:
        """Wait for the command that was started: its exit code, or minus the signal's number."""
        return int(self._line())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def main() -> None:
    for name in ("train", "evaluate", "training.trainer", "evaluation.evaluator",
                 "evaluation.report", "evaluation.run_plots"):  # fmt: skip
        importlib.import_module(f"meal_fast.{name}")
    for name in ("peft", "matplotlib.pyplot", "moocore", "transformers.models.llama"):
        importlib.import_module(name)
    answer, log = os.dup(1), os.open(sys.argv[1], os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.write(answer, b"ready\n")
    for line in sys.stdin:
        command, *argv = json.loads(line)
        child = os.fork()
        if not child:
            os.dup2(log, 1)
            os.dup2(log, 2)
            try:
                importlib.import_module(f"meal_fast.{command}").main(argv)
            except SystemExit as stop:
                sys.stdout.flush()
                os._exit(int(stop.code or 0))
            sys.stdout.flush()
            os._exit(0)
        os.write(answer, f"{child}\n".encode())
        _, status = os.waitpid(child, 0)
        os.write(answer, f"{os.waitstatus_to_exitcode(status)}\n".encode())


if __name__ == "__main__":
    main()
