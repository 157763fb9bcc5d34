"""The chat template of a policy: the base's own, with an optional argument `preference`.

Training, serving and whatever else applies chat templates read this one text: transformers, vLLM
and llama.cpp pass `preference` on (as `chat_template_kwargs` where they are servers). A preference
that somebody writes into a message is made one that the policy does not read: see `plain_pairs`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from decimal import Decimal

from meal_fast.data.preferences import MARKS, Goals

_BEGIN = "{#- meal-fast: preference -#}"
_END = "{#- meal-fast: end +#}"  # +: a space or a line's end after it stays
_OLDER = "{%- if preference is defined and preference -%}"  # how it began, and by what it ended
_OLDER_END = "{%- endif -%}"
GLUE = (" ", "\n")  # the first that a tokenizer never merges with a text's end
_CUT = "\u241f"  # stands where a run of marks was cut

# Every style: what others write is neither a preference nor a marker of turns. An assistant's own
# turns stay as they are.
_PLAIN = """\
{%- set plain = namespace(messages=[], parts=[], given=[], text='') -%}
{%- set pairs = @PAIRS@ -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' or not message['content'] -%}
{%- set plain.messages = plain.messages + [message] -%}
{%- elif message['content'] is string -%}
{%- set plain.text = message['content'] -%}
{%- for pair in pairs -%}
{%- set plain.text = plain.text | replace(pair[0], pair[1]) -%}
{%- endfor -%}
{%- if plain.text == message['content'] -%}
{%- set plain.messages = plain.messages + [message] -%}
{%- else -%}
{%- set turn = {'role': message['role'], 'content': plain.text} -%}
{%- set plain.messages = plain.messages + [turn] -%}
{%- endif -%}
{%- else -%}
{%- set plain.given = message['content'] -%}
{%- set plain.parts = [] -%}
{%- for part in plain.given -%}
{%- if part['type'] == 'text' -%}
{%- set plain.text = part['text'] -%}
{%- for pair in pairs -%}
{%- set plain.text = plain.text | replace(pair[0], pair[1]) -%}
{%- endfor -%}
{%- set plain.parts = plain.parts + [{'type': 'text', 'text': plain.text}] -%}
{%- else -%}
{%- set plain.parts = plain.parts + [part] -%}
{%- endif -%}
{%- endfor -%}
{%- set turn = {'role': message['role'], 'content': plain.parts} -%}
{%- set plain.messages = plain.messages + [turn] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = plain.messages -%}
"""

# Every style: checks what is given, then puts its text at the end of the last user turn. Only what
# llama.cpp's engine has too: no `round`, `//`, `**`, `1e-9`, `\u00e9`, and no digits in `format`.
# No loop over `message['content']` itself: vLLM would take the whole template for one of parts.
_TEMPLATE = """\
{%- if preference is defined and preference is not none and preference != '' -%}
{%- set names = @NAMES@ -%}
{%- set said = namespace(text='', total=0.0, user=-1, content='', messages=[], parts=[]) -%}
{%- if preference is string -%}
{%- set said.text = preference -%}
{%- elif preference is mapping -%}
{%- for name in preference -%}
{%- if name not in names -%}
{{- raise_exception('preference: ' ~ name ~ ' is none of ' ~ names | join(', ')) -}}
{%- endif -%}
{%- endfor -%}
{%- for name in names -%}
{%- if name not in preference -%}
{{- raise_exception('preference: lacks ' ~ name ~ ', of ' ~ names | join(', ')) -}}
{%- endif -%}
{%- set value = preference[name] -%}
{%- if value is not number or value is boolean or not value >= 0 -%}
{{- raise_exception('preference: ' ~ name ~ ' must be a number from 0 to 1') -}}
{%- endif -%}
{%- set said.total = said.total + value -%}
{%- endfor -%}
{%- if not (said.total >= 0.999999 and said.total <= 1.000001) -%}
{{- raise_exception('preference: the numbers of ' ~ names | join(', ') ~ ' must sum to 1') -}}
{%- endif -%}
@SAID@
{%- else -%}
{%- set these = names | join(', ') -%}
{{- raise_exception('preference: give a text, or a mapping of ' ~ these ~ ' to numbers') -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{%- set said.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if said.user < 0 -%}
{{- raise_exception('preference: needs a turn of the user, at whose end it is said') -}}
{%- endif -%}
{%- for message in messages -%}
{%- if loop.index0 != said.user -%}
{%- set said.messages = said.messages + [message] -%}
{%- else -%}
{%- if message['content'] is string -%}
{%- set said.content = message['content'] -%}
{%- else -%}
{%- set said.parts = message['content'] -%}
{%- for part in said.parts -%}
{%- if part['type'] != 'text' -%}
{{- raise_exception('preference: the last turn of the user must be text alone') -}}
{%- endif -%}
{%- set said.content = said.content ~ part['text'] -%}
{%- endfor -%}
{%- endif -%}
{%- set turn = {'role': 'user', 'content': said.content | trim ~ @GLUE@ ~ said.text} -%}
{%- set said.messages = said.messages + [turn] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = said.messages -%}
{%- endif -%}
"""

# n, the whole number next to exact · times, which `value` is but for its rounding (`off`, by
# Dekker's split); from the middle of two the even one: digits are Python's.
_ROUND = """\
{%- set value = exact * times -%}
{%- set n = (value + 0.5) | int -%}
{%- set head = exact * 134217729 - (exact * 134217729 - exact) -%}
{%- set off = head * times - value + (exact - head) * times -%}
{%- set tied = n - 0.5 == value and (off < 0 or (off == 0 and n % 2 == 1)) -%}
{%- if n - 0.5 > value or tied -%}{%- set n = n - 1 -%}{%- endif -%}"""

# [helpful=0.80 harmless=0.20]
_NUMBERS = """\
{%- for name in names -%}
{%- set exact = preference[name] -%}
{%- set times = 100 -%}
@ROUND@
{%- set digits = ((n - n % 100) / 100) | int ~ '.' ~ ((n % 100 - n % 10) / 10) | int ~ n % 10 -%}
{%- set said.text = said.text ~ (' ' if said.text else '[') ~ name ~ '=' ~ digits -%}
{%- endfor -%}
{%- set said.text = said.text ~ ']' -%}"""

# ++++++++--, by largest remainder: one more where fewer remainders are larger than marks are left.
_BAR = """
{%- set bar = namespace(left=10, marks='', ahead=0) -%}
{%- for name in names -%}
{%- set bar.left = bar.left - (preference[name] * 10 + 0.000000001) | int -%}
{%- endfor -%}
{%- for name in names -%}
{%- set i = loop.index0 -%}
{%- set whole = (preference[name] * 10 + 0.000000001) | int -%}
{%- set rest = ((preference[name] * 10 - whole) * 1000000 + 0.5) | int -%}
{%- set bar.ahead = 0 -%}
{%- for other in names -%}
{%- set part = preference[other] * 10 -%}
{%- set its = ((part - (part + 0.000000001) | int) * 1000000 + 0.5) | int -%}
{%- if its > rest or (its == rest and loop.index0 < i) -%}
{%- set bar.ahead = bar.ahead + 1 -%}
{%- endif -%}
{%- endfor -%}
{%- for _ in range(whole + (1 if bar.ahead < bar.left else 0)) -%}
{%- set bar.marks = bar.marks ~ @MARKS@[i] -%}
{%- endfor -%}
{%- endfor -%}
{%- set said.text = said.text ~ ' ' ~ bar.marks -%}"""

# <rm1_score> 0.3 <rm2_score> -1.2: the rewards that stand for w, see `Goals`. The root, w's length,
# by Newton's steps from above.
_SCORES = """\
{%- set low = @LO@ -%}
{%- set high = @HI@ -%}
{%- set norm = namespace(square=0.0, root=1.0) -%}
{%- for name in names -%}
{%- set norm.square = norm.square + preference[name] * preference[name] -%}
{%- endfor -%}
{%- for _ in range(12) -%}
{%- set norm.root = (norm.root + norm.square / norm.root) / 2 -%}
{%- endfor -%}
{%- for name in names -%}
{%- set i = loop.index0 -%}
{%- set goal = preference[name] / norm.root * (high[i] - low[i]) + low[i] -%}
{%- set exact = goal if goal > 0 else 0 - goal -%}
{%- set times = 10 -%}
@ROUND@
{%- set sign = '-' if goal < 0 and n > 0 else '' -%}
{%- set digits = sign ~ ((n - n % 10) / 10) | int ~ '.' ~ n % 10 -%}
{%- set digits = '<rm' ~ loop.index ~ '_score> ' ~ digits -%}
{%- set said.text = said.text ~ (' ' if said.text else '') ~ digits -%}
{%- endfor -%}"""


def preference_template(
    template: str,
    names: Sequence[str],
    style: str,
    goals: Goals | None = None,
    markers: Sequence[str] = (),
    glue: str = GLUE[0],
) -> str:
    """Give `template` an optional argument `preference`, said at the end of the user's last turn.

    It takes `preference_text` itself, or a mapping of the objectives `names` to numbers that sum
    to 1; for anything else the template raises, naming what it takes. One that an earlier run put
    in is replaced. Style `none` has no preference, and `scores` without goals only its text.

    markers: texts that tell turns apart in `template`; a message has none of them.
    glue: what stands between the user's text and the preference.
    """
    template = without_preference(template)
    pairs = plain_pairs(names, style, markers)
    listed = [list(pair) for pair in pairs]
    plain = _PLAIN.replace("@PAIRS@", json.dumps(listed, ensure_ascii=False)) if pairs else ""
    if style == "none":
        return _BEGIN + plain.replace("\n", "") + _END + template if pairs else template
    if style == "scores":
        said = _SCORES
        if goals is None:
            said = "{{- raise_exception('preference: this policy takes its text alone') -}}"
        else:
            said = said.replace("@LO@", _digits(goals.lo)).replace("@HI@", _digits(goals.hi))
    else:
        said = _NUMBERS + (_BAR if style == "bar" else "")
    marks = json.dumps([MARKS[i % len(MARKS)] for i in range(len(names))])
    whole = _TEMPLATE.replace("@SAID@", said).replace("@ROUND@", _ROUND)
    whole = whole.replace("@NAMES@", json.dumps(list(names), ensure_ascii=False))
    whole = plain + whole.replace("@MARKS@", marks).replace("@GLUE@", json.dumps(glue))
    return _BEGIN + whole.replace("\n", "") + _END + template


def plain_pairs(
    names: Sequence[str], style: str, markers: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """Give what is replaced by what, one after the other, in what others write.

    Afterwards a text holds no preference as `preference_text` writes it, and no marker. `name=0.`
    and `name=1.` go, `name=1` gets spaces; of four and more of the bar's marks the first three
    stay. What has none of these stays as it is. Done twice, it changes nothing more.
    """
    pairs = []
    if style in ("bar", "numbers"):
        pairs += [(f"{name}={digit}.", "…") for name in names for digit in "01"]
        pairs += [(f"{name}={digit}", f"{name} = {digit}") for name in names for digit in "01"]
    if style == "scores":
        pairs += [(f"<rm{k}_score>", f"< rm{k}_score>") for k in range(1, len(names) + 1)]
    if style == "bar":
        pairs += _shorter(MARKS[: len(names)])
    return pairs + [(marker, f"{marker[0]} {marker[1:]}") for marker in markers]


def _shorter(marks: Sequence[str]) -> list[tuple[str, str]]:
    """Cut runs of marks to three: behind each three a cut, and no marks right behind a cut."""
    runs: list[list[str]] = [[] for _ in range(5)]  # by length, of one or two marks, in order
    for i, one in enumerate(marks):
        for n in range(1, 5):
            runs[n].append(one * n)
            runs[n] += [one * a + other * (n - a) for other in marks[i + 1 :] for a in range(1, n)]
    pairs = [(_CUT, " "), *((run, run[:3] + _CUT) for run in runs[4])]
    for n in (3, 2, 1):
        pairs += [(_CUT + run, _CUT) for run in runs[n]]
    apart = [(_CUT + mark, f" {mark}") for mark in marks]  # of marks in another order
    return [*pairs, *apart, (_CUT, "")]


def without_preference(template: str) -> str:
    """Give the template as it was before `preference_template`, of this version or an older."""
    if template.startswith(_BEGIN):
        return template.partition(_END)[2]
    return template.partition(_OLDER_END)[2] if template.startswith(_OLDER) else template


def _digits(values: Sequence[float]) -> str:
    return f"[{', '.join(format(Decimal(repr(x)), 'f') for x in values)}]"
