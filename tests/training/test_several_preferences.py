"""Every prompt of an update under several preferences, in one gradient step."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meal_fast.config.config import PreferenceConfig, from_dict
from meal_fast.config.recipes import RECIPES, spec_of
from meal_fast.config.run_dir import read_config
from meal_fast.data.preferences import lattice, mates
from meal_fast.training.trainer import Trainer
from tests.helpers.processes import SMALL, assert_same_runs, refused, stopped, train_here, updates

pytestmark = pytest.mark.usefixtures("one_thread")

THREE = [
    "--objectives",
    "a=world:first",
    "b=world:second",
    "c=world:first",
    "--score.utopia",
    "1",
    "1",
    "1",
]


@given(
    k=st.integers(2, 4),
    count=st.integers(1, 4),
    point=st.integers(0, 10_000),
    draws=st.booleans(),
    key=st.integers(0, 5),
)
def test_mates_are_as_many_as_asked_with_its_own_first(k, count, point, draws, key):
    points = lattice(k, 5)
    w = points[point % len(points)]
    options = PreferenceConfig(grid=5, mates="draws" if draws else "rotations")
    count = count if draws else min(count, k)
    found = mates(w, count, options, ("test", key))
    assert found[0][0] == w and sum(n for _, n in found) == count
    assert len({v for v, _ in found}) == len(found) and {v for v, _ in found} <= set(points)
    if not draws:
        assert all(sorted(v) == sorted(w) for v, _ in found)
        if count == k:  # whatever they pull to in common, they pull to alike
            mean = [sum(v[i] * n for v, n in found) / k for i in range(k)]
            assert mean == pytest.approx([1 / k] * k)
    assert found == mates(w, count, options, ("test", key))


@pytest.mark.parametrize(
    ("w", "expected"),
    [
        ((0.9, 0.1), [((0.9, 0.1), 1), ((0.1, 0.9), 1)]),
        ((0.5, 0.5), [((0.5, 0.5), 2)]),  # one request: two would answer alike
    ],
)
def test_the_rotations_of_two(w, expected):
    assert mates(w, 2, PreferenceConfig(), ("key",)) == expected


ABLE = [name for name in RECIPES if spec_of(from_dict({"recipe": name})).mates]


@pytest.mark.parametrize("recipe", ABLE)
def test_each_recipe_that_reads_w_learns_from_all_and_is_resumed(tmp_path, recipe):
    argv = ["tiny", *SMALL, "--recipe", recipe, "--preference.per_prompt", "2", "--no-evaluate"]
    argv += ["--meta.steps", "3", "--score.calibration", "16"]
    assert train_here(*argv, "--out", str(tmp_path / "straight")) == 0
    config = read_config(tmp_path / "straight")
    asked = []
    trainer = Trainer(config, tmp_path / "seen")
    collect = trainer.collector.collect

    def collected(tasks):
        batch = collect(tasks)
        asked.append((tasks[0], batch))
        return batch

    trainer.collector.collect = collected
    assert trainer.train()
    for task, batch in asked:
        if recipe == "meal":  # the net's own preferences are alone, and kept rows get another w
            continue
        (own,) = {p.text for p in task.prompts}
        assert {p.text for p in batch.rolled.prompts} == {own}
        rows = Counter(tuple(round(x, 4) for x in w) for w in batch.rolled.condition_RK.tolist())
        assert sum(rows.values()) == 8  # 4 samples x 2 preferences
        assert all(w[::-1] in rows for w in rows)
        for g in range(len(batch.rolled.prompts)):  # advantages are within a prompt and w
            advantage = batch.scored.advantage_R[batch.rolled.group_R == g]
            assert abs(float(advantage.sum())) < 1e-4
    stopped(config, tmp_path / "broken", after=4)
    assert train_here(*argv, "--out", str(tmp_path / "broken"), "--resume") == 0
    assert_same_runs(tmp_path / "broken", tmp_path / "straight")


def test_one_preference_is_the_run_as_it_was(tmp_path):
    argv = ["tiny", *SMALL, "--meta.steps", "2", "--no-evaluate"]
    assert train_here(*argv, "--out", str(tmp_path / "plain")) == 0
    explicit = [*argv, "--preference.per_prompt", "1", "--preference.mates", "draws"]
    assert train_here(*explicit, "--out", str(tmp_path / "one")) == 0
    assert_same_runs(tmp_path / "plain", tmp_path / "one")


def test_tasks_at_once_ask_as_tasks_in_turn_do(tmp_path):
    argv = ["tiny", *SMALL, "--meta.steps", "2", "--no-evaluate", "--preference.per_prompt", "2"]
    for name, more in (("turn", []), ("once", ["--meta.parallel", "true"])):
        assert train_here(*argv, *more, "--out", str(tmp_path / name)) == 0
    one, other = updates(tmp_path / "turn"), updates(tmp_path / "once")
    for a, b in zip(one, other, strict=True):
        assert a["w"] == b["w"] and a["tokens"] == b["tokens"]
        assert a["rewards"] == pytest.approx(b["rewards"], abs=1e-6)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--preference.per_prompt", "3"], ["per_prompt=3", "2 objectives have 2 rotations"]),
        ([*THREE, "--preference.per_prompt", "4"], ["per_prompt=4", "3 rotations"]),
        (["--preference.per_prompt", "0"], ["per_prompt=0", "at least 1"]),
        (
            ["--preference.per_prompt", "12", "--preference.mates", "draws"],
            ["per_prompt=12", "preference.grid=11 has 11 preferences"],
        ),
        (
            ["--preference.per_prompt", "2", "--recipe", "ric"],
            ["per_prompt=2", "makes it 1"],
        ),
        (
            ["--preference.per_prompt", "2", "--recipe", "morlhf"],
            ["per_prompt=2", "makes it 1"],
        ),
        (
            ["--preference.per_prompt", "2", "--preference.rotate", "true"],
            ["preference.rotate=True", "leave it out"],
        ),
        (
            ["--preference.per_prompt", "2", "--recipe", "meal", "--meal.update", "hypergradient"],
            ["per_prompt=2", "hypergradient"],
        ),
    ],
)
def test_what_has_no_room_is_one_line(tmp_path, capfd, argv, words):
    run = ["tiny", *SMALL, "--no-evaluate", "--out", str(tmp_path / "run")]
    refused(capfd, [*run, *argv], *words)
