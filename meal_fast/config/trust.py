"""What somebody's run folder may make us do: which of its options run code or send texts away.

A folder is data. What its config.json names is taken only where it can do no more than be read:
exact rewards, packaged models, hub names, folders of safetensors. The rest needs the user's word,
given on the command line: docs/security.md. Imports no torch.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from urllib.parse import unquote

from meal_fast.common import printable

from .config import Config
from .model_files import check_model_files
from .sources import is_outside

# Python objectives that are this package's own: functions of two lists of texts, nothing else.
OWN = frozenset(f"meal_fast.data.measures:{name}" for name in ("brief", "detailed"))
SENDS = ("wandb", "trackio")  # loggers that have somewhere to send to
_INERT = re.compile(r"(world|packaged|meal_fast\.worlds):[\w.-]+")
_LONGEST = 120  # characters of a source in a message


def add_trust(parser: argparse.ArgumentParser, *, objectives: bool = True) -> None:
    """Add `--trust-run`, and `--objectives` where a command has no such option of its own."""
    parser.add_argument(
        "--trust-run",
        action="store_true",
        help="run the Python objectives, and ask the reward servers, that RUN's config.json names",
    )
    if objectives:
        parser.add_argument(
            "--objectives",
            nargs="*",
            metavar="NAME=SOURCE",
            help="the same for those that are repeated here, behind RUN, as config.json has them",
        )


def check_trust(
    run: Path,
    config: Config,
    *,
    trusted: bool,
    objectives: Collection[str] | None = None,
    training: bool = False,
    logger: str | None = None,
) -> None:
    """Raise ValueError where `config`, which was read from `run`, asks for more than data.

    trusted: the user said `--trust-run`. objectives, logger: what else the user said. training:
    whether the logger will be used.
    """
    strange = [spec for spec in objectives or () if spec not in config.objectives]
    if strange:
        raise ValueError(
            f"--objectives: {_short(strange[0])} is not what config.json of {str(run)!r} says; "
            "repeat what is there"
        )
    if trusted:
        return
    asked = [s for s in config.objectives if s not in (objectives or ()) and _does(s)]
    if asked:
        raise ValueError(
            f"RUN={str(run)!r}: its config.json has objectives that {_does(asked[0])}: "
            f"{', '.join(map(_short, asked))}; where you know what they do, repeat them behind "
            "RUN, --objectives NAME=SOURCE, or add --trust-run"
        )
    if training and config.logger in SENDS and logger is None:
        raise ValueError(
            f"RUN={str(run)!r}: its config.json has logger={config.logger!r}, which sends prompts "
            f"and answers away; add --logger {config.logger}, --logger none, or --trust-run"
        )
    for spec in config.objectives:
        for folder in () if spec in (objectives or ()) else _folders(spec):
            remedy = "repeat it, --objectives NAME=SOURCE, or add --trust-run"
            check_model_files(folder, f"objective {_short(spec)}", remedy)


def asks_for_trust(objectives: Collection[str], logger: str) -> bool:
    """Whether a run is gone on with only where the user trusts it."""
    return logger in SENDS or any(map(_does, objectives))


def _does(spec: str) -> str:
    """What an objective does beside reading a model's weights; "" for nothing."""
    source = spec.partition("=")[2].partition("?")[0]
    if re.match(r"\w+://", source):
        return "send prompts and answers to a server"
    if source in OWN or _INERT.fullmatch(source):
        return ""
    if is_outside(source):  # it is imported, whatever lies in the folder under that name
        return "are Python code"
    # Whatever else has a colon, or is a Python file, is taken for code: better once too often.
    code = ":" in source or source.endswith(".py")
    return "are Python code" if code and not Path(source).is_dir() else ""


def _folders(spec: str) -> Sequence[Path]:
    """The model folders of this machine that an objective leads to."""
    source, _, query = spec.partition("=")[2].partition("?")
    given = (part.partition("=") for part in query.split("&"))
    paths = [unquote(text) for key, _, text in given if key == "path"]
    return [Path(p) for p in (source, *paths) if p and Path(p).is_dir()]


def _short(spec: str) -> str:
    text = printable(spec)
    return repr(text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…")
