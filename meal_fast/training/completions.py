"""The answers of every update: completions.jsonl, a line a response, and what they say of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

import torch

from meal_fast.data.markers import MARKERS

from .batch import Batch, Task
from .metrics import LinesFile, finite
from .reward_hacking import RewardHacking

FILE = "completions.jsonl"
OWN_END = 0.7  # w_k, at least, of an answer that is counted at objective k's end of the simplex
Row = dict[str, Any]  # a line of completions.jsonl


def rows_of(task: Task, batch: Batch, names: Sequence[str], marks: Sequence[str]) -> list[Row]:
    """Give what an update learns from, a row a response, ready for JSON.

    `asked` is the preference that the response was sampled under. Of recipe ric, which learns from
    what it has and not from what it asked for, it is the rewards that the row's prompt holds.
    """
    rolled, scored, k = batch.rolled, batch.scored, len(names)
    asked_RK = rolled.condition_RK if batch.asked_RK is None else batch.asked_RK
    values = torch.cat([asked_RK, scored.reward_RK, scored.score_R[:, None]], 1).tolist()  # 1 copy
    rows = []
    for group, response, finish, row in zip(
        rolled.groups, rolled.texts, rolled.finish, values, strict=True
    ):
        prompt = rolled.prompts[group]
        rows.append(
            {
                "update": task.update,
                "task": task.number,
                "prompt_id": prompt.id,
                "prompt": prompt.text,
                "asked": {name: round(x, 6) for name, x in zip(names, row[:k], strict=True)},
                "response": response,
                "rewards": {  # None: the objective does not apply to the response
                    name: None if x != x else x
                    for name, x in zip(names, row[k : 2 * k], strict=True)
                },
                "score": row[-1],
                "finish": finish,
                **({"marks": {m: MARKERS[m](response) for m in marks}} if marks else {}),
            }
        )
    return rows


def at_ends(
    rows: Sequence[Row], names: Sequence[str], ordinary: Container[str] = ()
) -> dict[str, dict[str, float]]:
    """Say of each objective what the answers at its own end are like, where there are any.

    Those to ordinary prompts, by id, do not count: no preference is to change them; nor do those
    that it does not apply to.

    `rows`: how many were asked for w_k ≥ 0.7; `reward` and `spread`: mean and standard deviation of
    their raw reward k; and the share that bears each mark.
    """
    found = {}
    for name in names:
        own = [
            row
            for row in rows
            if row["asked"][name] >= OWN_END
            and row["prompt_id"] not in ordinary
            and row["rewards"][name] is not None
        ]
        if not own:
            continue
        rewards = [row["rewards"][name] for row in own]
        mean = sum(rewards) / len(own)
        spread = (sum((r - mean) ** 2 for r in rewards) / len(own)) ** 0.5
        found[name] = {"rows": len(own), "reward": mean, "spread": spread} | {
            mark: sum(row["marks"][mark] for row in own) / len(own)
            for mark in own[0].get("marks", ())
        }
    return found


class Completions:
    """Keep the rows of every update, tell them, and add to its metrics what they show.

    Args:
        written: bytes to keep of the file; what a run did after its checkpoint is done again.
        keep: whether the rows are written; they are told in any case.
        hacking: judges the metrics of the ends; None: policies that read no preference have none.
        ordinary: ids of prompts that are not counted there.
        told: called with the rows of each update, before its metrics are.
    """

    def __init__(
        self,
        out: Path,
        names: Sequence[str],
        *,
        written: int,
        keep: bool,
        hacking: RewardHacking | None,
        told: Callable[[list[Row]], None],
        ordinary: Container[str] = (),
    ) -> None:
        self._names, self._hacking = tuple(names), hacking
        self._told, self._written, self._ordinary = told, written, ordinary
        there = (out / FILE).is_file()
        self._file = None
        if keep or there:
            self._written = written if there else 0  # who needed the room has removed it
            self._file = LinesFile(out / FILE, self._written)
        self._keep = keep

    def add(self, rows: Sequence[Row], line: dict[str, Any]) -> dict[str, Any]:
        """Take what an update learnt from; give its metrics with what the answers add."""
        if self._file is not None and self._keep and rows:
            text = "\n".join(json.dumps(finite(row), ensure_ascii=False) for row in rows)
            # What a model says may hold half of a pair of surrogates, which has no UTF-8.
            self._file.write(text.encode("utf-8", "replace"))
        self._told(list(rows))
        if self._hacking is not None and (ends := at_ends(rows, self._names, self._ordinary)):
            line = self._hacking.judged(line | {"ends": ends})
        return line

    def sync(self) -> int:
        """Bring what was written to the disk; give the file's length."""
        return self._written if self._file is None else self._file.sync()

    @property
    def digest(self) -> dict[str, str]:
        """Give the SHA-256 of the file, by its name, where there is one."""
        return {} if self._file is None else self._file.digest

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
