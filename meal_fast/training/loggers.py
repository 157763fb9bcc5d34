"""The loggers beside metrics.jsonl: numbers of every update, and some of the answers as text."""

from __future__ import annotations

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
    """Log to TensorBoard, Weights & Biases or trackio, when asked to."""

    def __init__(self, kind: str, out: Path, config: dict[str, Any]) -> None:
        self._kind = kind
        self._rows: dict[int, list[dict[str, Any]]] = {}
        self._writer: Any = None
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(out / "tensorboard"))
        elif kind == "wandb":
            import wandb

            self._writer = wandb
            wandb.init(project=PROJECT, dir=str(out), config=config)
        elif kind == "trackio":
            import trackio

            self._writer = trackio
            trackio.init(project=PROJECT, name=out.name, config=config, embed=False)

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
        if self._kind == "tensorboard":
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, step)
            if rows:
                self._writer.add_text("completions", markdown(rows), step)
        else:
            if rows:
                columns, data = table(rows)
                numbers["completions"] = self._writer.Table(columns=columns, data=data)
            self._writer.log(numbers, step=step)

    def close(self) -> None:
        """Bring all of it to where it belongs."""
        if self._kind == "tensorboard":
            self._writer.close()
        elif self._kind != "none":
            self._writer.finish()


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
