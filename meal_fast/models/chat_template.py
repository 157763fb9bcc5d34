"""A model's chat template, made fast for a run: one text that says the same on every day.

What transformers takes as a chat template may be one of several named ones, print today's date,
want its texts in parts or a system turn first, and have switches. `prepared` puts what a run
decides about these in front of the template's text, where whatever applies chat templates obeys it.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meal_fast.common import write_atomic
from meal_fast.config.run_dir import read_json
from meal_fast.config.sealed import TEMPLATE as FILE
from meal_fast.data.template_dates import frozen, literal

from .preference_template import without_preference

_BEGIN, _END = "{#- meal-fast: run -#}", "{#- meal-fast: run end +#}"
_MARK = "\u241f"  # stands for a turn's text while it is looked for in what the template makes
_GIVEN = frozenset(  # variables that are no switches: whoever applies the template sets them
    "messages tools documents preference add_generation_prompt bos_token eos_token pad_token "
    "unk_token sep_token cls_token mask_token raise_exception strftime_now".split()
)

_SYSTEM = """\
{%- if not messages or messages[0]['role'] not in ['system', 'developer'] -%}
{%- set messages = [{'role': 'system', 'content': @TEXT@}] + messages -%}
{%- endif -%}"""

# A template that takes content in parts alone is given texts as parts.
_PARTS = """\
{%- set whole = namespace(messages=[], parts=[]) -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}
{%- set whole.parts = [{'type': 'text', 'text': message['content']}] -%}
{%- set whole.messages = whole.messages + [{'role': message['role'], 'content': whole.parts}] -%}
{%- else -%}
{%- set whole.messages = whole.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = whole.messages -%}"""


def default_template(tokenizer: Any) -> str:
    """Give the chat template that is applied where none is named.

    Raises ValueError for a tokenizer that has none, or named ones without a `default`.
    """
    held = tokenizer.chat_template
    if isinstance(held, dict):
        if "default" not in held:
            raise ValueError(
                f"its tokenizer has chat templates {', '.join(sorted(held))}, and none is named "
                "default; name one so in its files"
            )
        held = held["default"]
    if not isinstance(held, str) or not held:
        raise ValueError(
            "its tokenizer has no chat template; put one into the model's folder as "
            "chat_template.jinja, or take the model's instruction-tuned version"
        )
    return held


def keep_template(run: Path, template: str) -> None:
    """Write the run's template into its folder, unless one is there: what it says stays."""
    if not (run / FILE).is_file():
        write_atomic(run / FILE, json.dumps({"chat_template": template}, indent=1))


def kept_template(run: Path) -> str | None:
    """Read the run's template; None where it has none (yet). Raises ValueError for a broken one."""
    if not (run / FILE).is_file():
        return None
    template = read_json(run, FILE).get("chat_template")
    if not isinstance(template, str) or not template.strip():
        raise ValueError(f"RUN={str(run)!r}: {FILE} holds no chat_template; restore it from a copy")
    return template


def with_default(tokenizer: Any, template: str) -> Any:
    """Give what `tokenizer.chat_template` becomes with another default: other names stay."""
    held = tokenizer.chat_template
    return held | {"default": template} if isinstance(held, dict) else template


def prepared(
    tokenizer: Any,
    template: str,
    switches: Sequence[str] = (),
    system: str = "",
    now: datetime.datetime | None = None,
) -> str:
    """Give the template with the date as it is `now`, its switches set, and a system turn put
    first where a conversation has none; texts become parts where it takes nothing else.

    switches: `name=value`, JSON or else a text. What is given when it is applied goes before them.
    Raises ValueError for a switch that the template does not read, and for a template that cannot
    say one turn of a user.
    """
    template = without_preference(template)
    known = _variables(template)
    before = frozen(template, now or datetime.datetime.now())
    dated = before + template
    for entry in switches:
        name, value = _switch(entry, known)
        before += f"{{%- if {name} is not defined -%}}{{%- set {name} = {literal(value)} -%}}"
        before += "{%- endif -%}"
    if system:
        before += _SYSTEM.replace("@TEXT@", literal(system)).replace("\n", "")
    said = _said(tokenizer, before + template, _MARK)
    if said is None or said.count(_MARK) != 1:
        before += _PARTS.replace("\n", "")
        parts = _said(tokenizer, before + template, _MARK)
        if parts is None or parts.count(_MARK) != 1:
            raise ValueError(_why_not(tokenizer, dated, said, system))
    return _BEGIN + before + _END + template if before else template


def _why_not(tokenizer: Any, template: str, said: str | None, system: str) -> str:
    if said is not None:
        return "the tokenizer's chat template does not hold the user's text exactly once"
    turns = [("system", system or "Be kind."), ("user", _MARK)]
    try:
        applied(tokenizer, template, turns)
    except ValueError as error:
        if system:
            return f"policy.system={system[:40]!r}: its chat template does not take it ({error})"
    else:
        return (
            "its chat template wants a system turn before the user's; give its text as "
            "policy.system"
        )
    try:
        applied(tokenizer, template, turns[1:])
    except ValueError as error:
        return f"its chat template cannot say a user's turn ({error})"
    return "its chat template cannot say a user's turn"


def _said(tokenizer: Any, template: str, text: str) -> str | None:
    try:
        return applied(tokenizer, template, [("user", text)])
    except ValueError:
        return None


def applied(
    tokenizer: Any,
    template: str,
    turns: Sequence[tuple[str, str]],  # (role, text)
    *,
    reply: bool = True,  # end with the header of an answer
    **given: Any,
) -> str:
    """Give what the template makes of a conversation. Raises ValueError, one line, where it fails.

    transformers has jinja2 in a sandbox; what a template raises there can be anything.
    """
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        said: str = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=reply, **given
        )
    except Exception as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    return said


def end_of_turn(tokenizer: Any, template: str) -> str:
    """Give the token that ends an assistant's turn; "" where the template says no such turn.

    Raises ValueError for a turn that ends with a text that is no token: where an answer ends could
    not be told.
    """
    tails = []
    for more in ([("user", "b")], []):  # some leave the end out of the last turn
        turns = [("user", "a"), ("assistant", _MARK), *more]
        try:
            said = applied(tokenizer, template, turns, reply=False)
        except ValueError:
            continue
        if said.count(_MARK) == 1:
            tails.append(said.partition(_MARK)[2])
    tokens = [t for t in tokenizer.added_tokens_encoder if t.strip()]
    for tail in tails:
        found = [t for t in tokens if tail.lstrip().startswith(t)]
        if found:
            return max(found, key=len)
    for tail in tails[-1:]:
        said = tail.strip()
        if said and len(tokenizer.encode(said, add_special_tokens=False)) == 1:
            return said
        raise ValueError(
            f"its chat template ends an assistant's turn with {tail[:40]!r}, which is no token: "
            "nothing tells where an answer ends; let the template end the turn with the model's "
            "own end token, {{ eos_token }} say"
        )
    return ""


def text_markers(tokenizer: Any, template: str) -> tuple[str, ...]:
    """Give the plain texts by which the template tells turns apart, `[/INST]` say.

    Words alone are none, nor what the tokenizer has as a token: a text cannot become that.
    """
    two = [("user", _MARK), ("assistant", _MARK)]
    try:
        between = applied(tokenizer, template, [*two, *two]).split(_MARK)
    except ValueError:
        try:
            between = applied(tokenizer, template, two[:1]).split(_MARK)
        except ValueError:
            return ()
    tokens = sorted(tokenizer.added_tokens_encoder, key=len, reverse=True)
    pieces = "\n".join(between[1:])
    for token in tokens:
        if token.strip():
            pieces = pieces.replace(token, "\n")
    lines = dict.fromkeys(line.strip() for line in pieces.splitlines())
    return tuple(x for x in lines if len(x) > 2 and not re.fullmatch(r"[\w\s]*", x))


def _switch(entry: str, known: frozenset[str]) -> tuple[str, Any]:
    name, _, text = entry.partition("=")
    if name not in known - _GIVEN:
        switches = ", ".join(sorted(known - _GIVEN)) or "none"
        raise ValueError(
            f"policy.template_kwargs={entry!r}: its chat template does not read {name!r}; what it "
            f"reads: {switches}"
        )
    try:
        return name, json.loads(text)
    except ValueError:
        return name, text


def _variables(template: str) -> frozenset[str]:
    """Give the names that a template reads and does not set. Raises ValueError for no template."""
    from jinja2 import TemplateError, meta, nodes
    from transformers.utils import chat_template_utils

    try:
        environment = chat_template_utils._compile_jinja_template(template).environment
        tree = environment.parse(template)
    except TemplateError as error:
        line = " ".join(str(error).split())
        raise ValueError(f"its chat template is no Jinja template ({line})") from None
    found = frozenset(meta.find_undeclared_variables(tree))  # none of what transformers gives
    read = {name.name for name in tree.find_all(nodes.Name)}
    own = {macro.name for macro in tree.find_all(nodes.Macro)}
    return found | (read & _GIVEN) - own
