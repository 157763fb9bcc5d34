"""Options as fields of dataclasses: their help, their checks, and values from outside. No torch."""

from __future__ import annotations

import dataclasses
import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any

from meal_fast.common import require

# The values that a field with this annotation (a string) allows; empty where it is no choice.
Choices = Callable[[str], tuple[str, ...]]


def opt(default: Any, help: str) -> Any:
    """Make a dataclass field with its help text."""
    return field(default=default, metadata={"help": help})


def check_device(option: str, name: str) -> None:
    """Raise ValueError for what is no device's name; whether it is there is seen later."""
    known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", name)
    require(bool(known), option, name, "no device; use cpu, cuda, cuda:N or auto")


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError for objectives' names that the policy cannot read, or that are alike.

    The policy reads `[helpful=0.80 harmless=0.20]`: names are plain words, 40 characters at most.
    """
    for i, name in enumerate(names):
        short = name if len(name) <= 60 else name[:57] + "..."
        remedy = (
            "names are plain words of letters, digits and _, of 40 characters at most: the policy "
            "reads them"
        )
        require(name.isidentifier() and len(name) <= 40, "objectives", short, remedy)
        require(name not in names[:i], "objectives", name, "is given twice; names must differ")


def replaced(base: Any, values: dict[str, Any], choices: Choices, where: str = "") -> Any:
    """Give the dataclass `base` with the nested `values` put in; `where` names its section.

    Raises ValueError for an unknown option and a value of the wrong type.
    """
    known = {f.name: f for f in dataclasses.fields(base)}
    changes: dict[str, Any] = {}
    for key, value in values.items():
        require(key in known, f"{where}{key}", value, f"unknown option; known: {', '.join(known)}")
        old = getattr(base, key)
        if dataclasses.is_dataclass(old):
            require(isinstance(value, dict), f"{where}{key}", value, "must be a table")
            changes[key] = replaced(old, value, choices, f"{where}{key}.")
        else:
            changes[key] = coerced(value, known[key].type, choices, f"{where}{key}")
    return dataclasses.replace(base, **changes)


def coerced(value: Any, annotation: Any, choices: Choices, option: str) -> Any:
    """Give `value` as the type that the annotation (a string) names; a wrong type is refused."""
    kind = str(annotation)
    if kind.startswith("tuple"):
        require(isinstance(value, list | tuple), option, value, "must be a list")
        item = kind[len("tuple[") :].split(",")[0]
        return tuple(coerced(v, item, choices, option) for v in value)
    if kind == "float":
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # Beyond a float's range are whole numbers, too.
        number = number and abs(value) <= sys.float_info.max
        require(number, option, value, "must be a finite number")
        return float(value)
    if kind == "bool":
        require(isinstance(value, bool), option, value, "must be true or false")
        return value
    if kind == "int":
        whole = isinstance(value, int) and not isinstance(value, bool)
        require(whole, option, value, "must be a whole number")
        require(abs(value) < 1 << 63, option, "…", "a whole number of more than 63 bits")
        return value
    require(isinstance(value, str), option, value, "must be a string")
    plain = not any(c == "\0" or unicodedata.category(c) == "Cs" for c in value)
    require(plain, option, value, "holds a NUL, or half of a character")
    allowed = choices(kind)
    if allowed:
        require(value in allowed, option, value, f"choose from {', '.join(allowed)}")
    return value
