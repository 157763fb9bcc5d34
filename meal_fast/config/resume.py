"""The command that goes on with a run, as it can be pasted into a shell. Imports no torch."""

from __future__ import annotations

import shlex
from pathlib import Path

from meal_fast.common import parse_json

from .config import Config
from .trust import asks_for_trust


def resume_command(run: Path, config: Config | None = None) -> str:
    """Give the command that goes on with a run, with the flag that the user's own run may need.

    config: the run's; None: as its config.json says, where that can be read.
    """
    if config is None:
        objectives, logger = _named(run)
    else:
        objectives, logger = config.objectives, config.logger
    out = f"./{run}" if str(run).startswith("-") else str(run)  # no option
    flag = " --trust-run" if asks_for_trust(objectives, logger) else ""
    return f"python -m meal_fast.train --resume --out {shlex.quote(out)}{flag}"


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
