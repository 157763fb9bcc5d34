"""The command line, made from the dataclasses of config.py. Imports no torch: `--help` is instant.

    python -m meal_fast.train [PRESET] [--config FILE.toml] [--out DIR] [--section.option VALUE ...]

A preset gives way to the file, the file to the flags. Whatever is wrong is one line on stderr,
`meal-fast: error: ...`, and exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from meal_fast.common import off_simplex

from .config import Config, choices_of, from_dict, load_toml
from .presets import PRESETS, preset
from .run_dir import read_config

DEFAULT_PRESET = "quickstart"


def fail(message: object) -> NoReturn:
    """Print one line, `meal-fast: error: message`, on stderr and leave with exit code 2."""
    print("meal-fast: error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def one_line_errors(main: Callable[..., None]) -> Callable[..., None]:
    """A `main` whose ValueError is what the user did wrong: one line on stderr, exit code 2.

    So is a package that is not installed. With MEAL_FAST_TRACEBACK set in the environment the
    traceback is kept.
    """

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            main(*args, **kwargs)
        except ValueError as error:
            if os.environ.get("MEAL_FAST_TRACEBACK"):
                raise
            fail(error)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package in ("", "meal_fast") or os.environ.get("MEAL_FAST_TRACEBACK"):
                raise
            fail(f"{package} is not installed: pip install {PACKAGES.get(package, package)}")

    return wrapped


# What a module's package is called, where it is not the module's name.
PACKAGES = {"yaml": "PyYAML"}


def require_packages(what: str, *names: str, then: str) -> None:
    """Raises ValueError where a package that `what` needs is not installed.

    Called before anything is computed that would be lost. `then`: the command that goes on.
    """
    for name in names:
        try:
            there = importlib.util.find_spec(name) is not None
        except ValueError:  # what was imported as something without a specification
            there = False
        if not there:
            package = PACKAGES.get(name, name)
            raise ValueError(
                f"{name} is not installed, and {what} needs it: pip install {package}, then {then}"
            )


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser without abbreviations; an error is one line, with the nearest option."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
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


def nearest(name: str, known: Sequence[str]) -> str:
    # People leave the section out more often than they misspell: --steps is --meta.steps.
    last = name.lstrip("-").rpartition(".")[2].replace("-", "_")
    same = [k for k in known if k.lstrip("-").rpartition(".")[2] == last]
    near = same or difflib.get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.6)
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else "; see --help"


@dataclass(frozen=True)
class TrainArgs:
    """What `python -m meal_fast.train` is told beside the configuration."""

    out: Path  # the run folder; runs/PRESET unless named
    resume: bool  # go on with the run in `out`
    evaluate: bool  # sweep the preferences when training ends
    report: bool = True  # and write the report of it


def parse_train(argv: Sequence[str] | None = None) -> tuple[Config, TrainArgs]:
    """The configuration and the rest of the train command line; `argv` excludes the program name.

    With `--resume` and neither PRESET nor `--config`, the configuration is the run's own. Raises
    ValueError for a wrong value and SystemExit(2) for a wrong option.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # Help shows the defaults of the preset that was named, so it is looked for before parsing.
    shown = next((a for a in argv if a in PRESETS), DEFAULT_PRESET)
    found = vars(_train_parser(shown).parse_args(argv))
    named, file, out = found.pop("PRESET", None), found.pop("config"), found.pop("out")
    args = {name: found.pop(name) for name in ("resume", "evaluate", "report")}
    if named is not None:
        known("preset", named, PRESETS, "; for a file, --config")
    folder = Path(out or Path("runs", named or (Path(file).stem if file else DEFAULT_PRESET)))
    if args["resume"] and named is None and file is None:
        base = read_config(folder)
    else:
        base = preset(named or DEFAULT_PRESET)
    if file is not None:
        base = load_toml(file, base)
    return from_dict(nested(found), base), TrainArgs(out=folder, **args)


def known(what: str, name: str, names: Iterable[str], more: str = "") -> None:
    """Raises ValueError, with the nearest of `names`, where `name` is none of them."""
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{what}={name!r}: unknown{hint} ({what}s: {', '.join(names)}{more})")


def nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """{"section.option": value} as the nested tables that `config.from_dict` reads."""
    tables: dict[str, Any] = {}
    for option, value in options.items():
        section, _, name = option.rpartition(".")
        (tables.setdefault(section, {}) if section else tables)[name] = value
    return tables


def as_flags(config: Config, base: Config) -> list[str]:
    """The command line that makes `config` of the preset `base`: every option that differs."""
    flags: list[str] = []
    before = values_of(base)
    for option, value in values_of(config).items():
        if value == before[option]:
            continue
        if isinstance(value, tuple):
            flags += [f"--{option}", *map(str, value)]
        else:
            flags.append(f"--{option}={str(value).lower() if isinstance(value, bool) else value}")
    return flags


def parse_weights(text: str, names: Sequence[str]) -> tuple[float, ...]:
    """A preference from `helpful=0.8,harmless=0.2`, or `0.8,0.2` in the order of `names`.

    Raises ValueError naming the text for a wrong name or length, a value that is not a number or is
    negative, and values that do not sum to 1 (within 1e-6).
    """
    expected = ",".join(f"{name}=..." for name in names)

    def refuse(reason: str) -> NoReturn:
        raise ValueError(f"w={text!r}: {reason}; expected {expected}, none negative, summing to 1")

    parts = [part.strip() for part in text.split(",")]
    if any("=" in part for part in parts):
        sides = [part.partition("=") for part in parts]
        given = [name.strip() for name, _, _ in sides]
        if sorted(given) != sorted(names):
            unknown = [name for name in given if name not in names]
            twice = [name for name in names if given.count(name) > 1]
            missing = [name for name in names if name not in given]
            kind, which = next(
                (k, v)
                for k, v in (("unknown", unknown), ("repeated", twice), ("missing", missing))
                if v
            )
            refuse(f"{kind} objective {', '.join(map(repr, which))}")
        by_name = dict(zip(given, (value.strip() for _, _, value in sides), strict=True))
        parts = [by_name[name] for name in names]
    # The length first: what cannot be paired with a name has no other fault.
    weights = [0.0] * len(parts)
    if len(parts) == len(names):
        for i, (name, part) in enumerate(zip(names, parts, strict=True)):
            try:
                weights[i] = float(part)
            except ValueError:
                refuse(f"{name} is {part!r}, not a number")
    if reason := off_simplex(weights, names):
        refuse(reason)
    return tuple(weights)


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
        "--no-evaluate", dest="evaluate", action="store_false", help="train only, without a report"
    )
    parser.add_argument(
        "--no-report", dest="report", action="store_false", help="evaluate, but draw nothing"
    )
    add_options(parser, preset(shown))
    return parser


def add_options(
    parser: argparse.ArgumentParser, shown: Config, leave_out: Container[str] = ()
) -> None:
    """Every option of a Config but those of `leave_out`, with the defaults of `shown`."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for section, field, value in options(shown):
        option = _dotted(section, field)
        if option in leave_out:
            continue
        if section not in groups:
            groups[section] = parser.add_argument_group(section or "run")
        groups[section].add_argument(
            f"--{option}",
            dest=option,
            default=argparse.SUPPRESS,
            type=functools.partial(_typed, kind=_unit(field)),
            **_shape(field, value),
        )


# What the papers' constants are called, where the last word of an option does not say which.
_SHORT = {
    "alpha": "preference.alpha",
    "beta": "grpo.beta",
    "normalization": "score.normalization",
}


def option_named(name: str, config: Config) -> str:
    """`section.option` for that itself, its last word, or a paper's constant.

    Raises ValueError where there is no such option, or more than one.
    """
    known = values_of(config)
    if name in known or name in _SHORT:
        return _SHORT.get(name, name)
    same = [option for option in known if option.rpartition(".")[2] == name]
    if len(same) > 1:
        raise ValueError(f"{name}: is it {' or '.join(same)}? Write the section too")
    if not same:
        raise ValueError(f"{name}: unknown option{nearest(name, list(known))}")
    return same[0]


def typed(option: str, text: str, config: Config) -> Any:
    """`text` as a value of the option `section.option`; config.py refuses what is none."""
    field = next(f for section, f, _ in options(config) if _dotted(section, f) == option)
    return _typed(text, _unit(field))


def values_of(config: Config) -> dict[str, Any]:
    """Every option's value, by `section.option`."""
    return {_dotted(section, field): value for section, field, value in options(config)}


def _dotted(section: str, field: dataclasses.Field[Any]) -> str:
    return f"{section}.{field.name}" if section else field.name


def options(config: Config) -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Every option as (section, field, value); the section of a top-level one is empty."""
    sections = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            sections.append((field.name, value))
        else:
            yield "", field, value
    for name, section in sections:
        for field in dataclasses.fields(section):
            yield name, field, getattr(section, field.name)


def _shape(field: dataclasses.Field[Any], value: Any) -> dict[str, Any]:
    """The argparse arguments that depend on the field's type."""
    kind = str(field.type)
    many = kind.startswith("tuple")
    choices = choices_of(kind)
    if kind == "bool":
        choices, value = ("true", "false"), str(value).lower()
    metavar = "{" + ",".join(choices) + "}" if choices else _unit(field).upper()
    default = " ".join(map(str, value)) if many else str(value)
    text = str(field.metadata["help"]) + f" (default: {default or 'empty'})"
    # "*", not "+": an empty tuple is a value, and config.py says what is wrong with a short one.
    return {"metavar": metavar, "help": text.replace("%", "%%")} | ({"nargs": "*"} if many else {})


def _unit(field: dataclasses.Field[Any]) -> str:
    """The type of one value of the field: `float` for both `float` and `tuple[float, ...]`."""
    return str(field.type).removeprefix("tuple[").partition(",")[0]


def _typed(text: str, kind: str) -> Any:
    """`text` as a number where the option is one. What is not one stays text for config to refuse,
    so that a flag and a file are told the same thing."""
    if kind == "bool":
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind not in ("int", "float"):
        return text
    try:
        return int(text) if kind == "int" else float(text)
    except ValueError:
        return text
