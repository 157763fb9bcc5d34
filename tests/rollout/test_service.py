"""Rows that join and leave between steps, each with its own sampling; text as it grows."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meal_fast.data_types import Prompt
from meal_fast.rollout import Engine, Request, Sampling, Service, engine
from meal_fast.rollout.sequence import Row, TextStream
from tests.helpers.models import NumberPolicy
from tests.helpers.run_folder import tiny_config, tiny_policy

LLAMA = NumberPolicy("llama", stop=frozenset({5, 6}))
ASKED = [  # of each: prompt, preference, samples, sampling
    ("11 12 13", (0.5, 0.5), 2, Sampling(9, 1.0, seed=1)),
    ("11 12 13", (0.1, 0.9), 1, Sampling(3, 0.7, seed=2, top_k=20)),
    ("40 41", None, 3, Sampling(12, 1.3, seed=1, rng_key=("other",), top_p=0.9)),
    ("50 51 52 53 54", (0.8, 0.2), 1, Sampling(6, 0.0, seed=0)),
    ("60 61", (0.3, 0.7), 2, Sampling(8, 1.0, seed=5, min_p=0.01, stop=("7",))),
]


def llama(max_rows: int = 4, **options) -> Engine:
    return Engine(LLAMA, LLAMA.network, max_rows=max_rows, **options)


def request(text, w, samples) -> Request:
    return Request(Prompt(text, text), w, samples)


def alone(text, w, samples, sampling):
    out = llama().generate([request(text, w, samples)], sampling)
    return list(zip(out.texts, out.finish, strict=True))


def drained(service, texts=None):
    """Runs it dry; what every row said, by its identity."""
    texts = {} if texts is None else texts
    while service.busy:
        for delta in service.step():
            texts[delta.row] = texts.get(delta.row, "") + delta.text
    return texts


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_in_company_every_row_is_what_generate_gives_alone(slots):
    service, rows, texts = Service(llama(slots)), [], {}
    for text, w, samples, sampling in ASKED:  # one joins at each step
        rows.append(service.add([request(text, w, samples)], sampling))
        for delta in service.step():
            texts[delta.row] = texts.get(delta.row, "") + delta.text
    drained(service, texts)
    for asked, own in zip(ASKED, rows, strict=True):
        assert [(texts[row], row.finish) for row in own] == alone(*asked)
    assert service.waiting == 0 and service.step() == []


def test_one_call_draws_rows_of_unequal_seeds_as_two_do():
    sampling = Sampling(8, 1.0, seed=0)
    service = Service(llama())
    rows = [
        service.add([request("11 12", (0.5, 0.5), 1)], replace(sampling, seed=seed))[0]
        for seed in (1, 2, 1)
    ]
    drained(service)
    assert rows[0].tokens == rows[2].tokens != rows[1].tokens


def test_a_cancelled_row_frees_its_slot_and_says_no_more():
    service = Service(llama(1))
    endless = Sampling(30, 0.0, seed=0)
    first, second = (service.add([request(t, None, 1)], endless)[0] for t in ("11 12", "40 41"))
    third = service.add([request("50", None, 1)], endless)[0]
    assert [d.row for d in service.step()] == [first] and service.waiting == 2
    service.cancel(first)
    service.cancel(third)
    assert [d.row for d in service.step()] == [second] and len(first.tokens) == 1
    assert service.waiting == 0
    drained(service)
    assert (first.finish, third.finish, third.tokens) == ("cancelled", "cancelled", [])
    assert second.finish in ("stop", "length")
    service.cancel(second)
    assert second.finish != "cancelled"


def test_a_row_longer_than_the_memory_waits_and_those_behind_it_too():
    service = Service(llama(2), prompt_tokens=4, suffix_tokens=4, new_tokens=4)
    short, long = Sampling(4, 1.0, seed=1), Sampling(40, 1.0, seed=1)
    first = service.add([request("11 12", (0.5, 0.5), 1)], short)[0]
    big = service.add([request(" ".join(["13"] * 20), (0.5, 0.5), 1)], long)[0]
    last = service.add([request("40 41", (0.5, 0.5), 1)], short)[0]
    (delta,) = service.step()
    assert delta.row is first
    texts = drained(service, {first: delta.text})
    for row, sampling in ((first, short), (big, long), (last, short)):
        text = row.request.prompt.text
        assert [(texts[row], row.finish)] == alone(text, (0.5, 0.5), 1, sampling)


def test_a_row_that_the_whole_budget_does_not_hold_is_refused_at_once():
    token = llama().shape.token_bytes
    service = Service(llama(max_cache_bytes=90 * token))
    with pytest.raises(ValueError, match=r"max_cache_bytes=.*one row"):
        service.add([request(" ".join(["13"] * 20), (0.5, 0.5), 1)], Sampling(40, 1.0, seed=1))
    fits = Sampling(8, 1.0, seed=1)
    rows = [service.add([request(f"{n} 12", (0.5, 0.5), 1)], fits)[0] for n in range(11, 17)]
    texts = drained(service)
    for row in rows:
        assert alone(row.request.prompt.text, (0.5, 0.5), 1, fits)[0][0] == texts[row]


def test_five_preferences_share_one_prompt():
    service = Service(llama(8))
    five = [request("11 12 13", (w / 4, 1 - w / 4), 1) for w in range(5)]
    service.add(five, Sampling(4, 1.0, seed=0))
    drained(service)
    assert service.engine.counts.prompt == 3
    service.add(five, Sampling(4, 1.0, seed=1))
    drained(service)
    assert service.engine.counts.prompt == 3  # known from before


def test_after_an_error_the_service_goes_on(monkeypatch):
    service = Service(llama())
    service.add([request("11 12", None, 1)], Sampling(4, 1.0, seed=0))
    with monkeypatch.context() as patch:
        patch.setattr(service.engine.runner, "_draw", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            service.step()
    assert not service.busy
    row = service.add([request("11 12", None, 1)], Sampling(4, 1.0, seed=0))[0]
    texts = drained(service)
    assert [(texts[row], row.finish)] == alone("11 12", None, 1, Sampling(4, 1.0, seed=0))


def test_a_stream_is_what_generate_gives():
    policy = tiny_policy(tiny_config(), scale=0.3)
    requests = [
        Request(Prompt("a", "Write a new song."), (0.2, 0.8), 2),
        Request(Prompt("b", "Write a new word."), (1.0, 0.0), 1),
    ]
    sampling = Sampling(12, 1.0, seed=3)
    with engine(policy) as sampler:
        out = sampler.generate(requests, sampling)
        texts, ends = {}, {}
        for delta in sampler.stream(requests, sampling):
            at = (delta.row.index, delta.row.sample)
            assert at not in ends
            texts[at] = texts.get(at, "") + delta.text
            if delta.finish:
                ends[at] = delta.finish
    assert list(texts) == [(0, 0), (0, 1), (1, 0)]
    assert tuple(texts.values()) == out.texts
    assert tuple(ends[at] for at in texts) == out.finish
    with pytest.raises(ValueError, match="nothing to sample"):
        sampler.stream([], sampling)


def test_earlier_turns_stand_before_the_prompt_as_the_chat_template_has_them():
    policy = tiny_policy(tiny_config())
    history = (("user", "Write a song."), ("assistant", "La la."))
    asked = Request(Prompt("c", "Write a word."), (0.25, 0.75), history=history)
    prompt, suffix = asked.encoded(policy)
    messages = [{"role": role, "content": text} for role, text in history]
    said = "Write a word. " + policy.said((0.25, 0.75))
    messages.append({"role": "user", "content": said})
    whole = policy.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    ids = policy.tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert policy.tokenizer.decode(prompt + suffix) == policy.tokenizer.decode(ids)
    with engine(policy) as sampler:
        with_turns = sampler.generate([asked], Sampling(6, 0.0, seed=0))
    assert with_turns.prefix == (prompt + suffix,)


class Bytes:
    """A policy of which every token is one byte."""

    def decode(self, tokens):
        return bytes(tokens).decode("utf-8", errors="replace")


def parts_of(tokens):
    row = Row(request("1", None, 1), 0, 0, (), ())
    stream, parts = TextStream(Bytes()), []
    for n, token in enumerate(tokens, 1):
        row.tokens.append(token)
        row.finish = "length" if n == len(tokens) else ""
        parts.append(stream.more(row))
    return parts


@given(st.text(min_size=1))
def test_no_character_is_cut_in_two(text):
    parts = parts_of(text.encode())
    assert "".join(parts) == text
    assert all(part in ("", *text) or part.strip("\ufffd") in ("", *text) for part in parts)
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


@given(st.binary(min_size=1, max_size=12))
def test_bytes_that_are_no_text_are_said_as_decode_has_them(tokens):
    assert "".join(parts_of(tokens)) == Bytes().decode(tokens)
