"""The command that goes on with a run, as it can be pasted into a shell. Imports no torch."""

from __future__ import annotations

import shlex
from pathlib import Path

from meal_fast.common import parse_json

from .trust import asks_for_trust

TRUST = " --trust-run"


def resume_command(run: Path) -> str:
    """Give the command that goes on with a run of the user's own, with the flag that it may need.

    That is as its config.json says, where that can be read.
    """
    out = f"./{run}" if str(run).startswith("-") else str(run)  # no option
    flag = TRUST if asks_for_trust(*_named(run)) else ""
    return f"python -m meal_fast.train --resume --out {shlex.quote(out)}{flag}"


def how_to_finish(run: Path) -> str:
    """Give the same for a run that may be a stranger's: trust is not put where it is pasted."""
    command = resume_command(run)
    if not command.endswith(TRUST):
        return f"`{command}`"
    return f"`{command.removesuffix(TRUST)}`, and{TRUST} if the run is your own"


def _named(run: Path) -> tuple[tuple[str, ...], str]:
    try:
        values = parse_json((run / "config.json").read_bytes())
    except (OSError, ValueError):
        return (), ""
    values = values if isinstance(values, dict) else {}
    objectives, logger = values.get("objectives"), values.get("logger")
    objectives = objectives if isinstance(objectives, list) else []
    named = tuple(spec for spec in objectives if isinstance(spec, str))
    return named, logger if isinstance(logger, str) else ""
