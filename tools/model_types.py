"""Writes docs/model-types.md: every type of causal language model of transformers, as a policy.

make docs-models          (a minute)
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "model-types.md"
sys.path.insert(0, str(ROOT))

from tests.helpers.model_types import Outcome, judge, windowed  # noqa: E402

SAID = ("right", "refused", "wrong", "traceback", "not built")
OWN, PLAIN = "its own", "full"
HEAD = """\
# Which models can be a policy

Written by `make docs-models` with transformers {transformers}, torch {torch}, on a CPU; not edited
by hand.

Each of the {types} types of causal language model that transformers has is built small with random
weights, saved, and loaded as a policy. `load_policy` probes it: a few tokens through transformers'
own attention, through a packed pass, and through prompts, suffixes and single tokens with keys and
values kept. Where log-probabilities are more than 1e-3 nats apart it is refused, in one line. What
the probe lets through is then sampled from, 24 rows of up to 20 tokens behind six prompts, and
compared token by token with transformers' plain forward: "off by" is the largest difference.

A type whose layers are of several kinds, or have a window, is built twice: with its own kinds of
layers and a window of 8 tokens, and with full attention in every layer. A window as long as the
context is none.

| outcome | builds |
|---|---|
{counts}

"Not built": we found no small configuration, or a package is missing here; when such a model is
loaded it is probed as any other.

| type | attention | outcome | off by, nats | why |
|---|---|---|---|---|
{rows}
"""


def sweep(kinds: list[str]) -> Iterator[tuple[str, Outcome]]:
    """Give (attention, outcome) of every build of these types."""
    for kind in kinds:
        for plain in (False, True) if windowed(kind) else (False,):
            with tempfile.TemporaryDirectory() as folder:
                yield PLAIN if plain else OWN, judge(kind, Path(folder), plain=plain)


def page(outcomes: list[tuple[str, Outcome]]) -> str:
    """Make the page of these outcomes."""
    counted = Counter(outcome.said for _, outcome in outcomes)
    return HEAD.format(
        transformers=transformers.__version__,
        torch=torch.__version__.partition("+")[0],
        types=len({outcome.kind for _, outcome in outcomes}),
        counts="\n".join(f"| {said} | {counted[said]} |" for said in SAID),
        rows="\n".join(_row(attention, outcome) for attention, outcome in outcomes),
    )


def _row(attention: str, outcome: Outcome) -> str:
    apart = "" if outcome.apart is None else f"{outcome.apart:.0e}"
    why = outcome.reason.partition("; use a model with")[0].replace("|", "\\|")
    why = why.replace("<", "&lt;").removeprefix(f"{outcome.kind} ")
    return f"| {outcome.kind} | {attention} | {outcome.said} | {apart} | {why} |"


def rows(text: str) -> list[list[str]]:
    """Read the rows of a page: type, attention, outcome, difference, reason."""
    table = text.partition("| type |")[2].splitlines()[2:]
    inner = [line[2:-2] for line in table if line.startswith("| ")]
    return [[cell.strip() for cell in f" {line} ".split(" | ")] for line in inner]


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    PAGE.write_text(page(list(sweep(list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)))), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
