"""The options of a Config as one table, by `section.option`. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from .config import Config
from .errors import nearest

# What the papers' constants are called, where the last word of an option does not say which.
_SHORT = {
    "alpha": "preference.alpha",
    "beta": "grpo.beta",
    "normalization": "score.normalization",
}


def options(config: Config) -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Yield every option as (section, field, value); the section of a top-level one is empty."""
    sections = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            sections.append((field.name, value))
        else:
            yield "", field, value
    for name, section in sections:
        for field in dataclasses.fields(section):
            yield name, field, getattr(section, field.name)


def values_of(config: Config) -> dict[str, Any]:
    """Give every option's value, by `section.option`."""
    return {dotted(section, field): value for section, field, value in options(config)}


def option_named(name: str, config: Config) -> str:
    """Give the `section.option` that is meant by itself, its last word, or a paper's constant.

    Raises ValueError where there is no such option, or more than one.
    """
    known = values_of(config)
    if name in known or name in _SHORT:
        return _SHORT.get(name, name)
    same = [option for option in known if option.rpartition(".")[2] == name]
    if len(same) > 1:
        raise ValueError(f"{name}: is it {' or '.join(same)}? Write the section too")
    if not same:
        raise ValueError(f"{name}: unknown option{nearest(name, list(known))}")
    return same[0]


def typed(option: str, text: str, config: Config) -> Any:
    """Read `text` as a value of `section.option`; config.py refuses what is none."""
    field = next(f for section, f, _ in options(config) if dotted(section, f) == option)
    return typed_as(text, unit(field))


def nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """Turn {"section.option": value} into the nested tables that `config.from_dict` reads."""
    tables: dict[str, Any] = {}
    for option, value in options.items():
        section, _, name = option.rpartition(".")
        (tables.setdefault(section, {}) if section else tables)[name] = value
    return tables


def as_flags(config: Config, base: Config) -> list[str]:
    """Give the command line that makes `config` of `base`: every option that differs."""
    flags: list[str] = []
    before = values_of(base)
    for option, value in values_of(config).items():
        if value == before[option]:
            continue
        if isinstance(value, tuple):
            flags += [f"--{option}", *map(str, value)]
        else:
            flags.append(f"--{option}={str(value).lower() if isinstance(value, bool) else value}")
    return flags


def dotted(section: str, field: dataclasses.Field[Any]) -> str:
    """Name an option as a flag does, without the dashes."""
    return f"{section}.{field.name}" if section else field.name


def unit(field: dataclasses.Field[Any]) -> str:
    """Name the type of one value of the field: `float` for both `float` and `tuple[float, ...]`."""
    return str(field.type).removeprefix("tuple[").partition(",")[0]


def typed_as(text: str, kind: str) -> Any:
    """Read `text` as a number or a truth value where the option is one.

    What is none stays text for config.py to refuse, so that a flag and a file are told the same.
    """
    if kind == "bool":
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind not in ("int", "float"):
        return text
    try:
        return int(text) if kind == "int" else float(text)
    except ValueError:
        return text
