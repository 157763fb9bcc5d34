"""The background scorer: order, overlap, backpressure, and what happens when it fails."""

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meal_fast.data.objectives import ObjectiveError, Objectives
from meal_fast.rollout.reward_worker import OrderedScorer

LONG = 20  # seconds after which an event that should have come counts as lost


def lengths(prompts, responses):
    return [[len(p), len(r)] for p, r in zip(prompts, responses, strict=True)]


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("meal-fast-scorer")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    assert not threads()
    yield
    assert not threads()


def eventually(condition):
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Gate:
    """A scorer that waits to be let through, call by call, and says when it is in a call."""

    def __init__(self):
        self.inside = threading.Semaphore(0)
        self.through = threading.Semaphore(0)
        self.calls = []

    def __call__(self, prompts, responses):
        self.calls.append(list(responses))
        self.inside.release()
        assert self.through.acquire(timeout=LONG)
        return lengths(prompts, responses)


@given(
    st.lists(st.text("ab", max_size=5), max_size=30),
    st.integers(1, 7),
    st.integers(1, 3),
    st.sets(st.integers(0, 30)),
)
@settings(max_examples=40)
def test_scores_come_in_the_order_submitted_whatever_the_chunks(responses, chunk, waiting, stops):
    sizes = []

    def score(prompts, chosen):
        sizes.append(len(chosen))
        return lengths(prompts, chosen)

    want = torch.tensor(lengths(responses, responses), dtype=torch.float32).view(-1, 2)
    with OrderedScorer(score, chunk=chunk, waiting=waiting) as scorer:
        for i, response in enumerate(responses):
            scorer.submit(("row", i), response, response)
            if i in stops:
                n = i // 2
                assert scorer.wait_until(n).flatten().tolist() == want[:n].flatten().tolist()
        assert len(scorer) == len(responses)
        keys, scores = scorer.results()
        assert len(scorer) == scorer.scored == 0
    assert keys == tuple(("row", i) for i in range(len(responses)))
    assert scores.dtype == torch.float32
    assert scores.flatten().tolist() == want.flatten().tolist()
    assert sum(sizes) == len(responses) and all(0 < n <= chunk for n in sizes)


def test_chunks_hold_the_same_rows_however_long_scoring_takes():
    seen = []
    for pause in (0.0, 0.002):

        def score(prompts, responses, pause=pause):
            seen.append(list(responses))
            time.sleep(pause)
            return lengths(prompts, responses)

        with OrderedScorer(score, chunk=3, waiting=2) as scorer:
            for i in range(11):
                scorer.submit(i, "p", str(i))
            scorer.results()
    assert seen[:4] == seen[4:]
    assert [len(rows) for rows in seen[:4]] == [3, 3, 3, 2]


def test_the_caller_goes_on_while_a_chunk_is_scored():
    gate = Gate()
    with OrderedScorer(gate, chunk=2, waiting=4) as scorer:
        scorer.submit(0, "p", "a")
        scorer.submit(1, "p", "bb")
        assert gate.inside.acquire(timeout=LONG)
        # The scorer is inside its first call, and stays there until this thread lets it go.
        for i in range(2, 6):
            scorer.submit(i, "p", "c" * i)
        assert gate.calls == [["a", "bb"]] and scorer.scored == 0 and len(scorer) == 6
        for _ in range(3):
            gate.through.release()
        assert scorer.wait_until(4)[:, 1].tolist() == [1, 2, 2, 3]
        assert scorer.results()[0] == (0, 1, 2, 3, 4, 5)
    assert threading.current_thread().name not in {t.name for t in threads()}


def test_submit_waits_when_too_much_is_unscored():
    gate = Gate()
    finished = threading.Event()
    scorer = OrderedScorer(gate, chunk=1, waiting=2)

    def produce():
        for i in range(4):
            scorer.submit(i, "p", str(i))
        finished.set()

    producer = threading.Thread(target=produce)
    producer.start()
    assert gate.inside.acquire(timeout=LONG)
    eventually(lambda: len(scorer) == 3)
    assert not finished.wait(0.1), "the third chunk must wait for the first"
    assert len(scorer) == 3, "two chunks in flight, the third row's chunk held back"
    gate.through.release()
    gate.through.release()
    assert finished.wait(LONG)
    gate.through.release()
    gate.through.release()
    producer.join(LONG)
    assert scorer.results()[0] == (0, 1, 2, 3)
    scorer.close()


def fails_on(text, how):
    def score(prompts, responses):
        if text in responses:
            return how(prompts, responses)
        return lengths(prompts, responses)

    return score


def raising(prompts, responses):
    raise KeyError("no such reward")


def test_an_exception_surfaces_at_the_caller_with_its_row_and_the_scorer_stays_usable():
    with OrderedScorer(fails_on("bad", raising), chunk=3, waiting=2) as scorer:
        for i, response in enumerate(["a", "b", "c", "d", "bad"]):
            scorer.submit(f"r{i}", "p", response)
        with pytest.raises(ObjectiveError, match=r"^scoring row r4: KeyError: 'no such") as caught:
            for i in range(5, 500):
                scorer.submit(f"r{i}", "p", "e")
            scorer.results()
        assert isinstance(caught.value.__cause__, KeyError)
        assert len(scorer) == 0 and scorer.scored == 0
        scorer.submit("again", "pp", "fff")
        keys, scores = scorer.results()
        assert keys == ("again",) and scores.tolist() == [[2, 3]]


def test_it_surfaces_at_the_next_submit_too():
    failed = threading.Event()

    def score(prompts, responses):
        failed.set()
        raise RuntimeError("down")

    with OrderedScorer(score, chunk=1) as scorer:
        scorer.submit(7, "p", "a")
        assert failed.wait(LONG)
        with pytest.raises(ObjectiveError, match="row 7: RuntimeError: down"):
            for i in range(8, 100):
                scorer.submit(i, "p", "b")


def test_a_batch_that_fails_together_names_all_its_rows():
    def score(prompts, responses):
        if len(responses) > 1:
            raise MemoryError("too many")
        return lengths(prompts, responses)

    with OrderedScorer(score, chunk=2) as scorer:
        scorer.submit("x", "p", "a")
        with pytest.raises(ObjectiveError, match="rows x, y, though no row of them alone: Mem"):
            scorer.submit("y", "p", "b")
            scorer.results()


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda p, r: [[1.0, 2.0]] * (len(r) + 1), r"rows 0, 1: .*shape \(3, 2\) for 2 responses"),
        (lambda p, r: [1.0] * len(r), r"rows 0, 1: .*shape \(2,\)"),
        (lambda p, r: [[1.0, 2.0], [0.0, float("nan")]], r"row 1: objective 1 \(from 0\) is nan"),
        (lambda p, r: [[float("inf"), 2.0], [0.0, 1.0]], r"row 0: objective 0 \(from 0\) is inf"),
        (lambda p, r: [["a", "b"]] * 2, r"row 0: \w+Error"),
    ],
)
def test_what_a_scorer_must_not_return(returned, words):
    with OrderedScorer(returned, chunk=2) as scorer:
        for i in range(2):
            scorer.submit(i, "p", "r")
        with pytest.raises(ObjectiveError, match=words):
            scorer.results()
        assert len(scorer) == 0


def test_a_scorer_that_changes_its_mind_about_the_objectives():
    with OrderedScorer(lambda p, r: [[1.0] * (2 + ("c" in r))], chunk=1) as scorer:
        scorer.submit(0, "p", "a")
        scorer.wait_until(1)
        with pytest.raises(ObjectiveError, match=r"row 1: .*3 columns after 2"):
            scorer.submit(1, "p", "c")
            scorer.results()


def test_the_objectives_of_a_run_and_their_own_message():
    def quality(prompts, responses):
        return [len(r) / (r != "zero") for r in responses]

    objectives = Objectives({"long": quality, "even": lambda p, r: [len(x) % 2 for x in r]})
    with OrderedScorer(objectives.rewards, chunk=2) as scorer:
        scorer.submit("a", "p", "one")
        scorer.submit("b", "p", "twelve")
        assert scorer.results()[1].tolist() == [[3, 1], [6, 0]]
        scorer.submit("c", "p", "five")
        scorer.submit("d", "p", "zero")
        with pytest.raises(ObjectiveError, match="row d: objective 'long' raised ZeroDivision"):
            scorer.results()


def test_closing_drops_what_waits_and_only_waits_for_the_call_under_way():
    gate = Gate()
    scorer = OrderedScorer(gate, chunk=1, waiting=4)
    for i in range(4):
        scorer.submit(i, "p", "r")
    assert gate.inside.acquire(timeout=LONG)
    waiting = [future for _, future in scorer._pending][1:]
    closer = threading.Thread(target=scorer.close)
    closer.start()
    eventually(lambda: all(future.cancelled() for future in waiting))
    gate.through.release()
    closer.join(LONG)
    assert not closer.is_alive() and len(gate.calls) == 1
    scorer.close()
    with pytest.raises(ValueError, match="closed"):
        scorer.submit(9, "p", "r")
    with pytest.raises(ValueError, match="closed"):
        scorer.results()


def test_leaving_the_block_by_an_exception_ends_the_thread():
    with pytest.raises(RuntimeError, match="the caller's own"), OrderedScorer(lengths) as scorer:
        for i in range(20):
            scorer.submit(i, "p", "r")
        raise RuntimeError("the caller's own")
    assert not threads()


def test_bad_options():
    with pytest.raises(ValueError, match="chunk=0"):
        OrderedScorer(lengths, chunk=0)
    with pytest.raises(ValueError, match="waiting=0"):
        OrderedScorer(lengths, waiting=0)
    with OrderedScorer(lengths) as scorer:
        with pytest.raises(ValueError, match="n=1: 0 rows"):
            scorer.wait_until(1)
        keys, scores = scorer.results()
        assert keys == () and scores.numel() == 0
