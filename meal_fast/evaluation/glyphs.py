"""Text in figures, whatever script it is in: with another installed font, or as code points.

A page's figures leave glyphs to the browser, which has fonts of its own; this is for PNG files.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, findfont, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

OWN = "DejaVu Sans"  # which matplotlib brings
# Fonts that draw for every character a picture of its script, or nothing: a reader learns neither.
PLACEHOLDERS = ("Last Resort", "LastResort", "Adobe Blank", "Unicode BMP Fallback")
EXPLAINED = "[U+…]: a character that no font here has"


def complete(fig: Figure) -> None:
    """Give every text of a figure the fonts that its characters need.

    A character that no installed font has is written as its code point, `[U+5E2E]`; a line below
    the figure then says so.
    """
    replaced = False
    for text in fig.findobj(Text):
        assert isinstance(text, Text)
        said = text.get_text()
        families = {char: family_of(char) for char in said if char.isprintable() and char != " "}
        others = [
            family for family in dict.fromkeys(families.values()) if family not in (None, OWN)
        ]
        if others:
            text.set_fontfamily([OWN, *others])
        if None in families.values():
            replaced = True
            text.set_text(_spelt(said, {char for char, family in families.items() if not family}))
    if replaced:
        below = fig.get_supxlabel()
        fig.supxlabel(f"{below}; {EXPLAINED}" if below else EXPLAINED, fontsize=8)


def _spelt(text: str, missing: set[str]) -> str:
    """Write runs of missing characters as code points in brackets."""
    out = ""
    for char in text:
        if char not in missing:
            out += char
        elif out.endswith("]") and "[U+" in out:
            out = f"{out[:-1]} U+{ord(char):04X}]"
        else:
            out += f"[U+{ord(char):04X}]"
    return out


@lru_cache(maxsize=4096)
def family_of(char: str) -> str | None:
    """Name a font family that has a character: our own, else the first installed one, else None."""
    if _draws(findfont(OWN), char):
        return OWN
    fonts = [f for f in fontManager.ttflist if not f.name.startswith(PLACEHOLDERS)]
    fonts.sort(key=_plain)
    return next((font.name for font in fonts if _draws(font.fname, char)), None)


def _plain(font: FontEntry) -> tuple[bool, int, str]:
    weight = font.weight if isinstance(font.weight, int) else 400
    return font.style != "normal", abs(weight - 400), font.name


def _draws(path: str, char: str) -> bool:
    """Whether a font has a character, and matplotlib can draw it: fonts of bitmaps it cannot."""
    try:
        font = FT2Font(path)
        if not font.get_char_index(ord(char)):
            return False
        font.set_size(10, 72)
        font.load_char(ord(char))
    except (OSError, RuntimeError):
        return False
    return True


@contextmanager
def left_to_the_browser() -> Iterator[None]:
    """Draw without a warning of missing glyphs: what is drawn is text that a browser sets."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from")
        yield
