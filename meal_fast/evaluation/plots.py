"""How figures are drawn, and put on a page or into a file.

Drawn once in a fixed set of colours; `svg` swaps those for CSS variables, so that the page's
figures follow its light or dark theme.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from meal_fast.common import replacing

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import glyphs

INK, MUTED, GRID, PAPER = "#1b1f24", "#6b7480", "#dde1e6", "#fefefe"
BASE = "#8d96a0"
SERIES = ("#0b62c4", "#c4500b", "#1f8a5b", "#8a4bbd", "#b0892b", "#c02f6b")
WARMUP = SERIES[4]
# beside those where there are more than six methods
MORE = ("#2aa5b8", "#6d4c2f", "#7a8f12", "#3d3d9e")
# light → dark, by the name of the CSS variable
THEME = {
    "ink": (INK, "#e8eaed"),
    "muted": (MUTED, "#9aa3ad"),
    "grid": (GRID, "#343b43"),
    "paper": (PAPER, "#15191d"),
    "base": (BASE, "#7d8792"),
    "s0": (SERIES[0], "#6cabf5"),
    "s1": (SERIES[1], "#f2935c"),
    "s2": (SERIES[2], "#5cc596"),
    "s3": (SERIES[3], "#bd93e6"),
    "s4": (SERIES[4], "#d9bb6c"),
    "s5": (SERIES[5], "#ee7fac"),
    "s6": (MORE[0], "#63d0e0"),
    "s7": (MORE[1], "#c79f7c"),
    "s8": (MORE[2], "#c2d65a"),
    "s9": (MORE[3], "#9c9cf0"),
}
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar is a dollar
    "axes.edgecolor": MUTED,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}
MODE_TITLES = {"greedy": "Greedy", "sampled": "Sampled"}

# Fills a panel; what it returns, if anything, is called when all panels have their place.
Draw = Callable[[Axes], Callable[[], None] | None]


def panels(
    draws: Sequence[Draw], *, columns: int, size: tuple[float, float], note: str = ""
) -> Figure:
    """Panels of `size` inches each, row by row."""
    with matplotlib.rc_context(STYLE), glyphs.left_to_the_browser():
        rows = -(-len(draws) // columns)
        fig = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
        if note:
            fig.supxlabel(note, fontsize=8, color=MUTED)
        last = [draw(fig.add_subplot(rows, columns, i + 1)) for i, draw in enumerate(draws)]
        fig.draw_without_rendering()
        for finish in filter(None, last):
            finish()
        return fig


def svg(fig: Figure, label: str) -> str:
    """The figure as inline SVG in the page's colours, with `label` for who cannot see it."""
    out = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": label}), glyphs.left_to_the_browser():
        fig.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = text.replace("xlink:href=", "href=")
    used = set(re.findall(r'#([\w-]+)["\)]', text))
    text = re.sub(r' id="([\w-]+)"', lambda m: m[0] if m[1] in used else "", text)
    text = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "system-ui, sans-serif", text)
    for name, (light, _) in THEME.items():
        text = text.replace(light, f"var(--{name})")
    width, height = fig.get_size_inches() * 72
    head = f'<svg role="img" viewBox="0 0 {width:g} {height:g}" aria-label="{label}"'
    return re.sub(r"<svg[^>]*", lambda _: head, text, count=1)  # a backslash is a backslash


def save_png(fig: Figure, path: Path) -> None:
    """Whole or not at all, as everything in a run folder; with the fonts that its texts need."""
    glyphs.complete(fig)
    with replacing(path) as file:
        fig.savefig(file, format="png", dpi=170, facecolor="white")
