"""Which kind of thing an objective's source is: the one rule for loading it and for trusting it."""

from __future__ import annotations

import re

FUNCTION = re.compile(r"(?!.*\.py:)[A-Za-z_][\w.]*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
SCHEMES = ("http://", "https://")
WORLDS = ("world:", "meal_fast.worlds:")  # the latter in runs of before


def is_outside(source: str) -> bool:
    """Whether a source runs code of its own, or is sent the texts: a function or a server."""
    if source.startswith(("packaged:", *WORLDS)):  # which look like module:function
        return False
    return source.startswith(SCHEMES) or bool(FUNCTION.fullmatch(source))
