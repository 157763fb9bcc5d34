"""Rows that a reward model's limit cuts are counted in metrics.jsonl, update by update."""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.processes import SMALL, train_here, updates
from tests.helpers.reward_models import byte_level, saved

LIMIT = 14  # tokens: some prompts fit with some answers


@pytest.mark.reliability("silent", "prompts that a reward model's limit cuts, counted in a run")
@pytest.mark.parametrize("parallel", [False, True])
def test_cut_rows_are_counted_in_every_update(parallel: bool, tmp_path: Path) -> None:
    tokenizer = byte_level()
    model = saved(tmp_path / "model", "llama", tokenizer)
    objectives = ["--objectives", f"good={model}?max_length={LIMIT}", "first=world:first"]
    argv = ["tiny", *SMALL, *objectives, "--no-evaluate", "--checkpoint_every", "1"]
    argv += ["--meta.parallel", "true"] if parallel else []
    run = tmp_path / "whole"
    assert train_here(*argv, "--meta.steps", "2", "--out", str(run)) == 0
    lines, want = updates(run), Counter()
    for line in (run / "completions.jsonl").read_text().splitlines():
        row = json.loads(line)
        size = len(tokenizer(row["prompt"], row["response"])["input_ids"])
        at = lines[row["update"]]
        # Of tasks at once, whose rows are scored at once, the first one's line has all.
        want[at["meta_step"], 0 if parallel else at["task"], at["inner"]] += size > LIMIT
    got = Counter()
    for line in lines:
        cut = line.get("cut_prompts", {})
        got[line["meta_step"], line["task"], line["inner"]] = cut.get("good", 0)
        assert set(cut) <= {"good"} and "cut_responses" not in line
    assert +got == +want and 0 < want.total() < len(lines) * 4
    # A run that stops and goes on counts the same: what calibration cut is in no update.
    half = tmp_path / "half"
    assert train_here(*argv, "--meta.steps", "1", "--out", str(half)) == 0
    first = [line.get("cut_prompts") for line in updates(half)]
    assert first == [line.get("cut_prompts") for line in lines[: len(first)]]
