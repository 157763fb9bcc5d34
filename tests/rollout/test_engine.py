"""The engine against plain forwards of the same models, whatever happened to a row's slot."""

import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meal_fast.data_types import Prompt
from meal_fast.rollout import Engine, Request, Row, Sampling
from meal_fast.rollout.kv_cache import Shape
from tests.helpers.models import MODELS, NumberPolicy

TEMPERATURE = 0.9
LLAMA = NumberPolicy("llama", stop=frozenset({5, 6, 7, 8, 9, 10}))


def prompt(tokens) -> Prompt:
    text = " ".join(map(str, tokens))
    return Prompt(text, text)


def engine(policy, **options) -> Engine:
    return Engine(policy, policy.network, **{"join": True} | options)


def sampling(**options) -> Sampling:
    return Sampling(**{"max_new_tokens": 6, "temperature": TEMPERATURE, "seed": 1} | options)


@torch.no_grad()
def wanted(policy, prefix, tokens) -> list[float]:
    """The tokens' log-probabilities by one plain forward."""
    network = policy.network
    ids = torch.tensor([[*prefix, *tokens]])
    hidden = network.body(input_ids=ids, use_cache=False).last_hidden_state[0]
    logp = torch.log_softmax(network.logits(hidden) / TEMPERATURE, -1)[-len(tokens) - 1 : -1]
    return logp.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()


def check(policy, row: Row) -> None:
    assert row.finish in ("stop", "length") and 1 <= len(row.tokens) == len(row.logp)
    assert all(t not in policy.stop_ids for t in row.tokens[:-1])
    assert (row.tokens[-1] in policy.stop_ids) == (row.finish == "stop")
    assert row.logp == pytest.approx(
        wanted(policy, row.prompt + row.suffix, row.tokens), abs=1e-4, rel=0
    )


def requests_of(lengths, weights, samples=2):
    """A prompt of each length under each of the weights."""
    prompts = [prompt([11 + i, *[40 + i] * (n - 1)]) for i, n in enumerate(lengths)]
    return [Request(p, w, samples) for p in prompts for w in weights]


@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_are_those_of_a_full_forward(name):
    """Prompts of 1 to 9 tokens, with one preference and with three, through three slots."""
    policy = NumberPolicy(name, stop=frozenset(range(8)))
    weights = [(0.0, 1.0), (0.5, 0.5), None]
    requests = requests_of([1, 9, 4], weights) + requests_of([2, 6], weights[:1])
    sampler = engine(policy, max_rows=3)
    rows = sampler.rows(requests, 6)
    list(sampler.draw(rows, sampling()))
    assert {bool(row.suffix) for row in rows} == {True, False}
    for row in rows:
        check(policy, row)


@st.composite
def histories(draw):
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=5))
    weights = draw(st.lists(st.integers(0, 10), min_size=1, max_size=3, unique=True))
    budget = draw(st.integers(0, 40))  # tokens beyond what one row needs
    cuts = draw(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5), st.integers(0, 6))))
    return lengths, [(i / 10, 1 - i / 10) for i in weights], budget, cuts, draw(st.integers(1, 5))


@settings(max_examples=40, deadline=None)
@given(histories())
def test_every_history_of_a_slot_gives_the_model_s_own_log_probabilities(history):
    """Refills, evictions, cut-backs of growing and of finished rows, a cache for very little."""
    lengths, weights, spare, cuts, slots = history
    policy = LLAMA
    requests = requests_of(lengths, weights)
    token = engine(policy).shape.token_bytes
    least = (-(-(max(lengths) + 3) // 16) * 16 + 16 + 16) * token
    sampler = engine(policy, max_rows=slots, max_cache_bytes=least + 16 * spare * token)
    rows = sampler.rows(requests, 6)
    again = {i: (which, keep) for i, which, keep in cuts}
    steps = 0
    for step, _ in enumerate(sampler.draw(rows, sampling())):
        steps = step + 1
        grown = [row for row in rows if row.tokens]
        if step in again and grown:
            which, keep = again[step]
            row = grown[which % len(grown)]
            if row in sampler.live:
                sampler.cut(row, min(keep, len(row.tokens) - 1))
    assert steps >= 1
    for row in rows:
        check(policy, row)
    held = sampler.memory
    size = sum(x.room * x.places for x in (held.prompts, held.suffixes, held.tails))
    assert size * token <= held.max_bytes


def test_a_row_s_text_depends_on_nothing_but_itself():
    """Slots, budget, order and company: the same tokens."""
    weights = [(i / 10, 1 - i / 10) for i in (0, 3, 7)]
    requests = requests_of([3, 8, 5, 12], weights)
    texts = {}
    for options in ({}, {"max_rows": 1}, {"max_rows": 5}, {"max_cache_bytes": 60_000}):
        sampler = engine(LLAMA, **options)
        rows = sampler.rows(requests, 6)
        list(sampler.draw(rows, sampling()))
        for row in rows:
            texts.setdefault((row.index, row.sample), set()).add(tuple(row.tokens))
    assert all(len(found) == 1 for found in texts.values())
    assert len({next(iter(found)) for found in texts.values()}) > 12
    backwards = engine(LLAMA).generate(requests[::-1], sampling())
    forwards = engine(LLAMA).generate(requests, sampling())
    assert sorted(backwards.texts) == sorted(forwards.texts)


def test_fixed_shapes_give_the_same_tokens():
    """What a GPU captures as a graph: padded rows, tails and prompts to their full room."""
    requests = requests_of([3, 8, 5, 12], [(0.0, 1.0), (0.7, 0.3)], samples=3)
    plain, fixed = engine(LLAMA, max_rows=19), engine(LLAMA, max_rows=19)
    fixed.runner.fixed_shapes = True
    want, got = (e.generate(requests, sampling(max_new_tokens=9)) for e in (plain, fixed))
    assert got.texts == want.texts and got.finish == want.finish
    torch.testing.assert_close(got.logp_RT, want.logp_RT, atol=1e-5, rtol=0)
    assert set(fixed.memory.steps) == {16, 19}
    longer = requests_of([30, 25, 6, 9, 2], [(0.1, 0.9), (0.6, 0.4)], samples=2)  # larger caches
    want, got = (e.generate(longer, sampling(max_new_tokens=20)) for e in (plain, fixed))
    assert got.texts == want.texts
    steps = dict(fixed.memory.steps)
    fixed.generate(requests, sampling())  # what is there suffices: nothing is made anew
    assert steps.items() <= fixed.memory.steps.items()


def test_a_sweep_prefills_each_prompt_once_whatever_the_weights():
    """28 weights on 5 prompts, greedy and then sampled, counted by what goes through the model."""
    seen = []
    hook = LLAMA.network.body.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(kwargs["input_ids"].shape[1]),
        with_kwargs=True,
    )
    weights = [(i / 27, 1 - i / 27) for i in range(28)]
    requests = requests_of([9, 7, 5, 8, 6], weights, samples=1)
    sampler = engine(LLAMA, max_rows=16)
    greedy = sampler.generate(requests, sampling(temperature=0.0))
    sampled = sampler.generate(requests, sampling())
    hook.remove()
    suffixes = {(q.prompt.text, LLAMA.encode_suffix(q.w)) for q in requests}
    prefill = 9 + 7 + 5 + 8 + 6 + sum(len(s) for _, s in suffixes)
    assert sampler.counts.prompt == 35
    assert (greedy.prefill_tokens, sampled.prefill_tokens) == (prefill, 0)
    prefixes = sum(map(len, greedy.prefix))
    assert greedy.reused_tokens + prefill == sampled.reused_tokens == prefixes
    # rows' own tokens: all but the last of each goes through the model once
    own = sum(int(r.mask_RT.sum()) - len(requests) for r in (greedy, sampled))
    assert sampler.counts.decode == own
    assert sampler.counts.fresh == prefill + own
    assert sum(1 for width in seen if width > 3) <= 5  # passes over prompts


def test_slots_stay_full():
    """A slot whose row has ended goes to the next one in the same step."""
    sampler = engine(LLAMA, max_rows=4)
    rows = sampler.rows(requests_of([3, 4, 5, 6], [(0.5, 0.5)], samples=8), 8)
    full = []
    for _ in sampler.draw(rows, sampling(max_new_tokens=8)):
        full.append(len(sampler.live))
        if sampler.waiting:
            assert len(sampler.live) == 4
    assert len({row.finish for row in rows}) == 2, "rows of different lengths"
    assert sum(full) == sum(len(row.tokens) for row in rows)


def test_a_cut_row_draws_something_else_and_keeps_what_it_kept(monkeypatch):
    sampler = engine(LLAMA)
    (row,) = sampler.rows([Request(prompt([11, 12, 13]), None)], 12)
    monkeypatch.setattr(LLAMA, "stop_ids", frozenset())
    drawn = []
    for finished in sampler.draw([row], sampling(max_new_tokens=12)):
        if finished and len(drawn) < 6:
            drawn.append(list(row.tokens))
            sampler.cut(row, 4)
    assert row.attempt == 6 and row.finish == "length"
    assert all(tokens[:4] == drawn[0][:4] for tokens in drawn)
    assert len({tuple(tokens) for tokens in drawn}) == 6


def test_a_cancelled_row_leaves_its_slot():
    sampler = engine(LLAMA, max_rows=2)
    rows = sampler.rows(requests_of([3, 5], [(0.5, 0.5)], samples=3), 6)
    for step, _ in enumerate(sampler.draw(rows, sampling())):
        if step == 0:
            sampler.cancel(rows[0])
            sampler.cancel(rows[5])
    assert len(rows[0].tokens) == 1 and rows[5].tokens == []
    for row in rows[1:5]:
        check(LLAMA, row)


def test_an_abandoned_drawing_leaves_the_engine_usable():
    sampler = engine(LLAMA, max_rows=2)
    requests = requests_of([3, 5, 4], [(0.5, 0.5)], samples=3)
    for _ in sampler.draw(sampler.rows(requests, 6), sampling()):
        break
    again, new = (
        sampler.generate(requests, sampling()),
        engine(LLAMA).generate(requests, sampling()),
    )
    assert again.texts == new.texts


def test_a_failing_pass_is_not_taken_for_cached():
    """Memory runs out in the middle of a prompt's pass: it is computed again afterwards."""
    sampler = engine(LLAMA)
    requests = requests_of([3, 5], [(0.5, 0.5), (0.2, 0.8)])

    def fail(*_):
        raise MemoryError("no more")

    hook = LLAMA.network.body.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        sampler.generate(requests, sampling())
    hook.remove()
    rows = sampler.rows(requests, 6)
    list(sampler.draw(rows, sampling()))
    for row in rows:
        check(LLAMA, row)


def test_stop_strings_end_a_row_and_stay_in_it():
    drawn = engine(LLAMA).generate(requests_of([3], [None], 8), sampling(max_new_tokens=20))
    word = drawn.texts[0].split()[0]
    stopped = engine(LLAMA).generate(
        requests_of([3], [None], 8), sampling(max_new_tokens=20, stop=(word,))
    )
    assert stopped.texts[0] == word and stopped.finish[0] == "stop"
    for text, before in zip(stopped.texts, drawn.texts, strict=True):
        assert before.startswith(text) and word not in text.rpartition(" ")[0]


def test_a_prompt_at_the_context_s_limit_fits_and_one_token_more_does_not():
    fits = [Request(prompt(range(11, 11 + 57)), None)]  # with suffix and 6 new tokens: 64
    rows = engine(LLAMA).rows(fits, 6)
    assert len(rows[0].prompt) == 58
    list(engine(LLAMA).draw(rows, sampling()))
    check(LLAMA, rows[0])
    with pytest.raises(ValueError, match="59 tokens and 6 new ones exceed"):
        engine(LLAMA).generate([Request(prompt(range(11, 11 + 58)), None)], sampling())


def test_caches_outlast_draws_of_any_size_and_an_abandoned_one():
    weights = [(i / 10, 1 - i / 10) for i in (1, 4, 8)]
    requests = requests_of([9, 5, 12, 7], weights, samples=3)
    sampler = engine(LLAMA, max_rows=16, join=False)
    sampler.generate(requests, sampling())
    before = sampler.counts.prompt
    for part in (requests[:1], requests, requests[4:7], requests[::-1]):
        sampler.generate(part, sampling())
        for _ in sampler.draw(sampler.rows(part, 6), sampling()):
            break
    assert sampler.counts.prompt == before == 9 + 5 + 12 + 7


def test_one_preference_a_call_shares_the_prompt_unless_joined():
    requests = requests_of([9], [(i / 10, 1 - i / 10) for i in range(5)])
    apart, joined = engine(LLAMA, join=False), engine(LLAMA)
    for request in requests:
        assert (
            apart.generate([request], sampling()).texts
            == joined.generate([request], sampling()).texts
        )
    assert apart.counts.prompt == 9
    assert joined.counts.prompt == sum(9 + len(LLAMA.encode_suffix(q.w)) for q in requests)


def test_the_budget_holds_while_caches_are_made_anew(monkeypatch):
    """Draws of many sizes under one budget: the most that was ever allocated at a time."""
    alive, most = weakref.WeakSet(), [0]
    make = Shape.memory

    def counted(shape, places, room):
        blocks, layers = make(shape, places, room)
        for block in blocks:
            alive.add(block)
        most[0] = max(most[0], sum(x.numel() * x.element_size() for x in alive))
        return blocks, layers

    monkeypatch.setattr(Shape, "memory", counted)
    token = engine(LLAMA).shape.token_bytes
    budget = 400 * token
    sampler = engine(LLAMA, max_rows=16, max_cache_bytes=budget)
    weights = [(i / 10, 1 - i / 10) for i in (1, 4, 8)]
    for lengths, new in (([3] * 9, 4), ([20], 30), ([3, 4], 2), ([17] * 8, 20), ([30] * 5, 9)):
        requests = requests_of(lengths, weights)
        rows = sampler.rows(requests, new)
        list(sampler.draw(rows, sampling(max_new_tokens=new)))
        assert all(row.finish for row in rows)
        assert most[0] <= budget


def test_truncated_and_redrawn_rows_say_that_they_are_not_the_policy_s_own():
    requests = requests_of([3], [None])
    assert engine(LLAMA).generate(requests, sampling()).on_policy
    for truncation in ({"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}, {"temperature": 0.0}):
        assert not engine(LLAMA).generate(requests, sampling(**truncation)).on_policy


def test_bad_input():
    sampler = engine(LLAMA)
    one = Request(prompt([11, 12]), None)
    for change, message in (
        ({"max_new_tokens": 0}, "max_new_tokens=0: must be at least 1"),
        ({"temperature": -1.0}, r"temperature=-1\.0: must be 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"stop": ("",)}, "holds an empty string"),
    ):
        with pytest.raises(ValueError, match=message):
            sampling(**change)
    with pytest.raises(ValueError, match="nothing to sample"):
        sampler.generate([], sampling())
    with pytest.raises(ValueError, match="samples=0: must be at least 1"):
        sampler.generate([Request(one.prompt, None, 0)], sampling())
    with pytest.raises(ValueError, match="prompt x: is empty"):
        sampler.generate([Request(Prompt("x", " \n"), None)], sampling())
    with pytest.raises(ValueError, match=r"max_cache_bytes=100: one row .* needs \d+; raise it"):
        engine(LLAMA, max_cache_bytes=100).generate([one], sampling())
    with pytest.raises(ValueError, match="max_rows=0"):
        engine(LLAMA, max_rows=0)
    with pytest.raises(ValueError, match="max_cache_bytes=-1"):
        engine(LLAMA, max_cache_bytes=-1)
    (row,) = sampler.rows([one], 6)
    with pytest.raises(ValueError, match="keep=1: the row has 0 tokens"):
        row.cut(1)
