"""Prompts that leave no room in the model's context: left out and counted, before training."""

import json
import shutil

import pytest

from meal_fast import evaluate
from meal_fast.config.config import from_dict
from meal_fast.config.presets import preset
from meal_fast.data.preferences import drawn_tasks, evaluation_weights
from meal_fast.data.prompts import load_prompts
from meal_fast.data.toy import build_world
from meal_fast.models.policy import load_policy
from meal_fast.rollout.fitting import context_room, longest_suffix
from meal_fast.training.trainer import Trainer
from tests.helpers.processes import assert_one_line, train_here, updates

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = 64


@pytest.fixture
def short(tmp_path):
    """The tiny world's model with a context of 64 tokens, and prompts of which some exceed it."""
    model = tmp_path / "model"
    shutil.copytree(build_world("tiny"), model)
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {"max_position_embeddings": CONTEXT}))
    texts = [f"Write note {i}" + "o" * (60 * (i % 4 == 0)) for i in range(40)]
    (tmp_path / "prompts.txt").write_text("\n".join(texts) + "\n")
    return tmp_path


def argv(folder, *more):
    return ["tiny", "--policy.path", str(folder / "model"), "--prompts.train",
            str(folder / "prompts.txt"), "--out", str(folder / "run"), *more]  # fmt: skip


@pytest.mark.reliability("lost", "prompts longer than the model's context, in training and after")
@pytest.mark.parametrize("recipe", ["weighted-meta-grpo", "meal", "ric", "mo-odpo"])
def test_prompts_beyond_the_context_are_left_out(short, capfd, recipe):
    source = str(short / "prompts.txt")
    more = ["--prompts.benign", source, "--evaluation.benign", source,
            "--evaluation.ask", "why " * 40, "--meta.steps", "12"]  # fmt: skip
    assert train_here(*argv(short, "--recipe", recipe, *more)) == 0
    out, err = capfd.readouterr()
    for option in ("prompts.train=", "prompts.benign=", "prompts.evaluation", "evaluation.benign"):
        (line,) = {
            x.removeprefix("meal-fast: ")
            for x in err.splitlines()
            if option in x and "left out" in x
        }
        assert "exceed the model's context of 64" in line
    assert "evaluation.ask: is left out" in err
    assert "evaluation.ask: is left out" in err.partition("update 1/")[0]  # told before as well
    rows = [json.loads(x) for x in (short / "run" / "completions.jsonl").read_text().splitlines()]
    assert rows and all(len(row["prompt"]) < 40 for row in rows)
    found = json.loads((short / "run" / "evaluation.json").read_text())
    assert all(len(p["text"]) < 40 for p in found["prompts"]) and found["asked"] is None
    assert len(updates(short / "run")) == 48 and "report.html" in out


@pytest.mark.reliability("lost", "a warm start whose prompts and instructions exceed the context")
def test_a_warm_start_leaves_them_out_too(short):
    values = {
        "policy": {"path": str(short / "model")},
        "prompts": {"train": str(short / "prompts.txt")},
        "warmup": {"steps": 2, "draws": 40, "answers": ["first=own:" + "Say a. " * 3]},
        "meta": {"steps": 1},
    }
    told = []
    config = from_dict(values, preset("tiny"))
    with pytest.warns(UserWarning, match="left out"):
        assert Trainer(config, short / "run", tell=told.append).train()


def test_the_longest_preference_is_counted():
    """No preference of a run has more tokens, and one has as many."""
    for changes in ({"preference": {"grid": 0}}, {"preference": {"grid": 5}}, {}):
        config = from_dict(changes, preset("tiny"))
        policy = load_policy(config.policy, config.names)
        longest = longest_suffix(policy, config)
        drawn = [w for step in range(200) for w in drawn_tasks(config, step)]
        drawn += evaluation_weights(2, config.evaluation.grid)
        assert max(len(policy.encode_suffix(w)) for w in drawn) <= longest
        assert context_room(policy, config) == policy.context - longest - 6


def test_no_room_at_all_is_refused(short, capfd):
    assert train_here(*argv(short, "--rollout.max_new_tokens", "60")) == 2
    err = capfd.readouterr().err
    assert "rollout.max_new_tokens=60" in err and "no room" in err
    assert not (short / "run").exists()


@pytest.mark.reliability("lost", "an evaluation that has nothing to ask, told before training")
@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "nothing is left in the evaluation split"),
        (["--evaluation.benign", "{few}"], "nothing is left in the evaluation split"),
        (["--prompts.evaluation", "{long}"], "have at most"),
        (["--prompts.evaluation", "{none}"], "cannot be read"),
        (["--evaluation.statistics", "{none}"], "no such file"),
        (["--evaluation.statistics", "{other}"], "of objectives"),
    ],
)
def test_what_the_evaluation_lacks_is_told_first(short, capfd, more, words):
    few = [f"Write note {i}" for i in range(50)]
    (short / "all.txt").write_text("\n".join(few))
    train = {p.text for p in load_prompts(str(short / "all.txt"), "train")}
    (short / "few.txt").write_text("\n".join(x for x in few if x in train))
    (short / "long.txt").write_text("note" + "o" * 80)
    normalizer = {"mode": "none", "offset": [0, 0], "divisor": [1, 1]}
    other = {"names": ["x", "y"], "normalizer": normalizer, "utopia": [1, 1], "mu_evaluation": 0.1}
    (short / "other.json").write_text(json.dumps(other))
    names = {"few": "few.txt", "long": "long.txt", "none": "none.txt", "other": "other.json"}
    filled = [x.format(**{k: short / v for k, v in names.items()}) for x in more]
    start = argv(short, *filled)
    if "--evaluation.benign" in more or not more:
        start[start.index("--prompts.train") + 1] = str(short / "few.txt")
    assert train_here(*start) == 2
    err = capfd.readouterr().err
    assert_one_line(err[err.rindex("meal-fast: error") :], words, "--no-evaluate")
    assert "update 1/" not in err and not (short / "run").exists()
    if not more:
        assert train_here(*start, "--no-evaluate", "--meta.steps", "1") == 0
        with pytest.raises(SystemExit):
            evaluate.main([str(short / "run")])
