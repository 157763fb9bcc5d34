"""The figures of a run's report, drawn from evaluation.json and metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations, pairwise, product
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from matplotlib.transforms import Bbox

from .plots import BASE, MODE_TITLES, MUTED, PAPER, SERIES, WARMUP, Draw, panels
from .stored import TITLES

# where a label may stand, in points from its marker
PLACES = ((0, 9), (0, -9), (12, 0), (-12, 0), (10, 8), (-10, 8), (10, -8), (-10, -8))


def fronts(result: dict[str, Any], mode: str) -> list[tuple[str, Draw]]:
    """One panel for each pair of objectives: (label, draw)."""
    names = result["names"]
    return [
        (
            f"Front of {names[a]} and {names[b]}, {mode}",
            partial(_front, result=result, mode=mode, a=a, b=b),
        )
        for a, b in combinations(range(len(names)), 2)
    ]


def _front(ax: Axes, result: dict[str, Any], mode: str, a: int, b: int) -> Callable[[], None]:
    names, pair = result["names"], len(result["names"]) == 2
    shape = {"greedy": "D", "sampled": "o"}[mode]
    size = {"greedy": 26, "sampled": 34}[mode]
    drawn: dict[str, list[tuple[float, float]]] = {}
    for model, colour in _colours(result):
        points = result["results"][model][mode]["points"]
        x = [p["normalized"][names[a]] for p in points]
        y = [p["normalized"][names[b]] for p in points]
        xs, ys = [e["value"] for e in x], [e["value"] for e in y]
        drawn[model] = list(zip(xs, ys, strict=True))
        if pair:  # neighbours in w are joined; with more objectives the sweep is not a line
            ax.plot(xs, ys, color=colour, linewidth=0.9, alpha=0.5, zorder=2)
        fill = [colour if p["nondominated"] else PAPER for p in points]
        ax.scatter(
            *(xs, ys), s=size, marker=shape, c=fill, edgecolors=colour, linewidths=1.2, zorder=3
        )
        ax.scatter([], [], s=size, marker=shape, c=colour, label=TITLES[model])
    ax.scatter([], [], s=size, marker=shape, c=PAPER, edgecolors=MUTED, label="hollow: dominated")
    ax.set_xlabel(f"{names[a]} (normalised reward)")
    ax.set_ylabel(f"{names[b]} (normalised reward)")
    # The legend of three policies takes the whole line: the title stands above it.
    ax.set_title(MODE_TITLES[mode], pad=24 if len(result["results"]) > 2 else None)
    ax.margins(0.12)
    _legend_outside(ax)
    weights = result["weights"]
    if pair:
        texts = [f"{w[0]:.2f}".rstrip("0").rstrip(".") for w in weights]
        first = [0, len(weights) - 1, len(weights) // 2]
    else:
        texts = [names[w.index(1.0)] if 1.0 in w else "" for w in weights]
        first = []

    def label() -> None:
        every = [spot for spots in drawn.values() for spot in spots]
        some = range(0, len(texts), 1 + len(texts) // 20) if pair else range(len(texts))
        _labels(ax, drawn["policy"], texts, some, first, SERIES[0], every)
        for model, spots in drawn.items():
            if model != "policy":
                _labels(ax, spots, texts, [], first[:2], MUTED, every)

    return label


def _colours(result: dict[str, Any], trained: str = SERIES[0]) -> list[tuple[str, str]]:
    """The policies of a sweep, each with its colour."""
    of = {"base": BASE, "warmup": WARMUP, "policy": trained}
    return [(model, of[model]) for model in result["results"]]


def _legend_outside(ax: Axes) -> None:
    ax.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=4,
        handletextpad=0.2,
        columnspacing=0.9,
        borderaxespad=0.1,
    )


def _legend_below(ax: Axes) -> None:
    ax.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        ncols=4,
        handlelength=1.6,
        handletextpad=0.4,
        columnspacing=1.0,
    )


def _labels(
    ax: Axes,
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    which: Sequence[int],
    first: Sequence[int],
    colour: str,
    markers: Sequence[tuple[float, float]],
) -> None:
    """Writes points' texts where they cover no marker and no text, or leaves them out."""
    unit = ax.figure.dpi / 72

    def boxes(spots: Any, side: float) -> list[Bbox]:
        pixels = ax.transData.transform(spots)
        return [Bbox.from_bounds(x - side / 2, y - side / 2, side, side) for x, y in pixels]

    taken = boxes(markers, 7 * unit) + [t.get_window_extent() for t in ax.texts]
    lines = boxes([spot for line in ax.lines for spot in _along(line.get_xydata())], unit)
    for i in dict.fromkeys([*first, *which]):
        if not texts[i]:
            continue
        # a place beside the lines if there is one, else one on a line
        for avoid, (dx, dy) in product((taken + lines, taken), PLACES):
            text = ax.annotate(
                texts[i],
                points[i],
                (dx, dy),
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=7.5,
                color=colour,
            )
            box = text.get_window_extent()
            inside = ax.bbox.x0 <= box.x0 and box.x1 <= ax.bbox.x1
            inside = inside and ax.bbox.y0 <= box.y0 and box.y1 <= ax.bbox.y1
            if inside and not any(box.overlaps(other) for other in avoid):
                taken.append(box)
                break
            text.remove()


def _along(points: Any, steps: int = 24) -> list[tuple[float, float]]:
    """Points along a drawn line."""
    return [
        (x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps)
        for (x0, y0), (x1, y1) in pairwise(points)
        for i in range(steps + 1)
    ]


def front_png(result: dict[str, Any]) -> Figure:
    """All fronts in one figure: a row a mode."""
    draws = [draw for mode in ("sampled", "greedy") for _, draw in fronts(result, mode)]
    pairs = len(draws) // 2
    said = (
        f"numbers: w of {result['names'][0]}" if pairs == 1 else "named points: w = 1 for that one"
    )
    note = f"{said}; solid: not dominated by any point of the panel"
    return panels(draws, columns=2 if pairs == 1 else pairs, size=(5.0, 4.2), note=note)


def steering(result: dict[str, Any], k: int) -> Draw:
    """Mean sampled reward of objective k against w_k, of every policy, with intervals."""
    name = result["names"][k]

    def draw(ax: Axes) -> None:
        for model, colour in _colours(result, SERIES[k % 4]):
            points = result["results"][model]["sampled"]["points"]
            at, rewards = [p["w"][k] for p in points], [p["raw"][name] for p in points]
            _band(ax, at, rewards, colour, TITLES[model])
        ax.set_xlabel(f"w of {name}")
        ax.set_title(f"Mean reward: {name}")
        _legend_below(ax)

    return draw


def utility(result: dict[str, Any]) -> Draw:
    """PU, a shortfall, at every w."""
    first = result["names"][0]

    def draw(ax: Axes) -> None:
        for model, colour in _colours(result):
            points = result["results"][model]["sampled"]["points"]
            at, shortfalls = [p["w"][0] for p in points], [p["pu"] for p in points]
            _band(ax, at, shortfalls, colour, TITLES[model])
        ax.set_xlabel(f"w of {first}")
        ax.set_title("PU: lower is better")
        _legend_below(ax)

    return draw


def marked(result: dict[str, Any], mark: str, k: int) -> Draw:
    """The share of sampled answers that bear a mark against w_k; dashed, of benign prompts."""
    name, benign = result["names"][k], result["benign"]

    def shares(points: Sequence[dict[str, Any]]) -> tuple[list[float], list[dict[str, Any]]]:
        return [p["w"][k] for p in points], [p["marks"][mark] for p in points]

    def draw(ax: Axes) -> None:
        for model, colour in _colours(result):
            points = result["results"][model]["sampled"]["points"]
            _band(ax, *shares(points), colour, TITLES[model])
        for model, colour in _colours(result) if benign else ():
            if model != "base":
                points = benign["results"][model]["points"]
                _band(ax, *shares(points), colour, "", dashed=True)
        if benign:
            ax.plot([], [], "--D", color=MUTED, ms=3.5, lw=1.3, label="benign prompts")
        ax.set_ylim(-0.03, 1.03)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0))
        ax.set_xlabel(f"w of {name}")
        ax.set_title(f"Answers marked: {mark}")
        _legend_below(ax)

    return draw


def _band(
    ax: Axes,
    xs: Sequence[float],
    values: Sequence[dict[str, Any]],
    colour: str,
    label: str,
    *,
    dashed: bool = False,
) -> None:
    ordered = sorted(zip(xs, values, strict=True), key=lambda pair: pair[0])
    x = [p for p, _ in ordered]
    shared = len(set(x)) < len(x)  # more than two objectives: many points at one w_k, so no line
    line = "" if shared else "--" if dashed else "-"
    shape = "D" if dashed else "o"
    ax.plot(
        x, [v["value"] for _, v in ordered], line + shape, color=colour, ms=3.5, lw=1.3, label=label
    )
    known = [(p, v["low"], v["high"]) for p, v in ordered if v["low"] is not None]
    if known and not shared:
        at, low, high = zip(*known, strict=True)
        ax.fill_between(at, low, high, color=colour, alpha=0.16, linewidth=0)


# --- training ----------------------------------------------------------------------------------


def training(metrics: Sequence[dict[str, Any]], names: Sequence[str]) -> list[tuple[str, Draw]]:
    """Panels of what the run logged; what it did not log has no panel."""
    out: list[tuple[str, Draw]] = []
    series = {n: _series(metrics, "normalized", n) for n in names}
    if any(series.values()):
        out.append(
            ("Normalised rewards", partial(_curves, title="Normalised rewards", series=series))
        )
    for key, title in (
        ("score", "Score"),
        ("nll", "Negative log-likelihood of kept tokens"),
        ("kl", "KL to the base model"),
        ("entropy", "Entropy, nats a token"),
        ("length", "Tokens an answer"),
        ("acceptance", "Share of responses kept"),
        ("net_entropy", "Entropy of the preference-weight-net, nats"),
        ("delta_norm", "Norm of the meta-update ‖Δ‖"),
        ("delta_cosine", "cos(Δ₁, Δ₂) of the tasks"),
    ):
        found = _series(metrics, key)
        if found:
            out.append((title, partial(_curves, title=title, series={"": found})))
    return out


def _series(metrics: Sequence[dict[str, Any]], *path: str) -> list[tuple[float, float]]:
    found = []
    for i, update in enumerate(metrics):
        value: Any = update
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, int | float):
            found.append((float(update.get("update", i)), float(value)))
    return found


def _curves(ax: Axes, title: str, series: dict[str, list[tuple[float, float]]]) -> None:
    """Every update a dot; w differs from task to task, so the line is a running mean."""
    for i, (name, points) in enumerate(series.items()):
        if not points:
            continue
        x, y = zip(*points, strict=True)
        window = len(y) // 8
        mean = [
            sum(y[max(0, j - window) : j + window + 1])
            / len(y[max(0, j - window) : j + window + 1])
            for j in range(len(y))
        ]
        colour = SERIES[i % len(SERIES)]
        ax.plot(x, y, ".", color=colour, ms=5, alpha=0.5)
        ax.plot(x, mean, color=colour, lw=1.5, label=name)
    ax.set_title(title)
    ax.set_xlabel("update")
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    if any(series):
        _legend_outside(ax)
