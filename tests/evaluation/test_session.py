"""A finished run that answers, by the backend that it was trained with."""

import dataclasses

import pytest

from meal_fast.config.config import Config
from meal_fast.config.run_dir import read_config
from meal_fast.data_types import Prompt
from meal_fast.evaluation.generate import answers
from meal_fast.evaluation.session import Session, preference, sampling_of, shown
from meal_fast.models.model_soup import load_served
from meal_fast.rollout import Engine
from meal_fast.rollout.backends.hf import Generate
from tests.helpers.run_folder import build_run, tiny_config

NAMES = ("first", "second")
TEXT = "Write a new song."


def with_backend(config: Config, name: str) -> Config:
    rollout = dataclasses.replace(config.rollout, backend=name)
    return dataclasses.replace(config, rollout=rollout)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    build_run(folder, tiny_config(), scale=0.3)
    return folder


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "parm"
    build_run(folder, tiny_config(recipe="parm", policy={"tuning": "bilinear"}), scale=0.3)
    return folder


@pytest.fixture
def used(monkeypatch):
    """Which samplers are asked, in order."""
    names: list[str] = []
    for kind in (Engine, Generate):
        real = kind.generate

        def asked(self, *args, real=real, name=kind.name):
            names.append(name)
            return real(self, *args)

        monkeypatch.setattr(kind, "generate", asked)
    return names


def said_at(folder, backend, said, w=(0.8, 0.2)):
    config = with_backend(read_config(folder), backend)
    sampling = {"max_new_tokens": 6, "temperature": 0.0, "seed": 0}
    with Session(folder, config, said.append, **sampling) as session:
        return [session.answer(TEXT, w, 0), session.answer(TEXT, w[::-1], 1)]


def test_a_session_answers_by_the_runs_own_backend(run, used):
    said = []
    assert said_at(run, "generate", said) == said_at(run, "engine", said)
    assert used == ["generate"] * 2 + ["engine"] * 2 and not said


def test_where_the_backend_cannot_serve_a_guide_the_engine_does_and_it_is_said(guided, used):
    said = []
    assert said_at(guided, "generate", said) == said_at(guided, "engine", [])
    assert used == ["engine"] * 4
    assert said == [
        "rollout.backend='generate': has no capability 'any-network'; the engine answers"
    ]


def test_an_evaluation_samples_by_the_runs_own_backend(run, used):
    config, sweeps, said = read_config(run), {}, []
    policy, _ = load_served(run, config)
    prompts = (Prompt("a", TEXT), Prompt("b", "Hi"))
    weights = [(1.0, 0.0), (0.5, 0.5)]
    for name in ("engine", "generate"):
        own = with_backend(config, name)
        sweeps[name] = answers(policy, None, "trained", prompts, weights, own, said.append)
    for mode, sweep in sweeps["engine"].items():
        assert sweeps["generate"][mode].rows == sweep.rows, mode
    assert used == ["engine"] * 2 + ["generate"] * 2
    assert any("4 of 4 answers" in line for line in said)


def test_an_evaluation_of_guides_falls_to_the_engine_and_says_so(guided, used):
    config, said = with_backend(read_config(guided), "generate"), []
    policy, family = load_served(guided, config)
    prompts, weights = (Prompt("a", TEXT),), [(1.0, 0.0), (0.5, 0.5)]
    answers(policy, None, "trained", prompts, weights, config, said.append, family)
    assert set(used) == {"engine"} and "the engine answers" in said[0]
    used.clear()
    with policy.reference() as base:
        answers(policy, base, "base", prompts, weights, config, said.append)
    assert set(used) == {"generate"}


def test_what_is_typed_is_read_and_shown(run):
    assert preference(None, run, NAMES) == (0.5, 0.5)
    w = preference("first=0.25,second=0.75", run, NAMES)
    assert w == (0.25, 0.75) and preference(shown(w, NAMES), run, NAMES) == w
    assert shown(None, NAMES) == "auto"
    with pytest.raises(ValueError, match="holds no preference-weight-net"):
        preference("auto", run, NAMES)


def test_what_is_not_asked_for_is_as_the_run_has_it(run):
    config = read_config(run)
    asked = {"temperature": None, "max_new_tokens": 3, "seed": 1, "top_k": 0, "top_p": 1.0}
    asked |= {"min_p": 0.0, "stop": ["."]}
    fields = sampling_of(config, asked)
    assert fields["temperature"] == config.rollout.temperature and fields["max_new_tokens"] == 3
    assert fields["stop"] == (".",)
