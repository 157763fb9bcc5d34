"""The date that a chat template prints, held at one moment."""

from __future__ import annotations

import datetime
import json
from typing import Any

_DIRECTIVES = "aAbBcCdDeFfgGhHIjklmMnpPrRsStTuUVwWxXyYzZ"  # glibc's, and Python's own
_PERCENT = "\u241e"  # stands for a percent sign that is meant


def frozen(template: str, now: datetime.datetime) -> str:
    """Give a macro that stands for transformers' `strftime_now`, at one moment; "" where `template`
    prints no date, or has such a macro already.

    What the template asks for word for word says what it says on that day. A form that it makes up
    where it is applied is taken apart, and refused there where something in it is not known.
    """
    if "strftime_now" not in template:
        return ""
    forms, others = _dates(template)
    if not forms and not others:
        return ""
    known = literal({form: now.strftime(form) for form in forms})
    said = "{{- known[format] -}}"
    if others:
        said = f"format | replace('%%', '{_PERCENT}')"
        for letter in _DIRECTIVES:
            for form in (f"%-{letter}", f"%{letter}"):
                if "%" not in (value := now.strftime(form)):
                    said += f" | replace('{form}', {literal(value)})"
        said = (
            f"{{%- set said = {said} -%}}"
            "{%- if format in known -%}{{- known[format] -}}{%- elif '%' in said -%}"
            "{{- raise_exception('strftime_now: a date cannot be written as ' ~ format) -}}"
            f"{{%- else -%}}{{{{- said | replace('{_PERCENT}', '%') -}}}}{{%- endif -%}}"
        )
    said = f"{{%- set known = {known} -%}}{said}"
    return f"{{%- macro strftime_now(format) -%}}{said}{{%- endmacro -%}}"


def _dates(template: str) -> tuple[list[str], bool]:
    """Give the formats that `strftime_now` is asked for word for word, and whether it is asked for
    others: in a variable, or under another name."""
    from jinja2 import nodes
    from transformers.utils import chat_template_utils

    tree = chat_template_utils._compile_jinja_template(template).environment.parse(template)
    if any(macro.name == "strftime_now" for macro in tree.find_all(nodes.Macro)):
        return [], False
    forms, told = [], 0
    for call in tree.find_all(nodes.Call):
        given = [*call.args, *(k.value for k in call.kwargs if k.key == "format")]
        if isinstance(call.node, nodes.Name) and call.node.name == "strftime_now":
            if isinstance(given[0] if given else None, nodes.Const):
                forms.append(str(given[0].value))
                told += 1
    for test in tree.find_all(nodes.Test):  # is it there at all?
        told += isinstance(test.node, nodes.Name) and test.node.name == "strftime_now"
    read = sum(name.name == "strftime_now" for name in tree.find_all(nodes.Name))
    return list(dict.fromkeys(forms)), read > told


def literal(value: Any) -> str:
    """Write a JSON value as Jinja has it."""
    if isinstance(value, dict):
        pairs = (f"{literal(k)}: {literal(v)}" for k, v in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(literal, value))}]"
    if value is None:
        return "none"
    if isinstance(value, str):  # a line's end would end a comment of none, but spoil a template
        return json.dumps(value, ensure_ascii=False)
    return json.dumps(value)
