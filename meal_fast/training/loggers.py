"""The loggers beside metrics.jsonl: numbers of every update, and some of the answers as text."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meal_fast.common import printable
from meal_fast.config.run_dir import flat

ANSWERS_EVERY, ANSWERS = 5, 8  # every so many updates, so many of one's answers
PROJECT = "meal-fast"


def check_logger(kind: str) -> None:
    """Raise ValueError where the logger's package, named like it, is missing."""
    if kind != "none" and importlib.util.find_spec(kind) is None:
        raise ValueError(f"logger={kind!r}: pip install {kind}, or use logger none")


class Loggers:
    """Log to TensorBoard, Weights & Biases or trackio, when asked to: accelerate's trackers."""

    def __init__(self, kind: str, out: Path, config: dict[str, Any]) -> None:
        self._kind = kind
        self._rows: dict[int, list[dict[str, Any]]] = {}
        self._tracker: Any = None
        if kind == "none":
            return
        # Here, not above: most runs do without.
        from accelerate import tracking

        if kind == "tensorboard":
            self._tracker = tracking.TensorBoardTracker(kind, logging_dir=str(out))
        elif kind == "wandb":
            self._tracker = tracking.WandBTracker(PROJECT, dir=str(out), config=config)
        else:
            how: dict[str, Any] = {"name": out.name, "config": config, "embed": False}
            self._tracker = tracking.TrackioTracker(PROJECT, **how)
        self._tracker.main_process_only = False  # it is made on that one alone
        self._tracker.start()

    def answers(self, rows: Sequence[dict[str, Any]]) -> None:
        """Take the rows of an update; they are logged with its metrics, which come later."""
        if self._kind != "none" and rows and rows[0]["update"] % ANSWERS_EVERY == 0:
            step = max(len(rows) // ANSWERS, 1)  # spread over prompts and preferences
            self._rows[rows[0]["update"]] = list(rows[::step][:ANSWERS])

    def update(self, metrics: dict[str, Any]) -> None:
        """Log an update's numbers, and its answers where they are due."""
        if self._kind == "none":
            return
        step = metrics["update"]
        rows = self._rows.pop(step, [])
        numbers = {k: v for k, v in flat(metrics).items() if isinstance(v, int | float)}
        numbers |= {f"w{i}": x for i, x in enumerate(metrics["w"])}
        values: dict[str, Any] = numbers
        if rows and self._kind == "tensorboard":
            values = numbers | {"completions": markdown(rows)}
        elif rows:
            columns, data = table(rows)
            made = importlib.import_module(self._kind).Table(columns=columns, data=data)
            values = numbers | {"completions": made}
        self._tracker.log(values, step=step)

    def close(self) -> None:
        """Bring all of it to where it belongs."""
        if self._tracker is not None:
            self._tracker.finish()


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Give rows of completions.jsonl as a table: its columns' names, and its lines."""
    names = list(rows[0]["asked"])
    marks = list(rows[0].get("marks", ()))
    columns = ["prompt", *(f"asked {n}" for n in names), "response", *names, *marks, "finish"]
    data = [
        [
            printable(row["prompt"]),
            *row["asked"].values(),
            printable(row["response"]),
            *row["rewards"].values(),
            *(row["marks"][mark] for mark in marks),
            row["finish"],
        ]
        for row in rows
    ]
    return columns, data


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Give rows of completions.jsonl as Markdown; what a model wrote is an indented block of it."""
    parts = []
    for row in rows:
        asked = ", ".join(f"{name} {x:.2f}" for name, x in row["asked"].items())
        got = ", ".join(f"{name} {x:+.2f}" for name, x in row["rewards"].items() if x is not None)
        marks = "".join(f", {mark}" for mark, there in row.get("marks", {}).items() if there)
        text = printable(f"{row['prompt']}\n\n{row['response']}")
        block = "\n".join(f"    {line}" for line in text.splitlines())
        parts.append(f"**asked {asked}** got {got}{marks}\n\n{block}\n")
    return "\n---\n\n".join(parts)
