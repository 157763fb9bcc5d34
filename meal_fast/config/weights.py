"""A preference as a user writes it. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from meal_fast.common import off_simplex


def parse_weights(text: str, names: Sequence[str]) -> tuple[float, ...]:
    """Read a preference from `helpful=0.8,harmless=0.2`, or `0.8,0.2` in the order of `names`.

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
