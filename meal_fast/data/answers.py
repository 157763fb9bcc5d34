"""Answers that a supervised start learns: those of a file, to prompts of its own or to any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from meal_fast.common import parse_json
from meal_fast.data_types import Prompt, rng_seed

from .assets import asset
from .assets.splitting import text_id
from .prompts import lines_of

PACKAGED = "packaged:refusals"


@dataclass(frozen=True)
class AnswerRows:
    """Hold the answers of one source, and how many of its rows were refused, by reason."""

    to: Mapping[str, tuple[str, ...]]  # by a prompt's id
    to_any: tuple[str, ...]  # of rows without a prompt
    refused: Mapping[str, int]

    def of(self, prompt: Prompt, *rng_key: int | str) -> str | None:
        """Choose an answer to a prompt, its own before one to any; None: there is none."""
        rows = self.to.get(prompt.id) or self.to_any
        if not rows:
            return None
        rng = np.random.Generator(np.random.Philox(key=rng_seed(*rng_key, prompt.id)))
        return rows[int(rng.integers(len(rows)))]


def read_answer_rows(source: str, held_out: frozenset[str]) -> AnswerRows:
    """Read `packaged:refusals`, or a .jsonl file with the keys `response` and, at will, `prompt`.

    Rows without a response, and those to a prompt whose id is in `held_out`, are refused and
    counted. Raises ValueError for a file that cannot be read or is not JSON lines, and for one of
    which no row is left.
    """
    packaged = source == PACKAGED
    path = asset("prompts") / "refusals.jsonl" if packaged else Path(source)
    to: dict[str, list[str]] = {}
    refused = {"no response": 0, "prompt of the evaluation": 0}
    for number, line in lines_of(path):
        try:
            row = parse_json(line, strict=False)
        except ValueError as error:
            raise ValueError(f"answers {source!r}, line {number}: not JSON ({error})") from None
        given, prompt = (row.get(k) if isinstance(row, dict) else None for k in _KEYS)
        ids = text_id(prompt.strip()) if isinstance(prompt, str) and prompt.strip() else ""
        if not isinstance(given, str) or not given.strip():
            refused["no response"] += 1
        elif ids in held_out:
            refused["prompt of the evaluation"] += 1
        else:
            to.setdefault(ids, []).append(given.strip())
    if not to:
        counted = ", ".join(f"{reason}: {n}" for reason, n in refused.items())
        raise ValueError(
            f"answers {source!r}: no row is left ({counted}); a row is "
            '{"response": "some text"}, with "prompt" where it answers that one alone'
        )
    whole = {prompt: tuple(rows) for prompt, rows in to.items()}
    return AnswerRows(whole, whole.pop("", ()), refused)


_KEYS = ("response", "prompt")
