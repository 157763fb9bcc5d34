"""Objectives that are computed exactly, in no time: what a short and what a full answer is.

For `--objectives brief=meal_fast.data.measures:brief detailed=meal_fast.data.measures:detailed`,
the pair of the preset `demo`; and to copy for a measure of your own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

BRIEF, FULL = 8, 16  # words of a brief answer; words of content in a full one
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")


def brief(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Give 1 to a whole sentence of at most 8 words; less to a longer answer, half to a cut one.

    exp(-max(0, words - 8) / 8), halved where no mark ends it; 0 below three words.
    """
    return [_brief(response) for response in responses]


def detailed(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Give the share of 16 that an answer has in different words of content, at most 1.

    A word of content has five letters or more. Repeating them costs: times their share of distinct
    ones, over 0.8, at most 1.
    """
    return [_detailed(response) for response in responses]


def _brief(response: str) -> float:
    words = len(_WORD.findall(response))
    if words < 3:
        return 0.0
    whole = response.rstrip().endswith((".", "!", "?", "。", "”", '"'))
    return math.exp(-max(0, words - BRIEF) / BRIEF) * (1.0 if whole else 0.5)


def _detailed(response: str) -> float:
    content = [word.casefold() for word in _WORD.findall(response) if len(word) >= 5]
    if not content:
        return 0.0
    distinct = len(set(content))
    return min(1.0, distinct / FULL) * min(1.0, distinct / len(content) / 0.8)
