"""The command line, made from the dataclasses of config.py. Imports no torch: `--help` is instant.

    meal-fast train [PRESET] [--config FILE.toml] [--out DIR] [--section.option VALUE ...]

A preset gives way to the file, the file to the flags. Whatever is wrong is one line on stderr,
`meal-fast: error: ...`, and exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from .cards import Cards, add_cards, take_cards
from .config import Config, choices_of, from_dict, load_toml
from .errors import fail, known, nearest, one_line_errors, require_packages
from .options import (
    as_flags,
    dotted,
    nested,
    option_named,
    options,
    typed,
    typed_as,
    unit,
    values_of,
)
from .presets import PRESETS, preset
from .run_dir import read_config
from .trust import add_trust, check_trust
from .weights import parse_weights

# A command needs no other module of this room to read its arguments.
__all__ = [
    "DEFAULT_PRESET",
    "OneLineParser",
    "TrainArgs",
    "add_options",
    "add_trust",
    "as_flags",
    "check_trust",
    "fail",
    "known",
    "nearest",
    "nested",
    "one_line_errors",
    "option_named",
    "options",
    "parse_train",
    "parse_weights",
    "require_packages",
    "typed",
    "values_of",
]

DEFAULT_PRESET = "quickstart"


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations; an error is one line, with the nearest option.

    Started as `meal-fast NAME`, its usage says so, where `prog` is `python -m meal_fast.NAME`.
    """

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**kwargs, allow_abbrev=False)
        if Path(sys.argv[0]).name == "meal-fast":
            self.prog = self.prog.replace("python -m meal_fast.", "meal-fast ")

    def error(self, message: str) -> NoReturn:
        if message.endswith("required: RUN") and "--objectives" in self._option_string_actions:
            message += "; it comes before --objectives, which takes all that follows"
        fail(message)

    def parse_args(self, args=None, namespace=None):
        # Intermixed: argparse would otherwise take `--out DIR quickstart` for a surplus argument.
        found, surplus = self.parse_known_intermixed_args(args, namespace)
        if surplus:
            name = surplus[0].partition("=")[0]
            if name.startswith("-"):
                fail(f"unknown option {name}{nearest(name, list(self._option_string_actions))}")
            fail(f"unexpected argument {name!r}; see --help")
        return found


@dataclass(frozen=True)
class TrainArgs:
    """What `meal-fast train` is told beside the configuration."""

    out: Path  # the run folder; runs/PRESET unless named
    resume: bool  # go on with the run in `out`
    evaluate: bool  # sweep the preferences when training ends
    report: bool = True  # and write the report of it
    plan: bool = False  # say what the run would do and cost, and leave
    cards: Cards = field(default_factory=Cards)  # those of such a plan


def parse_train(argv: Sequence[str] | None = None) -> tuple[Config, TrainArgs]:
    """Read the train command line, without the program's name: the configuration, and the rest.

    With `--resume` and neither PRESET nor `--config`, the configuration is the run's own, whose
    objectives are held to `check_trust`. Raises ValueError for a wrong value and SystemExit(2) for
    a wrong option.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # Help shows the defaults of the preset that was named, so it is looked for before parsing.
    shown = next((a for a in argv if a in PRESETS), DEFAULT_PRESET)
    found = vars(_train_parser(shown).parse_args(argv))
    named, file, out = found.pop("PRESET", None), found.pop("config"), found.pop("out")
    args = {name: found.pop(name) for name in ("resume", "evaluate", "report", "plan")}
    args["cards"] = cards = take_cards(found)
    if cards != Cards() and not args["plan"]:
        fail("--cards, --card… and --node are of a plan: add --plan; a run takes what started it")
    trusted, either = found.pop("trust_run"), found.pop("resume_or_start")
    if named is not None:
        known("preset", named, PRESETS, "; for a file, --config")
    folder = Path(out or Path("runs", named or (Path(file).stem if file else DEFAULT_PRESET)))
    args["resume"] |= either and (folder / "config.json").exists()
    if args["resume"] and named is None and file is None:
        base = read_config(folder)
        repeated = {name: found.get(name) for name in ("objectives", "logger")}
        check_trust(folder, base, trusted=trusted, training=True, **repeated)
    else:
        base = preset(named or DEFAULT_PRESET)
    if file is not None:
        base = load_toml(file, base)
    return from_dict(nested(found), base), TrainArgs(out=folder, **args)


def _train_parser(shown: str) -> OneLineParser:
    parser = OneLineParser(
        prog="python -m meal_fast.train",
        usage="%(prog)s [PRESET] [--config FILE] [--out DIR] [--resume] "
        "[--section.option VALUE ...]",
        description="Train one language model that its user steers between objectives.",
        epilog="A preset gives way to the file, the file to the flags.\n"
        f"The defaults shown are those of the preset {shown}.",
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=34, width=110
        ),
    )
    parser.add_argument(
        "PRESET", nargs="?", help=f"{', '.join(PRESETS)} (default: {DEFAULT_PRESET})"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="options in TOML, [section] option = value"
    )
    parser.add_argument("--out", metavar="DIR", help="the run folder (default: runs/PRESET)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in DIR")
    parser.add_argument(
        "--resume-or-start",
        action="store_true",
        help="the same where there is one, else start it: for what is started again by a machine",
    )
    parser.add_argument(
        "--no-evaluate", dest="evaluate", action="store_false", help="train only, without a report"
    )
    parser.add_argument(
        "--no-report", dest="report", action="store_false", help="evaluate, but draw nothing"
    )
    parser.add_argument(
        "--plan", action="store_true", help="say what the run would do and cost, and do nothing"
    )
    add_trust(parser, objectives=False)
    add_cards(parser)
    add_options(parser, preset(shown))
    return parser


def add_options(
    parser: argparse.ArgumentParser, shown: Config, leave_out: Container[str] = ()
) -> None:
    """Add every option of a Config but those of `leave_out`, with the defaults of `shown`."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for section, each, value in options(shown):
        option = dotted(section, each)
        if option in leave_out:
            continue
        if section not in groups:
            groups[section] = parser.add_argument_group(section or "run")
        groups[section].add_argument(
            f"--{option}",
            dest=option,
            default=argparse.SUPPRESS,
            type=functools.partial(typed_as, kind=unit(each)),
            **_shape(each, value),
        )


def _shape(field: dataclasses.Field[Any], value: Any) -> dict[str, Any]:
    """Give the argparse arguments that depend on the field's type."""
    kind = str(field.type)
    many = kind.startswith("tuple")
    choices = choices_of(kind)
    if kind == "bool":
        choices, value = ("true", "false"), str(value).lower()
    metavar = "{" + ",".join(choices) + "}" if choices else unit(field).upper()
    default = " ".join(map(str, value)) if many else str(value)
    text = str(field.metadata["help"]) + f" (default: {default or 'empty'})"
    # "*", not "+": an empty tuple is a value, and config.py says what is wrong with a short one.
    return {"metavar": metavar, "help": text.replace("%", "%%")} | ({"nargs": "*"} if many else {})
