"""Self-contained pages from templates: light and dark, nothing fetched.

Every text is escaped where it is put in; only our own figures, style sheet and script are not. The
page's policy lets that one script run, by its hash, and no other.
"""

from __future__ import annotations

import base64
import hashlib
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

    from .plots import Draw

TEMPLATES = Path(__file__).with_name("templates")


def page(template: str, *, script: str, **values: Any) -> str:
    """Fill in a template of templates/, `title` among the values; `script`: a file there."""
    from markupsafe import Markup

    code = (TEMPLATES / script).read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    ours = {"style": _style(), "script": Markup(code), "script_hash": Markup(digest)}
    return _environment().get_template(template).render(**ours, **values)


def figure(draw: Draw, label: str, size: tuple[float, float]) -> Markup:
    """Draw one panel as inline SVG, with `label` for who cannot see it."""
    from markupsafe import Markup, escape

    from . import plots

    drawn = plots.panels([draw], columns=1, size=size)
    return Markup(plots.svg(drawn, str(escape(label))))  # what it writes in it, it escapes itself


@lru_cache(maxsize=1)
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _style() -> Markup:
    from markupsafe import Markup

    from .plots import THEME

    light = "".join(f"--{name}:{colours[0]};" for name, colours in THEME.items())
    dark = "".join(f"--{name}:{colours[1]};" for name, colours in THEME.items())
    sheet = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    return Markup(
        f":root{{color-scheme:light dark;{light}}}\n"
        f"@media(prefers-color-scheme:dark){{:root{{{dark}}}}}\n{sheet}"
    )
