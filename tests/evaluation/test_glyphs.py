"""Names in any script, in pictures."""

import warnings

import pytest
from matplotlib.font_manager import findfont
from matplotlib.ft2font import FT2Font

from meal_fast.evaluation import glyphs, plots

# Matplotlib's own STIX has letters that its DejaVu has not.
STIX = sorted(
    set(FT2Font(findfont("STIXGeneral")).get_charmap())
    - set(FT2Font(findfont("DejaVu Sans")).get_charmap())
)
ONLY_STIX = next(chr(code) for code in STIX if 0x1D400 < code < 0x1D7FF or 0x2100 < code < 0x2BFF)


def drawn(name, note=""):
    def draw(ax):
        ax.plot([0, 1], label=name)
        ax.set_title(f"Front of {name}")
        ax.legend()

    return plots.panels([draw], columns=1, size=(4, 3), note=note)


def saved(fig, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.save_png(fig, tmp_path / "front.png")
    return {text.get_text(): text for text in fig.findobj(glyphs.Text)}


def test_a_name_that_another_installed_font_has_is_drawn_with_it(tmp_path):
    family = glyphs.family_of(ONLY_STIX)
    assert family not in (None, glyphs.OWN)
    texts = saved(drawn(f"a{ONLY_STIX}"), tmp_path)
    assert texts[f"Front of a{ONLY_STIX}"].get_fontfamily() == [glyphs.OWN, family]
    assert not any(glyphs.EXPLAINED in text for text in texts)


@pytest.mark.parametrize("note", ["", "numbers: w"])
def test_what_no_font_has_is_written_as_code_points_and_said_to_be(tmp_path, note, monkeypatch):
    name = "帮助"  # on a machine that has no font for it, whatever this one has
    monkeypatch.setattr(glyphs, "family_of", lambda c: None if c in name else glyphs.OWN)
    texts = saved(drawn(name, note), tmp_path)
    assert "Front of [U+5E2E U+52A9]" in texts and "[U+5E2E U+52A9]" in texts
    assert (f"{note}; {glyphs.EXPLAINED}" if note else glyphs.EXPLAINED) in texts
    assert texts["Front of [U+5E2E U+52A9]"].get_fontfamily() == ["sans-serif"]


def test_a_font_of_placeholders_is_none():
    """Matplotlib brings one that has a box for every code point, private ones as well."""
    assert glyphs.family_of("\U0010fffd") is None
    assert glyphs.family_of("a") == glyphs.OWN


def test_a_page_s_figure_leaves_the_name_to_the_browser_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = plots.svg(drawn("帮助 🦊"), "front")
    assert "Front of 帮助 🦊" in text


def test_a_dollar_is_a_dollar(tmp_path):
    texts = saved(drawn("$cost$x$"), tmp_path)
    assert "Front of $cost$x$" in texts
