"""What may be done to rows while others are drawn."""

import pytest

from meal_fast.data_types import Prompt
from meal_fast.rollout import Engine, Request
from tests.helpers.models import NumberPolicy
from tests.rollout.test_engine import check, requests_of, sampling

LLAMA = NumberPolicy("llama", stop=frozenset({5, 6, 7, 8, 9, 10}))
SAMPLING = sampling()


def engine() -> Engine:
    return Engine(LLAMA, LLAMA.network, max_rows=2)


def test_rows_that_are_added_are_drawn_as_those_that_were_there():
    sampler = engine()
    first = sampler.rows(requests_of([5], [(0.5, 0.5)], samples=3), 6)
    more = sampler.rows(requests_of([3, 4], [(0.2, 0.8)], samples=2), 6)
    for step, _ in enumerate(sampler.draw(first, SAMPLING)):
        if step == 1:
            sampler.add(more)
            assert list(sampler.waiting)[-len(more) :] == more
    alone = engine()
    again = alone.rows(requests_of([3, 4], [(0.2, 0.8)], samples=2), 6)
    list(alone.draw(again, SAMPLING))
    assert [row.tokens for row in more] == [row.tokens for row in again]
    assert all(row.finish in ("stop", "length") for row in first + more)


def test_a_row_longer_than_there_is_memory_for_is_not_added():
    sampler = engine()
    first = sampler.rows(requests_of([5], [(0.5, 0.5)], samples=3), 6)
    long = sampler.rows([Request(Prompt("long", " ".join(["11"] * 40)), None)], 6)
    for step, _ in enumerate(sampler.draw(first, SAMPLING)):
        if step == 0:
            with pytest.raises(ValueError, match=r"prompt long: 40 tokens.*there is memory for"):
                sampler.add(long)
    assert all(row.finish in ("stop", "length") for row in first) and not long[0].finish


def test_a_cancelled_row_leaves_its_slot_and_an_ended_one_is_not_cancelled():
    sampler = engine()
    rows = sampler.rows(requests_of([3, 5], [(0.5, 0.5)], samples=3), 6)
    for step, ended in enumerate(sampler.draw(rows, SAMPLING)):
        if step == 0:
            sampler.cancel(rows[0])
            sampler.cancel(rows[5])
            with pytest.raises(ValueError, match=r"has ended \(cancelled\)"):
                sampler.cancel(rows[0])
        assert step == 0 or not any(row.finish == "cancelled" for row in ended)
    assert len(rows[0].tokens) == 1 and rows[5].tokens == []


def test_only_a_live_row_is_cut():
    sampler = engine()
    rows = sampler.rows(requests_of([3, 5], [(0.5, 0.5)], samples=3), 6)
    for step, _ in enumerate(sampler.draw(rows, SAMPLING)):
        if step == 1:
            with pytest.raises(ValueError, match="is in no slot"):
                sampler.cut(sampler.waiting[0], 0)
            live = sampler.live[0]
            sampler.cut(live, 0)
    assert live.attempt == 1 and live.finish in ("stop", "length")
    with pytest.raises(ValueError, match="is in no slot"):
        sampler.cut(live, 0)
    for row in rows:
        check(LLAMA, row)
