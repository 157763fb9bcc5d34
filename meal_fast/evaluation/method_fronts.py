"""The fronts of many methods as a figure to sort out: each can be hidden, points say what they are.

Made of plain values, which templates/fronts.html.j2 lays out as SVG, and escapes; the script is
templates/fronts.js. In coordinates of a view of WIDTH x HEIGHT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from matplotlib.ticker import MaxNLocator

from .plots import MODE_TITLES
from .wording import number

Result = dict[str, Any]
WIDTH, HEIGHT = 520.0, 440.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 14.0, 30.0, 46.0
SERIES = 10  # colours of the style sheet: s0 … s9


@dataclass(frozen=True)
class Point:
    """A method at one weight: where it is, what it is called, and whether it is dominated."""

    x: float
    y: float
    said: str
    solid: bool


@dataclass(frozen=True)
class Series:
    """A method in one panel: its mean points, joined or not, its seeds', its marker and colour."""

    number: int  # in the comparison; what a toggle hides
    name: str
    colour: str
    marker: str  # a path around the origin
    points: list[Point]
    line: str  # a path; empty: not joined
    seeds: list[tuple[float, float]]
    ends: list[tuple[float, float, str]]


@dataclass(frozen=True)
class Panel:
    """One pair of objectives, of one kind of answers."""

    title: str
    label: str  # for who cannot see it
    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    series: list[Series]
    reference: tuple[float, float]


@dataclass(frozen=True)
class Figure:
    """Panels that share a legend."""

    panels: list[Panel]
    legend: list[Series]
    width: float = WIDTH
    height: float = HEIGHT
    frame: tuple[float, float, float, float] = (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)


def figure(
    result: Result, shown: Sequence[str], modes: Sequence[str], what: str = "Fronts of all methods"
) -> Figure:
    """Draw the methods named `shown`: a panel for each mode and pair of objectives."""
    pairs = list(combinations(range(len(result["names"])), 2))
    panels = [_panel(result, shown, mode, a, b, what) for mode in modes for a, b in pairs]
    return Figure(panels, panels[0].series)


def _panel(result: Result, shown: Sequence[str], mode: str, a: int, b: int, what: str) -> Panel:
    names, reference = result["names"], result["reference_point"]
    methods = [(i, m) for i, m in enumerate(result["methods"]) if m["name"] in shown]
    every = [(reference[a], reference[b])]
    for _, method in methods:
        for point in method["points"][mode]:
            mean = [point["normalized"][n] for n in names]
            every += [(seed[a], seed[b]) for seed in (mean, *point["by_seed"])]
    x, x_ticks = _axis([spot[0] for spot in every], LEFT, WIDTH - RIGHT)
    y, y_ticks = _axis([spot[1] for spot in every], HEIGHT - BOTTOM, TOP)

    def series(i: int, method: dict[str, Any]) -> Series:
        points = method["points"][mode]
        spots = [(x(p["normalized"][names[a]]), y(p["normalized"][names[b]])) for p in points]
        several = len(method["seeds"]) > 1
        pair = len(names) == 2
        return Series(
            i,
            method["name"],
            colour_of(result, i),
            marker_of(result, i),
            [
                Point(*spot, _said(method["name"], p, names), p["nondominated"])
                for spot, p in zip(spots, points, strict=True)
            ],
            "M" + " L".join(f"{u:.1f},{v:.1f}" for u, v in spots) if pair else "",
            [(x(seed[a]), y(seed[b])) for p in points for seed in p["by_seed"]] if several else [],
            [(*spots[j], f"{points[j]['w'][0]:g}") for j in (0, -1)] if pair else [],
        )

    return Panel(
        MODE_TITLES[mode],
        f"{what}, {mode}: {names[a]} and {names[b]}",
        f"{names[a]} (normalised reward)",
        f"{names[b]} (normalised reward)",
        x_ticks,
        y_ticks,
        [series(i, method) for i, method in methods],
        (x(reference[a]), y(reference[b])),
    )


def _said(name: str, point: dict[str, Any], names: Sequence[str]) -> str:
    w = ", ".join(f"{n}={x:g}" for n, x in zip(names, point["w"], strict=True))
    rewards = ", ".join(f"{n} {number(point['normalized'][n])}" for n in names)
    return f"{name} at {w}: {rewards}, PU {number(point['pu']['value'])}"


def _axis(
    values: Sequence[float], start: float, end: float
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """A scale from rewards to coordinates, with a little room at both ends, and its ticks."""
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.5
    low, high = low - room, high + room

    def at(value: float) -> float:
        return start + (value - low) / (high - low) * (end - start)

    ticks = (float(t) for t in MaxNLocator(7).tick_values(low, high))
    return at, [(at(t), number(round(t, 9) + 0.0)) for t in ticks if low <= t <= high]


def _place(result: Result, i: int) -> int:
    """The place of a method among those that were trained; negative: it was not."""
    return i - sum(m["recipe"] is None for m in result["methods"])


def colour_of(result: Result, i: int) -> str:
    """A method's colour, by the name of a variable of the style sheet: the same in every figure."""
    place = _place(result, i)
    if place < 0:
        return "base" if i == 0 else "muted"
    return f"s{place % SERIES}"


def marker_of(result: Result, i: int) -> str:
    """A method's marker, a path around the origin: the same in every figure."""
    return MARKERS[max(0, _place(result, i)) % len(MARKERS)]


def _polygon(corners: int, turn: float = 0.0, inner: float = 1.0, size: float = 5.0) -> str:
    """A regular polygon, one corner up; with `inner` below 1 a star of twice as many."""
    count = corners if inner == 1.0 else 2 * corners
    radii = [size * (inner if inner < 1 and i % 2 else 1.0) for i in range(count)]
    angles = [math.radians(turn - 90) + 2 * math.pi * i / count for i in range(count)]
    spots = (
        f"{r * math.cos(t):.1f},{r * math.sin(t):.1f}" for r, t in zip(radii, angles, strict=True)
    )
    return f"M{' L'.join(spots)}Z"


MARKERS = (
    "M-4,0A4,4 0 1 0 4,0A4,4 0 1 0 -4,0Z",
    _polygon(4, 45, size=5.2),
    _polygon(4, size=5.4),
    _polygon(3, size=5.4),
    _polygon(3, 180, size=5.4),
    _polygon(5, inner=0.45, size=6.4),
    _polygon(4, inner=0.4, size=6.4),
    _polygon(3, 90, size=5.4),
    _polygon(3, 270, size=5.4),
    _polygon(5),
    _polygon(6),
    _polygon(4, 45, inner=0.4, size=6.4),
)
