"""Prompt sets: packaged, local files, and the papers' hub data sets, as `Prompt` values.

A source is `packaged:safety`, `packaged:benign` or `packaged:mixed`; a local `.jsonl` file (key
`prompt`) or `.txt` file (one prompt a line); or a name in `HUB`, with `?path=FOLDER` when its files
lie there (in the layout that `datasets` reads) instead of on the hub.

Which split a packaged or local prompt falls in depends on its text alone: 75 % train, 10 %
validation, 15 % evaluation. A hub set keeps its own test split for evaluation; of its train split
5 % are kept for validation [R].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from meal_fast.common import parse_json, require_text
from meal_fast.data_types import Prompt, rng_seed

from .assets import asset
from .assets.splitting import SPLITS, split_of, text_hash, text_id, unique
from .toy import world_prompts

PACKAGED = ("safety", "benign", "mixed")

Count = Callable[[str], int]  # tokens of a text


def load_prompts(
    source: str,
    split: str,
    *,
    whole: bool = False,
    count_tokens: Count | None = None,
    max_tokens: int | None = None,
) -> tuple[Prompt, ...]:
    """The prompts of one split of `source`, stripped, without repeats, in a fixed order.

    Args:
        split: "train", "validation" or "evaluation".
        whole: take all of a packaged set or local file: for a file that is itself held out.
        count_tokens: of the policy; without it a token counts as 4 characters.
        max_tokens: longer prompts are left out.

    Raises ValueError for an unknown source or split, a file that is missing, empty or broken (with
    the line's number), and a split in which nothing is left.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: choose from {', '.join(SPLITS)}")
    count = count_tokens or (lambda text: (len(text) + 3) // 4)
    name, _, query = source.partition("?")
    if name in HUB:
        texts = unique(list(_hub_texts(source, name, query, split, count)))
    elif name.startswith("world:"):
        texts = list(world_prompts(name.removeprefix("world:"), split))
    else:
        if name.startswith("packaged:"):
            path = _packaged(name)
        else:
            path = Path(source)
            if path.suffix not in (".jsonl", ".txt"):
                raise ValueError(
                    f"prompts {source!r}: neither packaged:NAME ({', '.join(PACKAGED)}), nor a "
                    f".jsonl or .txt file, nor one of {', '.join(HUB)}"
                )
        texts = unique(read_file(path))
        if not texts:
            raise ValueError(f"prompts {source!r}: the file has no prompts")
        if not whole:
            texts = [text for text in texts if split_of(text) == split]
    if max_tokens is not None:
        texts = [text for text in texts if count(text) <= max_tokens]
    if not texts:
        raise ValueError(
            f"prompts {source!r}: nothing is left in the {split} split; give more, or shorter, "
            "prompts"
        )
    return tuple(Prompt(text_id(text), text) for text in texts)


def _packaged(name: str) -> Path:
    short = name.removeprefix("packaged:")
    if short not in PACKAGED:
        raise ValueError(f"prompts {name!r}: unknown; choose from {', '.join(PACKAGED)}")
    return asset("prompts") / f"{short}.jsonl"


def read_file(path: Path) -> list[str]:
    """The prompts of a `.jsonl` or `.txt` file, in order; blank lines are passed over.

    Raises ValueError for a file that cannot be read, or a broken line, with its number.
    """
    if path.suffix == ".txt":
        return [line for _, line in lines_of(path)]
    return [text for (text,) in _columns(path, ("prompt",))]


def read_answers(path: Path) -> list[tuple[Prompt, str]]:
    """Prompts and the response to each, of a `.jsonl` file with the keys `prompt` and `response`.

    Raises ValueError as `read_file` does, and for a file without lines.
    """
    rows = [(text.strip(), response) for text, response in _columns(path, ("prompt", "response"))]
    if not rows:
        raise ValueError(f"prompts {str(path)!r}: the file has no prompts")
    return [(Prompt(text_id(text), text), response) for text, response in rows]


def lines_of(path: Path) -> list[tuple[int, str]]:
    """Give a file's lines that are not blank, with their numbers."""
    try:
        if path.exists() and not path.is_file():  # a device, or a pipe, has no end
            raise ValueError(f"prompts {str(path)!r}: cannot be read (it is no file)")
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ValueError(f"prompts {str(path)!r}: cannot be read ({reason})") from error
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def _columns(path: Path, names: Sequence[str]) -> list[tuple[str, ...]]:
    """The texts under these keys of a `.jsonl` file's lines."""
    rows = []
    for number, line in lines_of(path):
        where = f"prompts {str(path)!r}, line {number}"
        try:
            row = parse_json(line, strict=False)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON ({error})") from error
        texts = [row.get(name) if isinstance(row, dict) else None for name in names]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            wanted = ", ".join(f'"{name}": "some text"' for name in names)
            raise ValueError(f"{where}: needs {{{wanted}}}")
        for name, text in zip(names, texts, strict=True):
            require_text(str(text), f"{where}, {name}")
        rows.append(tuple(map(str, texts)))
    return rows


def held_out(train: str, evaluation: str) -> frozenset[str]:
    """Give the ids of the prompts that a run is evaluated on, of which it must not learn."""
    found = load_prompts(evaluation or train, "evaluation", whole=bool(evaluation))
    return frozenset(p.id for p in found)


T = TypeVar("T")


def in_turn(items: Sequence[T], first: int, count: int, seed: int, name: str) -> list[T]:
    """`count` items from number `first` on, reshuffled whenever all have had their turn.

    Depends on the arguments alone, not on what was taken before.
    """
    n = len(items)
    taken: list[T] = []
    for position in range(first, first + count):
        if not taken or position % n == 0:
            epoch = np.random.Philox(key=rng_seed(seed, name, position // n))
            order = np.random.Generator(epoch).permutation(n)
        taken.append(items[order[position % n]])
    return taken


def by_turns(
    main: Sequence[T], other: Sequence[T], share: float, step: int, count: int, seed: int, name: str
) -> list[T]:
    """Give `count` items for step number `step`, of which `share` are of `other`, each `in_turn`.

    Over all steps; a step's own number of them is the nearest below or above. An empty `other` has
    no share.
    """
    share = share if other else 0.0
    first, end = (round(at * count * share) for at in (step, step + 1))
    taken = in_turn(main, step * count - first, count - (end - first), seed, name)
    return taken + in_turn(other, first, end - first, seed, f"{name} other")


@dataclass(frozen=True)
class HubSet:
    """A data set of the hub: its splits, and how its rows become prompts."""

    train: str
    evaluation: str
    columns: tuple[str, ...]  # that a row must have
    texts: Callable[[Iterable[Mapping[str, Any]], Count, bool], Iterator[str]]
    config: str | None = None


def _plain(rows: Iterable[Mapping[str, Any]], count: Count, evaluation: bool) -> Iterator[str]:
    """The column `prompt` (UltraFeedback, BeaverTails): BPS takes them as they are [P]."""
    for row in rows:
        yield row["prompt"]


_LAST_TURN = re.compile(r"\n\nAssistant:(?!.*\n\nAssistant:)", re.DOTALL)


def hh_prompt(dialogue: str) -> str:
    """All of an HH-RLHF dialogue but the last answer, without the first and last speaker's mark.

    Between `\\n\\nHuman: ` and ` \\n\\nAssistant:` (as the HH reward models are given it) this is
    RiC's prompt, also when the dialogue has several turns.
    """
    before = _LAST_TURN.split(dialogue)[0]
    return before.strip().removeprefix("Human:").strip()


def _hh(rows: Iterable[Mapping[str, Any]], count: Count, evaluation: bool) -> Iterator[str]:
    """RiC's filter: 8 to 512 tokens with the chosen answer; of the test split every 4th row [P]."""
    for i, row in enumerate(rows):
        if (not evaluation or i % 4 == 0) and 8 <= count(row["chosen"]) <= 512:
            yield hh_prompt(row["chosen"])


def tldr_prompt(post: str) -> str:
    """RiC's prompt for a one-sentence summary of a post [P]."""
    post = post.replace("\n", " ")
    return (
        "### Instruction: Generate a one-sentence summary of this post. "
        f"### Input: {post} ### Response:"
    )


def _tldr(rows: Iterable[Mapping[str, Any]], count: Count, evaluation: bool) -> Iterator[str]:
    """RiC's filter: posts of 100 to 1200 characters (exclusive), one row a post in the order of
    the ids, 8 to 512 tokens with the better summary; of the test split the first 2000 [P]."""
    first: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        post, key = row["info"]["post"], row["info"]["id"]
        if post is not None and key is not None and 100 < len(post) < 1200:
            first.setdefault(key, row)
    chosen = [first[key] for key in sorted(first)]
    for row in chosen[:2000] if evaluation else chosen:
        prompt = tldr_prompt(row["info"]["post"])
        summary = row["summaries"][row["choice"]]["text"].replace("\n", " ").strip()
        if 8 <= count(f"{prompt} {summary}") <= 512:
            yield prompt


HUB: dict[str, HubSet] = {
    "HuggingFaceH4/ultrafeedback_binarized": HubSet(
        "train_prefs", "test_prefs", ("prompt",), _plain
    ),
    "PKU-Alignment/BeaverTails": HubSet("30k_train", "30k_test", ("prompt",), _plain),
    "Anthropic/hh-rlhf": HubSet("train", "test", ("chosen",), _hh),
    "openai/summarize_from_feedback": HubSet(
        "train", "validation", ("info", "summaries", "choice"), _tldr, "comparisons"
    ),
}


def _hub_texts(source: str, name: str, query: str, split: str, count: Count) -> Iterator[str]:
    from datasets import load_dataset

    key, _, path = query.partition("=")
    if query and (key != "path" or not path):
        raise ValueError(f"prompts {source!r}: unknown option {query!r}; known: path=FOLDER")
    if path and not Path(path).is_dir():
        raise ValueError(f"prompts {source!r}: no folder {path!r}")
    if path and any(Path(path).rglob("*.py")):
        raise ValueError(f"prompts {source!r}: {path!r} holds Python code; name a folder of data")
    hub = HUB[name]
    evaluation = split == "evaluation"
    try:
        rows = load_dataset(
            path or name, hub.config, split=hub.evaluation if evaluation else hub.train
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"prompts {source!r}: cannot be loaded ({reason})") from error
    missing = [column for column in hub.columns if column not in rows.column_names]
    if missing:
        raise ValueError(f"prompts {source!r}: no column {missing[0]!r} in {rows.column_names}")
    for text in hub.texts(rows, count, evaluation):
        if evaluation or (text_hash(text) % 20 == 0) == (split == "validation"):
            yield text
