"""The tables of a report: what was measured at some weights, and what over the whole sweep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from . import metrics
from .stored import TITLES
from .wording import interval, number, percent, signed

Result = dict[str, Any]
Row = list[str]


def by_weight(result: Result) -> tuple[Row, list[Row]]:
    """Rewards and marks of the sampled answers at five weights: the head, and rows.

    Of every policy one row: (what, policy, values …).
    """
    names, weights = result["names"], [tuple(w) for w in result["weights"]]
    some = metrics.five_weights(weights)
    sweeps = {model: modes["sampled"]["points"] for model, modes in result["results"].items()}
    marks = result["settings"].get("marks", ())
    rows = [
        [f"reward {name}", TITLES[model], *(number(points[i]["raw"][name]["value"]) for i in some)]
        for name in names
        for model, points in sweeps.items()
    ]
    for mark in marks:
        rows += [
            [mark, TITLES[m], *(percent(points[i]["marks"][mark], bare=True) for i in some)]
            for m, points in sweeps.items()
        ]
    if result["benign"]:
        for mark in marks:
            for model, sweep in result["benign"]["results"].items():
                there = {tuple(p["w"]): p["marks"][mark] for p in sweep["points"]}
                shares = [percent(there[weights[i]], bare=True) for i in some]
                rows.append([f"{mark}, benign", TITLES[model], *shares])
    if len(names) == 2:
        return [f"w of {names[0]}", "", *(f"{weights[i][0]:.2g}" for i in some)], rows
    return ["w", "", *("/".join(f"{x:.2g}" for x in weights[i]) for i in some)], rows


def said_once(rows: Sequence[Row]) -> list[Row]:
    """Leave out what a row's first cell repeats of the row above."""
    above = ["", *(row[0] for row in rows)]
    return [
        ["" if row[0] == last else row[0], *row[1:]] for last, row in zip(above, rows, strict=False)
    ]


def aligned(head: Row, rows: Sequence[Row]) -> Iterator[str]:
    """Give a table's lines for a terminal."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *said_once(rows)]:
        named = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
        values = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        yield "  ".join([*named, *values]).rstrip()


def measures(result: Result, mode: str) -> tuple[Row, list[Row]]:
    """The measures of a whole sweep: a column a policy, and one for what each adds."""
    models = list(result["results"])
    sweeps = [result["results"][model][mode] for model in models]
    added = [result["added"][model][mode] for model in models[1:]]
    titles = [TITLES[model] for model in models]
    if len(models) == 2:
        head = [*titles, "trained − base"]
    else:
        head = [*titles, "warm start − base", "trained − warm start"]
    return [f"{mode.capitalize()} answers", *head], list(_measures(result, sweeps, added))


def _measures(
    result: Result, sweeps: Sequence[dict[str, Any]], added: Sequence[dict[str, Any]]
) -> Iterator[Row]:
    names = result["names"]
    none = [""] * len(added)
    for key, label in (
        ("hypervolume", "Hypervolume ↑"),
        ("pu", "PU, mean shortfall ↓"),
        ("expected_utility", "Expected utility ↑"),
    ):
        yield [label, *(interval(e[key]) for e in sweeps), *(signed(a[key]) for a in added)]
    if sweeps[-1]["pu_seen"] and sweeps[-1]["pu_unseen"]:
        for key, label in (
            ("pu_seen", "PU, weights of the training grid ↓"),
            ("pu_unseen", "PU, other weights ↓"),
        ):
            yield [label, *(interval(e[key]) for e in sweeps), *none]
    for name in names:
        label = f"Spearman of w and reward: {name} ↑"
        yield [label, *(interval(e["spearman"][name]) for e in sweeps), *none]
    for name in names:
        label = f"Reward between the ends of the sweep: {name} ↑"
        yield [label, *(signed(e["ends"][name]["raw"]) for e in sweeps), *none]
    for name in names:
        for mark in sweeps[-1].get("mark_ends", {}).get(name, ()):
            shares = (percent(e["mark_ends"][name][mark], sign=True) for e in sweeps)
            yield [f"“{mark}” between the ends: {name}", *shares, *none]
    for name in names:
        counts = [e["violations"][name] for e in sweeps]
        label = f"Steps where more w gave less: {name} ↓"
        yield [label, *(f"{c['count']} of {c['of']}" for c in counts), *none]
    gaps = [number(e["largest_gap"]["value"]) for e in sweeps]
    yield ["Largest gap between neighbours", *gaps, *none]
    yield ["Tokens an answer", *(number(e["length"]) for e in sweeps), *none]
