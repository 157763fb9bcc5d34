"""Rejection sampling on the engine: what is kept, at what cost; timing changes nothing."""

import threading
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch

from meal_fast.config.config import RejectionConfig
from meal_fast.data.objectives import ObjectiveError
from meal_fast.rollout import Engine, Row, Sampling, rejection_sample
from meal_fast.rollout import rejection_sampler as module
from meal_fast.rollout.rejection_rules import realized_preference
from tests.helpers.models import NumberPolicy
from tests.rollout.test_engine import requests_of, wanted

POLICY = NumberPolicy("llama", stop=frozenset({5, 6, 7, 8}))
SAMPLING = Sampling(max_new_tokens=8, temperature=0.9, seed=3)
REQUESTS = requests_of([4, 7], [(0.8, 0.2), (0.3, 0.7)], samples=4)


def score(prompts, responses):
    """The shares of even and of small numbers."""
    rows = [list(map(int, text.split())) for text in responses]
    even = [sum(t % 2 == 0 for t in row) / len(row) for row in rows]
    return torch.tensor(
        [[e, sum(t < 50 for t in row) / len(row)] for e, row in zip(even, rows, strict=True)]
    )


def judge(reward_RK, w_RK):
    w_hat = realized_preference((reward_RK - 0.5) / 0.25, 0.5)
    return (reward_RK * w_RK).sum(1), w_hat


def engine() -> Engine:
    return Engine(POLICY, POLICY.network, max_rows=6)


def sample(config, *, sampler=None, score=score, chunk=8):
    sampler = sampler or engine()
    return rejection_sample(sampler, REQUESTS, SAMPLING, config, score, judge, chunk=chunk)


def check(kept):
    """Whatever happened to them: their log-probabilities, rewards and order are right."""
    rolled = kept.rollout
    assert not rolled.on_policy
    assert rolled.group_R.tolist() == sorted(rolled.group_R.tolist())
    torch.testing.assert_close(kept.reward_RK, score([], rolled.texts))
    torch.testing.assert_close(kept.score_R, judge(kept.reward_RK, rolled.condition_RK)[0])
    for r, g in enumerate(rolled.group_R.tolist()):
        tokens = rolled.tokens_RT[r][rolled.mask_RT[r]].tolist()
        got = rolled.logp_RT[r][rolled.mask_RT[r]].tolist()
        assert got == pytest.approx(wanted(POLICY, rolled.prefix[g], tokens), abs=1e-4, rel=0)


def same(a, b):
    assert a.rollout.texts == b.rollout.texts
    assert a.log == b.log
    torch.testing.assert_close(a.reward_RK, b.reward_RK, rtol=0, atol=0)


CONFIGS = {
    "top-fraction": RejectionConfig(rule="top-fraction", q=0.5),
    "threshold": RejectionConfig(rule="threshold", threshold=0.62, keep=3, rounds=6),
    "statistical": RejectionConfig(rule="statistical", tau_a=0.1, keep=4, rounds=3),
    "trade-off": RejectionConfig(rule="trade-off", delta=0.3, keep=2, rounds=5),
    "combined": RejectionConfig(rule="combined", delta=0.6, keep=3, rounds=2),
    "segments": RejectionConfig(rule="threshold", threshold=0.6, keep=3, rounds=4, segment=3),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_kept_passes_the_rule_and_comes_with_the_right_log_probabilities(name):
    config = CONFIGS[name]
    kept = sample(config)
    check(kept)
    log = kept.log
    assert log["ended"] + log["cancelled"] == log["drawn"] >= 16
    assert log["kept"] == len(kept.rollout.texts) >= 4, "each group falls back on its best"
    if config.rule == "threshold":
        fallback = round(log["rejected/fallback"] * log["ended"])
        assert int((kept.score_R < config.threshold).sum()) == fallback
    if config.keep:
        assert max(Counter(kept.rollout.group_R.tolist()).values()) <= config.keep
    if config.rounds:
        assert log["rounds"] > 1
    assert (log["cuts"] > 0) == (name == "segments")


def test_rounds_reuse_every_prefix():
    """Prompts and suffixes go through the model once, however many rounds there are."""
    sampler = engine()
    kept = sample(
        RejectionConfig(rule="threshold", threshold=2.0, keep=3, rounds=4), sampler=sampler
    )
    suffixes = {(q.prompt.text, POLICY.encode_suffix(q.w)) for q in REQUESTS}
    assert kept.log["rounds"] == 5 and kept.log["kept"] == 4  # nothing passes: the best of each
    assert kept.log["prompt_tokens"] == 4 + 7
    assert kept.log["suffix_tokens"] == sum(len(s) for _, s in suffixes)
    assert kept.log["rejected/fallback"] == 4 / kept.log["ended"]
    again = sample(RejectionConfig(rule="top-fraction"), sampler=sampler)
    assert again.log["prompt_tokens"] == again.log["suffix_tokens"] == 0


def test_a_budget_of_draws_ends_the_rounds():
    config = RejectionConfig(rule="threshold", threshold=2.0, keep=3, rounds=9, draws=7)
    assert sample(config).log["drawn"] == 4 * 7
    few = replace(config, draws=3)
    with pytest.raises(ValueError, match=r"rejection\.draws=3: the first round alone draws 4"):
        sample(few)


def test_tokens_reused_and_computed_are_those_of_all_rows():
    kept = sample(RejectionConfig(rule="threshold", threshold=2.0, fallback="none"))
    assert kept.rollout.reused_tokens == kept.log["reused_tokens"] > 0
    assert kept.rollout.prefill_tokens == kept.log["prompt_tokens"] + kept.log["suffix_tokens"]


def test_redrawn_rows_are_new_text():
    config = RejectionConfig(rule="trade-off", delta=1.0, keep=12, rounds=4)
    kept = sample(config)
    assert kept.log["kept"] == 4 * 12
    groups = kept.rollout.group_R.tolist()
    assert len(set(zip(groups, kept.rollout.texts, strict=True))) > 40


@pytest.mark.parametrize("name", ["threshold", "segments", "trade-off"])
def test_a_slow_scorer_changes_nothing(name):
    """Scores that come late are waited for, those that come early are not used early."""
    calls, alone = [], threading.Lock()

    def slow(prompts, responses):
        assert alone.acquire(blocking=False), (
            "a reward model need not be safe to call twice at once"
        )
        calls.append(threading.get_ident())
        time.sleep(0.002 * (len(calls) * 7 % 5))
        alone.release()
        return score(prompts, responses)

    same(sample(CONFIGS[name], chunk=1), sample(CONFIGS[name], score=slow, chunk=1))
    assert len(set(calls)) == 1 and calls[0] != threading.get_ident()


def test_stopping_rows_early_changes_nothing_that_is_kept(monkeypatch):
    config = CONFIGS["threshold"]
    early = sample(config)
    monkeypatch.setattr(module, "_LAG", 10**6)
    late = sample(config)
    assert early.log["cancelled"] > 0 == late.log["cancelled"]
    assert early.rollout.texts == late.rollout.texts
    assert early.log["decode_tokens"] < late.log["decode_tokens"]


def test_cutting_back_keeps_the_good_start(monkeypatch):
    """A hopeless response goes on from its last good segment, with something else behind it."""
    last_cut = {}
    cut = Row.cut

    def watched(row, keep):
        last_cut[row] = (list(row.tokens), keep)
        cut(row, keep)

    monkeypatch.setattr(Row, "cut", watched)
    kept = sample(CONFIGS["segments"])
    assert kept.log["cuts"] >= len(last_cut) > 0
    assert any(keep for _, keep in last_cut.values())
    for row, (before, keep) in last_cut.items():
        assert keep % 3 == 0 and row.tokens[:keep] == before[:keep]
        assert row.finish in ("stop", "length") and row.attempt >= 1
    assert any(row.tokens != before for row, (before, _) in last_cut.items())


def test_nothing_kept_is_an_empty_rollout():
    config = RejectionConfig(rule="threshold", threshold=2.0, fallback="none")
    kept = sample(config)
    assert kept.log["kept"] == 0 and kept.rollout.texts == ()
    assert kept.rollout.tokens_RT.shape[0] == kept.reward_RK.shape[0] == 0


def test_a_scorer_that_raises_names_the_row_and_leaves_the_engine_usable():
    sampler = engine()
    victim = []

    def broken(prompts, responses):
        if len(victim) < 1:
            victim.append(responses[0])
        if victim[0] in responses:
            raise RuntimeError("the reward model lost its file")
        return score(prompts, responses)

    message = r"scoring row 1[12] 4.*/\(0\.\d, 0\.\d\)/\d: RuntimeError: .* lost its file"
    with pytest.raises(ObjectiveError, match=message):
        sample(CONFIGS["threshold"], sampler=sampler, score=broken)
    assert not [t for t in threading.enumerate() if "scorer" in t.name]
    same(
        replace(sample(CONFIGS["top-fraction"], sampler=sampler), log={}),
        replace(sample(CONFIGS["top-fraction"]), log={}),
    )
