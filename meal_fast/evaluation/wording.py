"""Numbers as a reader sees them: a value, and in parentheses its interval."""

from __future__ import annotations

import math
from typing import Any

Estimate = dict[str, Any]  # value, low, high; None where there is none


def number(x: float | None) -> str:
    """Write three digits of a number."""
    return "–" if x is None else f"{x:.3g}".replace("-", "−")


def interval(e: Estimate | None) -> str:
    """`0.41 (0.30 to 0.52)`: two digits of the interval's width decide where all are rounded."""
    if e is None or e["value"] is None:
        return "–"
    if e["low"] is None:
        return number(e["value"])
    width = e["high"] - e["low"]
    digits = max(0, 1 - math.floor(math.log10(width))) if width > 0 else 3
    # adding 0.0 makes a rounded minus zero a zero
    rounded = (round(e[k], digits) + 0.0 for k in ("value", "low", "high"))
    value, low, high = (f"{x:.{digits}f}".replace("-", "−") for x in rounded)
    return f"{value} ({low} to {high})"


def signed(e: Estimate | None, *, bare: bool = False) -> str:
    """Write the same with a plus sign where it is one; `bare`: without the interval."""
    positive = e is not None and e["value"] is not None and e["value"] > 0
    text = interval(e)
    return "+" * positive + (text.partition(" ")[0] if bare else text)


def percent(e: Estimate, *, bare: bool = False, sign: bool = False) -> str:
    """`94 % (88 to 97)`: a share; `sign`: a difference of shares, `+91 % (80 to 96)`."""
    value, low, high = (
        None if e[k] is None else f"{100 * e[k] + 0.0:.0f}".replace("-", "−").replace("−0", "0")
        for k in ("value", "low", "high")
    )
    if value is None:
        return "–"
    said = "+" * (sign and e["value"] > 0) + f"{value} %"
    return said if bare or low is None else f"{said} ({low} to {high})"
