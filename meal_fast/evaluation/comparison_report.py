"""compare.html, one self-contained page, and front.png: a comparison as its reader sees it.

Everything here is made of compare.json's values, in the manner of report.py; how it is laid out
stands in templates/compare.html.j2.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from meal_fast.common import write_atomic

from . import method_fronts, plots
from . import metrics as measures
from .claims import BPS_TABLE_1, BPS_TABLE_1_METHODS
from .html_page import page
from .judging import MEASURES
from .plots import MODE_TITLES, MUTED, PAPER, THEME
from .wording import interval, number, percent, signed

Result = dict[str, Any]
Table = tuple[list[str], list[list[str]]]
MARKERS = "oosD^v*X<>ph"  # of front.png
KINDS = ("held", "contradicted", "not shown")
LABELS = {
    "pu": "PU",
    "pu_seen": "PU, seen weights",
    "pu_unseen": "PU, unseen weights",
    "pu_interior": "PU, interior weights",
    "hypervolume": "Hypervolume",
    "largest_gap": "Largest gap",
    "reach": "Reach",
    "expected_utility": "Expected utility",
    "distance": "Distance to the true front",
}


def write_page(result: Result, out: Path) -> Path:
    """Writes front.png and compare.html into `out`; returns the page's path."""
    plots.save_png(front_png(result), out / "front.png")
    write_atomic(out / "compare.html", render(result))
    return out / "compare.html"


def headline(result: Result) -> list[str]:
    """What won on what, and what became of the papers' claims: a sentence each."""
    won = [_won(entry) for entry in result["leaders"]]
    return [*(won or ["One method alone: nothing is compared."]), _judged(result)]


def _won(entry: dict[str, Any]) -> str:
    """`Hypervolume: meal leads with 1.31, ahead of grid-grpo by 0.20 (0.05 to 0.35).`"""
    label = _label(entry["measure"])
    best, following, margin = entry["best"], entry["next"], entry["gain"]
    by = f"{entry['value']:.3g}".replace("-", "−"), interval(margin)
    if margin["low"] is None:
        return (
            f"{label}: {best} has the best mean, {by[0]}, before {following} by {by[1]}; with "
            f"{_seeds(entry['seeds'])} in common that may be chance."
        )
    if margin["low"] > 0:
        return f"{label}: {best} wins with {by[0]}, ahead of {following} by {by[1]}."
    return (
        f"{label}: no winner; the best mean is that of {best}, {by[0]}, before {following} by "
        f"{by[1]}."
    )


def _seeds(count: int) -> str:
    return f"{count} seed{'s' * (count != 1)}"


def _label(measure: str) -> str:
    kind, _, name = measure.partition(" ")
    return f"Following {name} (Spearman)" if kind == "spearman" else LABELS[measure]


def _judged(result: Result) -> str:
    verdicts = [claim["verdict"] for claim in result["claims"]]
    run = [v for v in verdicts if v != "not run"]
    if not run:
        return "No claim of the papers is about methods that were run here."
    if all(v.startswith("not shown:") for v in run):
        return f"No claim is judged: {run[0].partition(': ')[2]}."
    counts = [f"{kind} {sum(v.startswith(kind) for v in run)}" for kind in KINDS]
    return f"The papers' claims that these runs test, {len(run)}: {', '.join(counts)}."


def trained(result: Result) -> list[dict[str, Any]]:
    """The methods, without what they began from."""
    return [method for method in result["methods"] if method["recipe"]]


def render(result: Result) -> str:
    """Give the page."""
    prompts, names = result["prompts"], result["names"]
    published = _published(result)
    return page(
        "compare.html.j2",
        script="fronts.js",
        title=f"{result['preset']}: methods compared",
        what_ran=_what_ran(result),
        headline=headline(result),
        distance=(
            ", the distance of greedy ones"
            if any(entry["mode"] == "greedy" for entry in result["leaders"])
            else ""
        ),
        notes=result["notes"],
        failed=result["failed"],
        fronts=method_fronts.figure(result, _unchanged(result), ("sampled", "greedy")),
        first=names[0],
        measures=list(_measures(result)),
        marks=_marks(result),
        and_prompts=" and prompts" if prompts >= 5 else "",
        costs=_costs(result),
        claims=_claims(result),
        ablations=list(ablations(result)),
        utilities=_utilities(result),
        of_bps=(
            " BPS's columns are of its own model, data and normalisation, on another scale than "
            "ours: compare their order, not their size."
            if published
            else ""
        ),
        asked=list(_asked(result)),
        ask=result["settings"].get("ask", ""),
        method=_method(result),
        command=result["command"],
        code=result["code"],
    )


def _what_ran(result: Result) -> str:
    seeds = ", ".join(map(str, result["seeds"]))
    return (
        f"{len(trained(result))} methods, seeds {seeds}, {result['tokens']:,} generated "
        f"tokens a run; {' against '.join(result['names'])}, {result['policy']}"
    )


# --- fronts ------------------------------------------------------------------------------------


def _unchanged(result: Result) -> list[str]:
    """The methods that are no ablation."""
    return [m["name"] for m in result["methods"] if not m.get("changes")]


def ablations(result: Result) -> Iterator[method_fronts.Figure]:
    """A figure for each ablation that has more than one method."""
    before = [m["name"] for m in result["methods"] if not m["recipe"]]
    there = {m["name"] for m in trained(result)}
    for a in result["ablations"]:
        shown = [name for name in a["methods"] if name in there]
        if len(shown) > 1:
            what = f"Fronts for values of {' and '.join(a['options'])}"
            yield method_fronts.figure(result, [*before, *shown], ("sampled",), what)


def front_png(result: Result) -> Any:
    """All methods in one figure: a row a mode, a panel for each pair of objectives."""
    pairs = list(combinations(range(len(result["names"])), 2))
    draws = [
        partial(_front, result=result, mode=mode, a=a, b=b)
        for mode in ("sampled", "greedy")
        for a, b in pairs
    ]
    first = result["names"][0]
    note = f"large: means over seeds, small: each seed; numbers: w of {first}; hollow: dominated"
    columns = 2 if len(pairs) == 1 else len(pairs)
    return plots.panels(draws, columns=columns, size=(5.4, 5.4), note=note)


def _front(ax: Axes, result: Result, mode: str, a: int, b: int) -> None:
    """The mean front of each method, and small, each seed's points.

    Seeds that settled at different ends have a mean between them, which none of them reached.
    """
    names = result["names"]
    pair = len(names) == 2
    for i, method in enumerate(result["methods"]):
        if method.get("changes"):
            continue
        colour = THEME[method_fronts.colour_of(result, i)][0]
        marker = MARKERS[i % len(MARKERS)]
        points = method["points"][mode]
        xs, ys = ([p["normalized"][names[k]] for p in points] for k in (a, b))
        if pair:
            ax.plot(xs, ys, color=colour, linewidth=0.9, alpha=0.5, zorder=2)
        if len(method["seeds"]) > 1:
            seed_x, seed_y = ([seed[k] for p in points for seed in p["by_seed"]] for k in (a, b))
            ax.scatter(seed_x, seed_y, s=6, marker=marker, c=colour, alpha=0.4, lw=0, zorder=1)
        fill = [colour if p["nondominated"] else PAPER for p in points]
        ax.scatter(xs, ys, s=26, marker=marker, c=fill, edgecolors=colour, linewidths=1.1, zorder=3)
        ax.scatter([], [], s=26, marker=marker, c=colour, label=method["name"])
        for j in {0, len(points) - 1} if pair else ():
            ax.annotate(
                f"{points[j]['w'][0]:g}",
                (xs[j], ys[j]),
                (6, 4),
                textcoords="offset points",
                fontsize=7.5,
                color=colour,
            )
    reference = result["reference_point"]
    ax.scatter([reference[a]], [reference[b]], s=40, marker="+", c=MUTED, label="reference point")
    ax.set_xlabel(f"{names[a]} (normalised reward)")
    ax.set_ylabel(f"{names[b]} (normalised reward)")
    ax.set_title(MODE_TITLES[mode])
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, handletextpad=0.2)


# --- tables: a head, and rows of a label and cells ------------------------------------------------


def _measures(result: Result) -> Iterator[Table]:
    names = result["names"]
    wanted = [k for k in LABELS if k not in ("expected_utility", "pu_interior")]
    wanted[5:5] = [f"spearman {n}" for n in names]
    for mode in ("sampled", "greedy"):
        there = [k for k in wanted if any(k in m["measures"][mode] for m in result["methods"])]
        head = [LABELS.get(k, k.capitalize()) + _arrow(k) for k in there]
        rows = [
            [m["name"], *(interval(m["measures"][mode].get(k)) for k in there)]
            for m in result["methods"]
        ]
        yield [f"{MODE_TITLES[mode]} answers", *head], rows


def _marks(result: Result) -> Table | None:
    """The share of sampled answers that bear each mark, at five weights; benign prompts apart."""
    weights = [tuple(w) for w in result["weights"]]
    some = [weights[i] for i in measures.five_weights(weights)]
    rows = []
    for key, what in (("marks", ""), ("benign", ", benign prompts")):
        counted = [m for m in result["methods"] if m[key]]
        for mark in counted[0][key][0]["marks"] if counted else ():
            for m in counted:
                there = {tuple(p["w"]): percent(p["marks"][mark]) for p in m[key]}
                rows.append([f"{mark}{what}", m["name"], *(there[w] for w in some)])
    first = result["names"][0]
    head = [f"{first}={w[0]:.2g}" if len(w) == 2 else " ".join(f"{x:.2g}" for x in w) for w in some]
    return (["mark", "method", *head], rows) if rows else None


def _arrow(measure: str) -> str:
    return " ↑" if MEASURES.get(measure, True) else " ↓"


def _costs(result: Result) -> Table:
    rows = []
    for m in trained(result):
        c = m["cost"]
        memory = "–" if c["peak_bytes"] is None else f"{c['peak_bytes'] / 2**30:.2f} GiB"
        kept = "–" if c["acceptance"] is None else f"{c['acceptance']:.2f}"
        counts = (f"{c[name]:,.0f}" for name in ("tokens", "updates", "seconds"))
        rows.append([m["name"], *counts, memory, kept])
    return ["A run of", "tokens", "updates", "seconds", "peak memory", "acceptance"], rows


def _claims(result: Result) -> Table:
    rows = []
    for c in result["claims"]:
        sides = f"{c['better']} against {c['worse']}" if "better" in c else "–"
        gain = signed(c["gain"]) if "gain" in c else "–"
        rows.append([c["claim"], c["source"], LABELS[c["measure"]], sides, gain, c["verdict"]])
    return ["claim", "source", "measure", "runs", "gain, as claimed if +", "verdict"], rows


def _published(result: Result) -> bool:
    """Whether BPS's Table 1 is of these weights."""
    return bool(result["settings"]["grid"] == 28 and len(result["names"]) == 2)


def _utilities(result: Result) -> Table:
    methods, published = result["methods"], _published(result)
    head = ["w", *(m["name"] for m in methods)]
    if published:
        head += [f"{name}, BPS Table 1" for name in BPS_TABLE_1_METHODS]
    rows = []
    for i, w in enumerate(result["weights"]):
        said = " ".join(f"{x:.2f}" for x in w) + " seen" * result["seen"][i]
        own = (number(m["points"]["sampled"][i]["pu"]["value"]) for m in methods)
        theirs = (f"{x:.3f}" for x in BPS_TABLE_1[w[0]]) if published else ()
        rows.append([said, *own, *theirs])
    return head, rows


def _asked(result: Result) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """(method, [(w, answer)]) of the methods that were asked the one prompt more."""
    for method in result["methods"]:
        if method.get("asked"):
            yield (
                method["name"],
                [
                    (
                        " ".join(f"{n}={x:.2f}" for n, x in zip(result["names"], w, strict=True)),
                        text,
                    )
                    for w, text in method["asked"]
                ],
            )


def _method(result: Result) -> str:
    s = result["settings"]
    utopia = ", ".join(number(z) for z in result["utopia"])
    reference = ", ".join(number(z) for z in result["reference_point"])
    return (
        f"{result['prompts']} held-out prompts, {len(result['weights'])} weights, "
        f"{s['samples']} sampled answer(s) to each at temperature {s['temperature']:g}. All "
        "methods are measured by one set of statistics, taken from the base model before training; "
        f"utopia point {utopia}, smoothing μ {result['mu']:g}. Hypervolumes are above "
        f"{reference}, the nadir of all methods and the base model minus a tenth of the range."
    )
