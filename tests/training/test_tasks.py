"""Meal's experiments end to end, on checkpoints of their classes and files of their schema."""

import json
from itertools import combinations

import pytest

from meal_fast.config.presets import PRESETS, preset
from meal_fast.data.preferences import RIC_EVALUATION, evaluation_weights
from meal_fast.data.prompts import hh_prompt, tldr_prompt
from tests.data.test_objectives import HUB_CASES, checkpoints  # noqa: F401  (a fixture)
from tests.data.test_prompts import hub_folder, own_cache  # noqa: F401  (a fixture, for all tests)
from tests.helpers.processes import train_here, updates

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = [
    *("--policy.path", "world:tiny", "--policy.lora_rank", "4", "--policy.device", "cpu"),
    *("--rollout.prompts", "2", "--rollout.samples", "4", "--rollout.max_new_tokens", "5"),
    *("--meta.steps", "1", "--meal.every", "2", "--score.calibration", "4"),
    *("--evaluation.prompts", "2"),
]


def assistant(folder):
    rows = [
        {"chosen": f"\n\nHuman: Tell me about {word} and why it matters to you \n\nAssistant: No."}
        for word in ("tides", "rain", "bread", "snow", "trains", "owls", "tea", "clocks") * 2
    ]
    return hub_folder(folder, {"train": rows, "test": rows}), hh_prompt(rows[0]["chosen"])


def summary(folder):
    rows = [
        {
            "info": {"id": f"t3_{i}", "post": f"post {i}\n" + "my dog ran away " * 8},
            "summaries": [{"text": "the dog is gone"}, {"text": "no dog"}],
            "choice": 0,
        }
        for i in range(12)
    ]
    where = hub_folder(folder, {"train": rows, "validation": rows}, config="comparisons")
    return where, tldr_prompt(rows[0]["info"]["post"])


@pytest.mark.parametrize(
    ("name", "data", "grid"),
    [
        ("helpful-assistant", assistant, 13),
        ("reddit-summary", summary, 13),
        ("reddit-summary.summary-faithful", summary, 11),
    ],
)
def test_a_task_trains_and_is_swept(tmp_path, checkpoints, name, data, grid):  # noqa: F811
    folder, prompt = data(tmp_path / "data")
    config = preset(name)
    sources = [o.partition("=")[2] for o in config.objectives]
    objectives = [
        f"{n}={source}?path={checkpoints[HUB_CASES[source][0]]}"
        for n, source in zip(config.names, sources, strict=True)
    ]
    out = tmp_path / "run"
    prompts = f"{config.prompts.train}?path={folder}"
    assert not train_here(
        name, *SMALL, "--out", str(out), "--prompts.train", prompts, "--objectives", *objectives
    )
    assert len(updates(out)) == 4
    found = json.loads((out / "evaluation.json").read_text())
    weights = evaluation_weights(len(config.names), grid)
    assert len(found["weights"]) == grid
    for w, want in zip(found["weights"], weights, strict=True):
        assert w == pytest.approx(want, abs=1e-5)
    asked = [p["text"] for p in found["prompts"]]
    assert all(text.startswith(prompt[:12]) and "{" not in text for text in asked)
    assert (out / "preference_net.safetensors").is_file()


def test_every_pair_of_a_task_has_a_preset():
    for task in ("helpful-assistant", "reddit-summary"):
        names = preset(task).names
        assert len(names) == 3
        for a, b in combinations(names, 2):
            pair = PRESETS[f"{task}.{a}-{b}"]
            assert pair.names == (a, b)
            assert set(pair.objectives) <= set(preset(task).objectives)


def test_the_thirteen_preferences_lie_on_the_simplex():
    assert len(set(RIC_EVALUATION)) == 13 == len(evaluation_weights(3, 13))
    for w in RIC_EVALUATION:
        assert sum(w) == pytest.approx(1.0) and min(w) >= 0
    assert len(evaluation_weights(3, 4)) == 10  # any other number is a lattice's
