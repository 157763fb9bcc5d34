"""No two answers hang on one key, and the calibration sample covers the preferences."""

import json
from collections import Counter

import pytest
import torch

from meal_fast.config.config import from_dict
from meal_fast.config.presets import preset
from meal_fast.config.recipes import RECIPES
from meal_fast.data.preferences import lattice
from meal_fast.data_types import Prompt
from meal_fast.models.policy import load_policy
from meal_fast.rollout import Request, rollout
from meal_fast.rollout.sequence import row_id, told_apart
from meal_fast.training.calibration import spread
from meal_fast.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

W = (0.5, 0.5)
A, B = Prompt("a", "Write a note."), Prompt("b", "Write a song.")


@pytest.fixture(scope="module")
def policy():
    config = preset("tiny")
    return load_policy(config.policy, config.names)


def texts(policy, requests, backend="engine"):
    found = rollout(
        policy, requests, max_new_tokens=6, temperature=1.0, seed=3, rng_key=("t",), backend=backend
    )
    return [
        tuple(t for t, g in zip(found.texts, found.groups, strict=True) if g == b)
        for b in range(len(requests))
    ]


@pytest.mark.reliability("silent", "one prompt twice in an update: the same texts")
@pytest.mark.parametrize("backend", ["engine", "generate"])
def test_a_prompt_twice_in_a_call_gets_other_texts(policy, backend):
    once = texts(policy, [Request(A, W, 8), Request(B, W, 8)], backend)
    twice = texts(policy, [Request(A, W, 8), Request(B, W, 8), Request(A, W, 8)], backend)
    assert twice[:2] == once  # what was asked once keeps its key
    assert twice[2] != twice[0]
    shared = sum((Counter(twice[0]) & Counter(twice[2])).values())
    assert shared < 8
    thrice = texts(policy, [Request(A, W, 8)] * 3, backend)
    assert thrice[0] == twice[0] and thrice[1] == twice[2] and thrice[2] not in thrice[:2]


def test_every_row_of_a_call_has_an_id_of_its_own():
    requests = [
        Request(prompt, w, 4, task_id=task, rng_key=("train", task))
        for prompt in (A, B, A, A)
        for w in (W, (1.0, 0.0), W)
        for task in (0, 1)
    ]
    apart = told_apart(requests)
    ids = [row_id(("x",), q, sample) for q in apart for sample in range(q.samples)]
    assert len(set(ids)) == len(ids) == 96
    # A task's own are numbered as if it were alone: at once or one after the other.
    alone = told_apart([q for q in requests if q.task_id])
    assert [q for q in apart if q.task_id] == list(alone)


@pytest.mark.reliability("silent", "fewer prompts than an update asks, in every recipe")
@pytest.mark.parametrize("recipe", RECIPES)
def test_updates_with_a_prompt_more_than_once_have_other_answers(tmp_path, recipe):
    (tmp_path / "prompts.txt").write_text("\n".join(f"Write note {i}" for i in range(16)))
    values = {
        "recipe": recipe,
        "prompts": {"train": str(tmp_path / "prompts.txt")},
        "rollout": {"prompts": 4, "samples": 8, "temperature": 1.5},
        "meta": {"steps": 3},
        **({"policy": {"tuning": "bilinear"}} if recipe == "parm" else {}),
    }
    config = from_dict(values, preset("tiny"))
    trainer = Trainer(config, tmp_path / "run")
    trainer.prompts = trainer.prompts[:3]
    asked = []
    drawn = type(trainer.collector)._all_of

    def kept(self, *args, **kwargs):
        batch = drawn(self, *args, **kwargs)
        asked.append(batch.rolled)
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer.collector), "_all_of", kept)
        trainer.train()
    repeated = 0
    for rolled in asked:
        by_asked = {}
        for text, group, w in zip(
            rolled.texts, rolled.groups, rolled.condition_RK.tolist(), strict=True
        ):
            by_asked.setdefault((rolled.prompts[group].id, tuple(w)), {}).setdefault(
                group, []
            ).append(text)
        for groups in by_asked.values():
            values = list(groups.values())
            repeated += len(values) > 1
            assert all(values.count(v) == 1 for v in values)
    assert repeated or recipe in ("meal", "ric", "parm")  # these ask by preferences of their own


@pytest.mark.reliability("silent", "a calibration sample drawn at one preference (grid 7)")
@pytest.mark.parametrize(("k", "points"), [(2, p) for p in range(2, 30)] + [(3, 5), (3, 13)])
@pytest.mark.parametrize("count", [1, 3, 16, 64, 128])
def test_the_calibration_sample_covers_the_grid(k, points, count):
    grid, total = lattice(k, points), 64
    prompts = [Prompt(str(i), f"prompt {i}") for i in range(count)]
    samples = max(1, total // count)
    requests = spread(prompts[:total], grid, samples)
    asked = Counter()
    for q in requests:
        asked[q.w] += q.samples
    n = sum(asked.values())
    assert n == samples * min(count, total)
    assert len(asked) == min(len(grid), n)
    assert max(asked.values()) - min(asked.values()) <= max(1, -(-2 * n // len(grid)))
    first = [q.w for q in requests[:4] if len(requests) >= 4]
    assert len(set(first)) == len(first) or len(grid) < 4
    assert len({(q.prompt.id, q.w) for q in requests}) == len(requests)


def test_where_it_was_even_it_is_as_it_was():
    grid = lattice(2, 11)
    prompts = [Prompt(str(i), f"prompt {i}") for i in range(64)]
    found = spread(prompts, grid, 1)
    assert [q.w for q in found] == [grid[(i * 7) % 11] for i in range(64)]


def test_a_run_calibrates_on_the_whole_grid(tmp_path):
    config = from_dict({"preference": {"grid": 7}, "score": {"calibration": 14}}, preset("tiny"))
    trainer = Trainer(config, tmp_path / "run")
    held = json.loads((tmp_path / "run" / "statistics.json").read_text())
    assert held["calibration"]["responses"] == 14 and trainer.collector.scales is not None
    assert torch.isfinite(torch.tensor(held["utopia"])).all()
