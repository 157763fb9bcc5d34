"""What a file of a run may hold, held to it when it is read: no page and no table sees the rest.

A shape is one of the names below; `[shape]`, a list of such; `{"key": shape}`, a table with these
keys (`"key?"`: that it may lack) and whatever others; `Each(shape)`, a table of any keys; or
`Maybe(shape)`, that or null.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from meal_fast.common import printable

LARGEST = 1e100  # of a number: its square is still a float
LONGEST = 1 << 20  # characters of a text
SHOWN = 60  # of them in a message

NUMBER, WHOLE, TRUTH, TEXT, WORD = "a number", "a whole number", "true or false", "a text", "a word"
Shape = Any


@dataclass(frozen=True)
class Each:
    """A table of any keys."""

    shape: Shape


@dataclass(frozen=True)
class Maybe:
    """A shape, or null."""

    shape: Shape


def hold(value: Any, shape: Shape, file: str, field: str = "") -> None:
    """Raise ValueError, naming file and field, for a value that is not of its shape."""
    if isinstance(shape, Maybe):
        if value is not None:
            hold(value, shape.shape, file, field)
    elif isinstance(shape, str):
        if not _is(value, shape):
            raise ValueError(f"{file}: {field}={shortened(value)}: must be {shape}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"{file}: {field}={shortened(value)}: must be a list")
        for i, item in enumerate(value):
            hold(item, shape[0], file, f"{field}[{i}]")
    else:
        _hold_table(value, shape, file, field)


def _hold_table(value: Any, shape: Each | dict[str, Shape], file: str, field: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{file}: {field or 'it'}={shortened(value)}: must be a table")
    dot = f"{field}." if field else ""
    if isinstance(shape, Each):
        for key, item in value.items():
            hold(item, shape.shape, file, dot + shortened(key)[1:-1])
        return
    for key, inner in shape.items():
        name = key.removesuffix("?")
        if name in value:
            hold(value[name], inner, file, dot + name)
        elif name == key:
            raise ValueError(f"{file}: lacks {dot}{name}")


def _is(value: Any, shape: str) -> bool:
    if shape in (TEXT, WORD):
        if not isinstance(value, str) or len(value) > LONGEST:
            return False
        return shape == TEXT or (value.isidentifier() and len(value) <= 200)
    if shape == TRUTH:
        return isinstance(value, bool)
    kinds = int if shape == WHOLE else int | float
    # NaN compares with nothing; a whole number may be beyond every float.
    return isinstance(value, kinds) and not isinstance(value, bool) and abs(value) <= LARGEST


def shortened(value: Any) -> str:
    """Write a value as a message does: in a line, not all of a long one, harmless to a terminal."""
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and abs(value) > LARGEST:
        return "a number of more than 100 digits"
    text = repr(value[: SHOWN + 1]) if isinstance(value, str) else repr(value)
    return printable(text if len(text) <= SHOWN + 2 else f"{text[:SHOWN]}…'")
