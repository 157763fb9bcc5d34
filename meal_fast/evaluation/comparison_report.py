"""compare.html, one self-contained page, and front.png: a comparison as its reader sees it.

Everything here is made of compare.json's values, in the manner of report.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from meal_fast.common import write_atomic

from . import plots
from .claims import BPS_TABLE_1, BPS_TABLE_1_METHODS
from .comparison import MEASURES
from .html_page import page
from .plots import BASE, MODE_TITLES, MORE, MUTED, PAPER, SERIES, Draw
from .report import interval, number, signed

Result = dict[str, Any]
COLOURS = (*SERIES, *MORE)
MARKERS = "osD^vPX<>ph*"
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


def headline(result: Result) -> str:
    """What became of the papers' claims, in one sentence that counts."""
    verdicts = [claim["verdict"] for claim in result["claims"]]
    run = [v for v in verdicts if v != "not run"]
    if not run:
        return "No claim of the papers is about methods that were run here."
    if all(v.startswith("not shown:") for v in run):
        return f"No claim is judged: {run[0].partition(': ')[2]}."
    counts = [f"{kind} {sum(v.startswith(kind) for v in run)}" for kind in KINDS]
    return f"The papers' claims that these runs test, {len(run)}: {', '.join(counts)}."


def render(result: Result) -> str:
    """The page. Every text that came from a model, a prompt or a command line is escaped."""
    parts = [
        f"<h1>{escape(result['preset'])}: methods compared</h1>",
        f'<p class="sub">{escape(_what_ran(result))}</p>',
        f'<p class="headline">{escape(headline(result))}</p>',
        *(f'<p class="note">{escape(note)}</p>' for note in result["notes"]),
        *_failed(result),
        "<h2>Fronts</h2>",
        *_fronts(result),
        "<h2>Measures</h2>",
        *_measures(result),
        "<h2>What it took</h2>",
        *_costs(result),
        "<h2>The papers' claims</h2>",
        *_claims(result),
        *_ablations(result),
        "<h2>PU at each weight</h2>",
        *_utilities(result),
        *_asked(result),
        "<h2>How this was measured</h2>",
        *_method(result),
    ]
    return page(f"{result['preset']}: methods compared", "\n".join(parts))


def _what_ran(result: Result) -> str:
    seeds = ", ".join(map(str, result["seeds"]))
    return (
        f"{len(result['methods']) - 1} methods, seeds {seeds}, {result['tokens']:,} generated "
        f"tokens a run; {' against '.join(result['names'])}, {result['policy']}"
    )


def _failed(result: Result) -> Iterator[str]:
    if result["failed"]:
        yield '<p class="headline">These runs failed and are missing below:</p><ul>'
        for entry in result["failed"]:
            yield f"<li>{escape(entry['run'])}: {escape(entry['reason'])}</li>"
        yield "</ul>"


# --- fronts ------------------------------------------------------------------------------------


def style_of(result: Result, name: str) -> tuple[str, str]:
    """Colour and marker of a method, the same in every figure."""
    names = [m["name"] for m in result["methods"]]
    place = names.index(name) - 1
    return (BASE, "o") if place < 0 else (COLOURS[place % 10], MARKERS[place % 12])


def front(
    ax: Axes, result: Result, mode: str, a: int, b: int, shown: Sequence[str], title: str
) -> None:
    """The mean front of each method of `shown`, and small, each seed's points.

    Seeds that settled at different ends have a mean between them, which none of them reached.
    """
    names = result["names"]
    pair = len(names) == 2
    for method in result["methods"]:
        if method["name"] not in shown:
            continue
        colour, marker = style_of(result, method["name"])
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
        for i in {0, len(points) - 1} if pair else ():
            ax.annotate(
                f"{points[i]['w'][0]:g}",
                (xs[i], ys[i]),
                (6, 4),
                textcoords="offset points",
                fontsize=7.5,
                color=colour,
            )
    reference = result["reference_point"]
    ax.scatter([reference[a]], [reference[b]], s=40, marker="+", c=MUTED, label="reference point")
    ax.set_xlabel(f"{names[a]} (normalised reward)")
    ax.set_ylabel(f"{names[b]} (normalised reward)")
    ax.set_title(title)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, handletextpad=0.2)


def fronts(result: Result, mode: str) -> list[Draw]:
    """One panel for each pair of objectives, with all methods."""
    everyone = [m["name"] for m in result["methods"] if not m.get("changes")]
    pairs = combinations(range(len(result["names"])), 2)
    return [
        partial(front, result=result, mode=mode, a=a, b=b, shown=everyone, title=MODE_TITLES[mode])
        for a, b in pairs
    ]


def front_png(result: Result) -> Any:
    """All methods in one figure: a row a mode."""
    draws = [draw for mode in ("sampled", "greedy") for draw in fronts(result, mode)]
    pairs = len(draws) // 2
    first = result["names"][0]
    note = f"large: means over seeds, small: each seed; numbers: w of {first}; hollow: dominated"
    return plots.panels(draws, columns=2 if pairs == 1 else pairs, size=(5.4, 5.4), note=note)


def _figure(draw: Draw, label: str) -> str:
    drawn = plots.panels([draw], columns=1, size=(5.2, 5.4))
    return f"<figure>{plots.svg(drawn, escape(label, quote=True))}</figure>"


def _fronts(result: Result) -> Iterator[str]:
    yield '<div class="grid wide">'
    for mode in ("sampled", "greedy"):
        for draw in fronts(result, mode):
            yield _figure(draw, f"Fronts of all methods, {mode}")
    yield "</div>"
    yield (
        '<p class="note">A point is a mean over prompts, samples and seeds at one w; the '
        "small ones are each seed's: seeds that settled at different ends have a mean between them "
        f"that none of them reached. The ends of a line carry w of {escape(result['names'][0])}. "
        "Up and right is better. Hollow points are dominated by another's mean, here or in an "
        "ablation.</p>"
    )


def _ablations(result: Result) -> Iterator[str]:
    there = {m["name"] for m in result["methods"]}
    drawn = [
        (" and ".join(a["options"]), shown)
        for a in result["ablations"]
        if len(shown := [name for name in a["methods"] if name in there]) > 1
    ]
    if not drawn:
        return
    yield "<h2>Ablations</h2>"
    yield '<div class="grid wide">'
    for options, shown in drawn:
        for a, b in combinations(range(len(result["names"])), 2):
            draw = partial(
                front,
                result=result,
                mode="sampled",
                a=a,
                b=b,
                shown=["base model", *shown],
                title=options,
            )
            yield _figure(draw, f"Fronts for values of {options}: {', '.join(shown)}")
    yield "</div>"
    yield (
        '<p class="note">Sampled answers. A recipe without a value has that of all runs: see '
        "Configuration of its own report.</p>"
    )


# --- tables ------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    yield '<div class="scroll"><table class="fit"><thead><tr>'
    yield "".join(f"<th>{escape(h)}</th>" for h in head) + "</tr></thead><tbody>"
    for first, *cells in rows:
        values = "".join(f"<td>{escape(c)}</td>" for c in cells)
        yield f'<tr><th scope="row">{escape(first)}</th>{values}</tr>'
    yield "</tbody></table></div>"


def _measures(result: Result) -> Iterator[str]:
    names = result["names"]
    wanted = [k for k in LABELS if k not in ("expected_utility", "pu_interior")]
    wanted[5:5] = [f"spearman {n}" for n in names]
    for mode in ("sampled", "greedy"):
        there = [k for k in wanted if any(k in m["measures"][mode] for m in result["methods"])]
        head = [LABELS.get(k, k.capitalize()) + _arrow(k) for k in there]
        rows = (
            [m["name"], *(interval(m["measures"][mode].get(k)) for k in there)]
            for m in result["methods"]
        )
        yield from _table([f"{MODE_TITLES[mode]} answers", *head], rows)
    yield (
        '<p class="note">PU is the mean shortfall −S, in normalised rewards. Spearman is of w and '
        "the mean reward, 0 where the reward does not move. The largest gap between neighbours "
        "shows a hollow front only where the ends lie apart: see the reach, what the whole weight "
        "on an objective buys of it against none. In parentheses 95 % intervals over seeds"
        f"{_and_prompts(result)}, by Student's t on the bootstrap's standard error; none below "
        "three seeds.</p>"
    )


def _arrow(measure: str) -> str:
    return " ↑" if MEASURES.get(measure, True) else " ↓"


def _and_prompts(result: Result) -> str:
    return " and prompts" if result["prompts"] >= 5 else ""


def _costs(result: Result) -> Iterator[str]:
    def rows() -> Iterator[Sequence[str]]:
        for m in result["methods"][1:]:
            c = m["cost"]
            memory = "–" if c["peak_bytes"] is None else f"{c['peak_bytes'] / 2**30:.2f} GiB"
            kept = "–" if c["acceptance"] is None else f"{c['acceptance']:.2f}"
            yield (
                m["name"],
                f"{c['tokens']:,.0f}",
                f"{c['updates']:,.0f}",
                f"{c['seconds']:,.0f}",
                memory,
                kept,
            )

    head = ["A run of", "tokens", "updates", "seconds", "peak memory", "acceptance"]
    yield from _table(head, rows())
    yield (
        '<p class="note">Means over seeds, all models of a method together; the memory is the '
        "highest, of the GPU where there is one and of the training process elsewhere. Seconds are "
        "of rollouts, rewards and updates, without loading and evaluation, and compare only where "
        "nothing else ran.</p>"
    )


def _claims(result: Result) -> Iterator[str]:
    def rows() -> Iterator[Sequence[str]]:
        for c in result["claims"]:
            sides = f"{c['better']} against {c['worse']}" if "better" in c else "–"
            gain = signed(c["gain"]) if "gain" in c else "–"
            yield c["claim"], c["source"], LABELS[c["measure"]], sides, gain, c["verdict"]

    head = ["claim", "source", "measure", "runs", "gain, as claimed if +", "verdict"]
    yield from _table(head, rows())
    yield (
        '<p class="note">Sampled answers, differences paired by seed. A claim held, or was '
        "contradicted, where the 95 % interval of the difference excludes zero; these are many "
        "claims, and one in twenty intervals would do so by chance.</p>"
    )


def _utilities(result: Result) -> Iterator[str]:
    methods = result["methods"]
    published = result["settings"]["grid"] == 28 and len(result["names"]) == 2
    head = ["w", *(m["name"] for m in methods)]
    if published:
        head += [f"{name}, BPS Table 1" for name in BPS_TABLE_1_METHODS]

    def rows() -> Iterator[Sequence[str]]:
        for i, w in enumerate(result["weights"]):
            said = " ".join(f"{x:.2f}" for x in w) + " seen" * result["seen"][i]
            own = (number(m["points"]["sampled"][i]["pu"]["value"]) for m in methods)
            theirs = (f"{x:.3f}" for x in BPS_TABLE_1[w[0]]) if published else ()
            yield said, *own, *theirs

    yield from _table(head, rows())
    more = (
        " BPS's columns are of its own model, data and normalisation, on another scale than ours: "
        "compare their order, not their size."
    )
    yield (
        '<p class="note">Mean shortfall over seeds, sampled answers, lower is better. Seen: '
        f"training could draw that weight.{more * published}</p>"
    )


def _asked(result: Result) -> Iterator[str]:
    methods = [m for m in result["methods"] if m.get("asked")]
    if not methods:
        return
    yield "<h2>One prompt at four weights</h2>"
    yield (
        '<p class="note">Greedy answers of each method\'s first seed, unedited, to: '
        f"{escape(result['settings']['ask'])}</p>"
    )
    names = result["names"]
    for method in methods:
        yield f'<section class="prompt"><h3>{escape(method["name"])}</h3><div class="answers">'
        for w, text in method["asked"]:
            said = " ".join(f"{n}={x:.2f}" for n, x in zip(names, w, strict=True))
            answer = escape(text.strip()) or "<em>(empty)</em>"
            yield (
                f'<div class="answer"><p class="w">{escape(said)}</p>'
                f"<blockquote>{answer}</blockquote></div>"
            )
        yield "</div></section>"


def _method(result: Result) -> Iterator[str]:
    s = result["settings"]
    utopia = ", ".join(number(z) for z in result["utopia"])
    reference = ", ".join(number(z) for z in result["reference_point"])
    yield (
        f"<p>{result['prompts']} held-out prompts, {len(result['weights'])} weights, "
        f"{s['samples']} sampled answer(s) to each at temperature {s['temperature']:g}. All "
        "methods are measured by one set of statistics, taken from the base model before training; "
        f"utopia point {escape(utopia)}, smoothing μ {result['mu']:g}. Hypervolumes are above "
        f"{escape(reference)}, the nadir of all methods and the base model minus a tenth of the "
        "range.</p>"
        f"<p><code>{escape(result['command'])}</code>, code {escape(result['code'])}.</p>"
    )
