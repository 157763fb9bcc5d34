"""docs/configuration.md is made of the options, and is not edited by hand: `make docs-options`."""

from pathlib import Path

from meal_fast.config.options_page import options_page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def test_the_page_of_options_is_fresh():
    assert PAGE.read_text(encoding="utf-8") == options_page(), "run `make docs-options`"


def test_it_has_options_with_their_defaults():
    text = options_page()
    assert "grpo.beta" in text and "0.1" in text
