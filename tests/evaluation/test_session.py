"""A finished run that answers, by the backend that it was trained with."""

import dataclasses

import pytest

from meal_fast.config.config import Config
from meal_fast.config.run_dir import read_config
from meal_fast.data_types import Prompt
from meal_fast.evaluation.generate import answers
from meal_fast.evaluation.session import LENGTH, Session, preference, sampling_of, shown
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
    for kind, method in ((Engine, "draw"), (Generate, "generate")):
        real = getattr(kind, method)

        def asked(self, *args, real=real, name=kind.name):
            names.append(name)
            return real(self, *args)

        monkeypatch.setattr(kind, method, asked)
    return names


def said_at(folder, backend, said, w=(0.8, 0.2)):
    config = with_backend(read_config(folder), backend)
    sampling = {"max_new_tokens": 6, "temperature": 0.0, "seed": 0}
    with Session(folder, config, said.append, **sampling) as session:
        return [session.answer(TEXT, w, 0).text, session.answer(TEXT, w[::-1], 1).text]


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
    assert sampling_of(config, asked | {"max_new_tokens": None})["max_new_tokens"] == LENGTH
    fields = sampling_of(config, asked)
    assert fields["temperature"] == config.rollout.temperature and fields["max_new_tokens"] == 3
    assert fields["stop"] == (".",)


@pytest.fixture(scope="module")
def session(run):
    sampling = {"max_new_tokens": 40, "temperature": 1.5, "seed": 0}
    with Session(run, read_config(run), lambda line: None, **sampling) as opened:
        yield opened


@pytest.mark.reliability("hour", "an answer that appears only when it is whole")
@pytest.mark.parametrize("turn", range(4))
def test_the_pieces_of_an_answer_are_its_text_and_no_half_characters(session, turn):
    """The tiny model says bytes at random: characters that are begun, broken and completed."""
    pieces = []
    answer = session.answer(TEXT, (0.8, 0.2), turn, heard=pieces.append)
    assert "".join(pieces) == answer.text and len(pieces) > 5 and all(pieces)
    again = session.answer(TEXT, (0.8, 0.2), turn)
    assert again == answer and answer.tokens <= 40


@pytest.mark.parametrize(
    "text", ["naïve 日本語 😀👩‍👩‍👧 done", " \n  spaces around \n\n", "a\r\nb"]
)
def test_a_text_is_streamed_whole_whatever_its_characters(session, text, monkeypatch):
    """The engine's drawing replaced by these very tokens, one a step."""
    tokens = session.policy.tokenizer.encode(text, add_special_tokens=False)

    def draw(self, rows, sampling):
        (row,) = self.scheduler.live = list(rows)
        for token in tokens:
            row.tokens.append(token)
            row.finish = "stop" if len(row.tokens) == len(tokens) else ""
            yield []

    monkeypatch.setattr(Engine, "draw", draw)
    pieces = []
    answer = session.answer(TEXT, (0.8, 0.2), 0, heard=pieces.append)
    assert "".join(pieces) == answer.text == text.strip()
    assert len(pieces) > 1 and "\ufffd" not in "".join(pieces)


def test_a_backend_that_draws_whole_answers_tells_them_at_the_end(run):
    config, pieces = with_backend(read_config(run), "generate"), []
    sampling = {"max_new_tokens": 6, "temperature": 0.0, "seed": 0}
    with Session(run, config, lambda line: None, **sampling) as opened:
        answer = opened.answer(TEXT, (0.8, 0.2), 0, heard=pieces.append)
    assert pieces == [answer.text] and answer.tokens == 6 and answer.finish == "length"


def test_what_an_interrupt_ends_is_kept_and_the_session_goes_on(session):
    whole, pieces = session.answer(TEXT, (0.8, 0.2), 0), []

    def stop(piece):
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    cut = session.answer(TEXT, (0.8, 0.2), 0, heard=stop)
    assert cut.finish == "cancelled" and whole.text.startswith("".join(pieces))
    assert session.answer(TEXT, (0.8, 0.2), 0) == whole


@pytest.mark.reliability("hour", "a chat that forgets the turn before")
def test_turns_are_what_the_chat_template_makes_of_them(session, monkeypatch):
    asked, real = [], Engine.stream

    def stream(self, requests, sampling):
        asked.extend(requests)
        return real(self, requests, sampling)

    monkeypatch.setattr(Engine, "stream", stream)
    session.answer("Three?", (0.8, 0.2), 0, [("One?", "Yes."), ("Two?", "No.")])
    policy, said = session.policy, session.policy.said((0.8, 0.2))
    turns = ["One?", "Yes.", "Two?", "No.", f"Three? {said}"]
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)
    ]
    whole = policy.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    (request,) = asked
    prompt, suffix = request.encoded(policy)
    assert policy.tokenizer.decode(prompt + suffix) == whole


def test_turns_that_the_context_has_no_room_for_are_left_out_and_it_is_said(run):
    said, long = [], ("word " * 80, "word " * 80)
    sampling = {"max_new_tokens": 6, "temperature": 0.0, "seed": 0}
    with Session(run, read_config(run), said.append, **sampling) as opened:
        few = opened.answer(TEXT, (0.8, 0.2), 0, [long])
        assert not said
        many = opened.answer(TEXT, (0.8, 0.2), 0, [("x", "y"), ("x " * 999, "y"), long])
        assert many == few and "no room for the first 2 turns" in said[0]
