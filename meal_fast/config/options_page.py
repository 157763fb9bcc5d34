"""docs/configuration.md, made from the dataclasses; run as a module, it prints the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from .config import Config, choices_of
from .options import as_flags, options
from .presets import PRESETS
from .recipes import RECIPES

HEAD = """# Configuration

Every option of `meal-fast train`, from the dataclasses in `meal_fast/config/`. A flag is
`--section.option VALUE`, a TOML file says `option = value` below `[section]`, and a preset gives
way to the file, the file to the flags. Values are checked before anything is loaded; what is wrong
is one line and exit code 2. [P] is stated in a paper, [R] is our reading of what they leave open.

This page is generated: `make docs-options` writes it.
"""


def options_page() -> str:
    """Give the page as Markdown: a table for each section, the recipes, the presets."""
    parts = [HEAD]
    sections: dict[str, list[tuple[dataclasses.Field[Any], Any]]] = {}
    for section, field, value in options(Config()):
        sections.setdefault(section, []).append((field, value))
    for section, fields in sections.items():
        parts.append(f"## {section or 'The run'}\n")
        rows = ((_named(section, f), _kind(f), _shown(v), f.metadata["help"]) for f, v in fields)
        parts.append(_table(("option", "value", "default", "what it is"), rows))
    parts.append("## Recipes\n")
    made = ((f"`{n}`", r.score, r.loss, r.outer, r.collector, r.about) for n, r in RECIPES.items())
    parts.append(_table(("recipe", "score", "loss", "outer loop", "responses", "about"), made))
    parts.append("## Presets\n\nWhat each changes of the defaults above:\n")
    for name, preset in PRESETS.items():
        flags = " ".join(_quoted(as_flags(preset, Config())))
        parts.append(f"`{name}`\n: `{flags}`\n")
    return "\n".join(parts)


def _named(section: str, field: dataclasses.Field[Any]) -> str:
    return f"`--{section}.{field.name}`" if section else f"`--{field.name}`"


def _kind(field: dataclasses.Field[Any]) -> str:
    kind = str(field.type)
    if choices := choices_of(kind):
        return ", ".join(choices)
    many = kind.startswith("tuple[")
    one = kind.removeprefix("tuple[").partition(",")[0]
    return f"any number of {one}" if many else one


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text}`" if text else "empty"


def _quoted(flags: Iterable[str]) -> Iterable[str]:
    return (f"'{flag}'" if " " in flag else flag for flag in flags)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Give a Markdown table; a bar in a cell would end it."""
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    lines += [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


if __name__ == "__main__":
    print(options_page(), end="")
