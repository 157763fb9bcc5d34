"""The rules that keep and reject: each against its definition, row by row, on any grouping."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meal_fast.config.config import RejectionConfig
from meal_fast.ops.reference import scalarize
from meal_fast.rollout.rejection_rules import (
    accept,
    acceptance_uniform,
    cut_back,
    floored,
    hopeless_below,
    ray_preference,
    realized_preference,
    redraws,
    surplus,
    total_variation,
)

RULES = ("top-fraction", "threshold", "statistical", "trade-off", "combined")
# Quarters: exact in float32, and often equal.
scores = st.integers(-8, 8).map(lambda n: n / 4)


@st.composite
def batches(draw, distinct=False):
    """(score_R, group_R, what the gates read): groups uneven, in any order, of any numbers."""
    r = draw(st.integers(1, 24))
    if distinct:
        score = draw(st.permutations([i / 8 - 1 for i in range(r)]))
    else:
        score = draw(st.lists(scores, min_size=r, max_size=r))
    group = draw(st.lists(st.sampled_from([0, 3, -2, 10**12]), min_size=r, max_size=r))
    k = draw(st.integers(2, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    w, reward = torch.rand(2, r, k, generator=generator)
    inputs = {
        "w_RK": floored(w / w.sum(1, keepdim=True)),
        "w_hat_RK": realized_preference(reward * 4 - 2, 0.5),
        "uniform_R": torch.rand(r, generator=generator, dtype=torch.float64),
    }
    return torch.tensor(score), torch.tensor(group), inputs


@st.composite
def configs(draw):
    keep = draw(st.integers(0, 3))
    return RejectionConfig(
        rule=draw(st.sampled_from(RULES)),
        q=draw(st.sampled_from([0.1, 0.3, 0.5, 0.7, 1.0])),
        threshold=draw(scores),
        tau_a=draw(st.sampled_from([0.2, 1.0])),
        delta=draw(st.sampled_from([0.0, 0.2, 0.5, 1.0])),
        keep=keep,
        fallback=draw(st.sampled_from(["best", "none"])),
    )


def by_definition(config, score, group, inputs):
    """`accept` again, a group at a time, with Python's own sort."""
    score, group = score.tolist(), group.tolist()
    tv = ((inputs["w_RK"] - inputs["w_hat_RK"]).abs().sum(1) / 2).tolist()
    kept = set()
    for g in set(group):
        rows = [i for i, other in enumerate(group) if other == g]
        ranked = sorted(rows, key=lambda i: -score[i])  # a stable sort
        best = score[ranked[0]]
        room = round(config.q * 100) * len(rows)  # in hundredths, exactly
        top = ranked[: -(-room // 100)]
        quality = {
            "top-fraction": top,
            "combined": top,
            "threshold": [i for i in rows if score[i] >= config.threshold],
            "statistical": [
                i
                for i in rows
                if inputs["uniform_R"][i] < math.exp((score[i] - best) / config.tau_a)
            ],
            "trade-off": rows,
        }[config.rule]
        near = [i for i in rows if tv[i] <= config.delta]
        passed = [
            i
            for i in rows
            if i in quality and (config.rule not in ("trade-off", "combined") or i in near)
        ]
        if config.keep:
            ranks = config.rule in ("top-fraction", "combined")
            passed = ([i for i in ranked if i in passed] if ranks else passed)[: config.keep]
        if not passed and config.fallback == "best":
            passed = ranked[:1]
        kept |= set(passed)
    return [i in kept for i in range(len(score))]


@given(batches(), configs())
def test_every_rule_is_its_definition(batch, config):
    score, group, inputs = batch
    accepted, counts = accept(config, score, group, **inputs)
    assert accepted.dtype == torch.bool
    assert accepted.tolist() == by_definition(config, score, group, inputs)
    tried, _ = accept(config, score, group, **inputs, last=False)
    assert int(accepted.sum()) - int(tried.sum()) == counts["fallback"]
    if config.rule != "combined":
        gate = "trade-off" if config.rule == "trade-off" else "quality"
        assert counts[gate] + counts["keep"] == int((~tried).sum())
        assert set(counts) == {gate, "keep", "fallback"}


@given(batches(distinct=True), configs(), st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter_where_scores_differ(batch, config, random):
    score, group, inputs = batch
    if config.keep and config.rule not in ("top-fraction", "combined"):
        return  # these keep the first drawn
    order = list(range(len(score)))
    random.shuffle(order)
    shuffled = {name: x[order] for name, x in inputs.items()}
    accepted, counts = accept(config, score, group, **inputs)
    other, other_counts = accept(config, score[order], group[order], **shuffled)
    assert torch.equal(accepted[order], other) and counts == other_counts


@given(batches(), configs())
def test_a_group_does_not_depend_on_the_others(batch, config):
    score, group, inputs = batch
    accepted, _ = accept(config, score, group, **inputs)
    for g in group.unique():
        mine = group == g
        alone, _ = accept(
            config, score[mine], group[mine], **{name: x[mine] for name, x in inputs.items()}
        )
        assert torch.equal(alone, accepted[mine])


@given(batches())
def test_the_whole_fraction_keeps_all_and_a_small_one_the_best_of_each_group(batch):
    score, group, _ = batch
    all_of_it, counts = accept(RejectionConfig(rule="top-fraction", q=1.0), score, group)
    assert all_of_it.all() and counts == {"quality": 0, "keep": 0, "fallback": 0}
    one, counts = accept(RejectionConfig(rule="top-fraction", q=1e-3), score, group)
    assert int(one.sum()) == len(group.unique()) and counts["fallback"] == 0


def test_the_fraction_of_ten_rows_is_not_rounded_up_by_floating_point():
    score = torch.arange(10.0)
    accepted, _ = accept(RejectionConfig(rule="top-fraction", q=0.7), score, score.long() * 0)
    assert 0.7 * 10 > 7 or accepted.sum() == 7
    assert accepted.tolist() == [False] * 3 + [True] * 7


def test_statistical_accepts_as_often_as_the_formula_says():
    config = RejectionConfig(rule="statistical", tau_a=0.2, fallback="none")
    groups, score_of = 20_000, torch.tensor([0.3, 0.2, 0.0, -0.5])
    score = score_of.repeat(groups)
    group = torch.arange(groups).repeat_interleave(4)
    row = torch.arange(len(score)) * 7919 - 5000
    accepted, _ = accept(config, score, group, uniform_R=acceptance_uniform(3, row))
    want = torch.exp((score_of - score_of[0]).double() / 0.2)
    error = (want * (1 - want) / groups).sqrt()
    got = accepted.view(groups, 4).double().mean(0)
    assert got[0] == 1  # the best is always accepted
    assert ((got - want).abs() <= 4 * error).all()


def test_the_uniforms_are_the_rows_own_and_not_those_of_their_tokens():
    from meal_fast.ops.philox import uniform

    row = torch.arange(1000)
    u = acceptance_uniform(3, row)
    assert torch.equal(u.flip(0), acceptance_uniform(3, row.flip(0)))
    assert not (u == acceptance_uniform(4, row)).any()
    for position in range(50):
        assert not (u == uniform(3, row, torch.full_like(row, position))).any()


def test_realised_preference_by_hand():
    reward = torch.tensor([[1.0, 0.0], [0.0, 0.0], [-30.0, 30.0]], dtype=torch.float64)
    got = realized_preference(reward, 0.5)
    e = math.exp(2.0)
    assert got[0].tolist() == pytest.approx([e / (e + 1), 1 / (e + 1)])
    assert got[1].tolist() == [0.5, 0.5]
    assert got[2].tolist() == pytest.approx([1e-4 / 1.0001, 1 / 1.0001])
    assert torch.allclose(got, realized_preference(reward + 7.0, 0.5))  # softmax sees no shift
    assert torch.equal(got.sum(1), torch.ones(3, dtype=torch.float64))


def test_preference_on_the_ray_by_hand():
    z = torch.tensor([1.0, 2.0], dtype=torch.float64)
    reward = torch.tensor([[0.5, 1.5], [0.9, 1.7], [2.0, 1.0]], dtype=torch.float64)
    got = ray_preference(reward, z)
    assert got[0].tolist() == pytest.approx([0.5, 0.5])  # both gaps are 0.5
    assert got[1].tolist() == pytest.approx([0.75, 0.25])  # 0.1 and 0.3
    assert got[2].tolist() == pytest.approx([1 - 1e-4, 1e-4], abs=2e-5)  # above z*: gap 1e-4
    assert ray_preference(reward, z, 0.5)[1].tolist() == pytest.approx([0.9, 0.1])  # 1 to 9


@given(
    st.lists(st.floats(-3, 0.9), min_size=3, max_size=3),
    st.lists(st.floats(0.05, 1), min_size=3, max_size=3),
)
def test_no_other_preference_scores_a_response_better(reward, other):
    z = torch.ones(3, dtype=torch.float64)
    normalized = torch.tensor([reward], dtype=torch.float64)
    other = torch.tensor([other], dtype=torch.float64)
    other = other / other.sum()
    best = ray_preference(normalized, z)
    own = scalarize(normalized, best, z, 0.1, "tchebycheff")
    assert float(own) >= float(scalarize(normalized, other, z, 0.1, "tchebycheff")) - 1e-12
    gaps = best * (z - normalized)
    assert float(gaps.max() - gaps.min()) < 1e-9


@given(batches())
def test_total_variation_is_a_distance(batch):
    w, w_hat = batch[2]["w_RK"], batch[2]["w_hat_RK"]
    assert torch.equal(total_variation(w, w), torch.zeros(len(w)))
    assert torch.equal(total_variation(w, w_hat), total_variation(w_hat, w))
    assert (total_variation(w, w_hat) <= 1 + 1e-6).all()
    corners = torch.eye(2)
    assert total_variation(corners, corners.flip(0)).tolist() == [1.0, 1.0]


def test_no_rows_at_all():
    empty, none = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    for rule in RULES:
        accepted, counts = accept(
            RejectionConfig(rule=rule, keep=2),
            empty,
            none,
            w_RK=torch.zeros(0, 2),
            w_hat_RK=torch.zeros(0, 2),
            uniform_R=empty.double(),
        )
        assert accepted.shape == (0,) and not any(counts.values())


def test_what_accept_refuses():
    score, group = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0, 0, 1])
    top = RejectionConfig(rule="top-fraction")
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=rf"score_R: row 1 is {bad}"):
            accept(top, torch.tensor([0.0, bad, 2.0]), group)
    with pytest.raises(ValueError, match="group_R"):
        accept(top, score, group[:2])
    with pytest.raises(ValueError, match="group_R"):
        accept(top, score, group.float())
    with pytest.raises(ValueError, match=r"uniform_R: .*acceptance_uniform"):
        accept(RejectionConfig(rule="statistical"), score, group)
    with pytest.raises(ValueError, match=r"w_hat_RK, w_RK: .*'combined'"):
        accept(RejectionConfig(), score, group, w_RK=torch.ones(3, 2) / 2)
    with pytest.raises(ValueError, match="w_hat_RK: row 2"):
        w_hat = torch.tensor([[0.5, 0.5], [0.5, 0.5], [math.nan, 1.0]])
        accept(RejectionConfig(), score, group, w_RK=torch.ones(3, 2) / 2, w_hat_RK=w_hat)
    with pytest.raises(ValueError, match="K at least 2"):
        realized_preference(torch.zeros(3, 1), 0.5)
    with pytest.raises(ValueError, match="standardized_RK: row 0"):
        realized_preference(torch.tensor([[math.nan, 0.0]]), 0.5)
    with pytest.raises(ValueError, match="K at least 2"):
        ray_preference(torch.zeros(3, 1), torch.ones(1))
    with pytest.raises(ValueError, match="tau"):
        ray_preference(torch.zeros(3, 2), torch.ones(2), 0.0)
    with pytest.raises(ValueError, match="utopia_K"):
        ray_preference(torch.zeros(3, 2), torch.ones(3))
    with pytest.raises(ValueError, match="normalized_RK: row 0"):
        ray_preference(torch.tensor([[math.inf, 0.0]]), torch.ones(2))


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("q", 0.0, "in \\(0, 1\\]"),
        ("q", math.nan, "in \\(0, 1\\]"),
        ("q", 1.5, "in \\(0, 1\\]"),
        ("threshold", math.nan, "finite"),
        ("tau_a", 0.0, "positive"),
        ("tau", -1.0, "positive"),
        ("tau", math.inf, "positive"),
        ("delta", 1.1, "distance"),
        ("keep", -1, "negative"),
        ("rounds", -1, "negative"),
        ("rounds", 2, "set rejection.keep"),
        ("draws", -1, "negative"),
        ("segment", -1, "negative"),
        ("slack", -0.1, "negative"),
        ("rule", "best", "choose from top-fraction"),
        ("fallback", "all", "choose from best, none"),
    ],
)
def test_what_the_options_refuse(option, value, words):
    with pytest.raises(ValueError, match=rf"rejection\.{option}=.*{words}"):
        RejectionConfig(**{option: value})


def test_a_budget_below_what_is_to_be_kept_is_refused():
    with pytest.raises(ValueError, match=r"rejection\.draws=3: .*keep=4"):
        RejectionConfig(keep=4, draws=3)


def test_redraws_by_hand():
    config = RejectionConfig(keep=4, rounds=3, draws=20)
    kept = torch.tensor([4, 5, 2, 1, 0, 3, 0])
    drawn = torch.tensor([8, 8, 8, 8, 8, 19, 20])
    assert redraws(config, kept, drawn, 16).tolist() == [0, 0, 8, 12, 12, 1, 0]
    assert redraws(config, kept, drawn, 6).tolist() == [0, 0, 6, 6, 6, 1, 0]
    free = RejectionConfig(keep=4, rounds=3)
    assert redraws(free, kept, drawn, 100).tolist() == [0, 0, 8, 24, 32, 7, 80]
    assert not redraws(RejectionConfig(), kept, drawn, 16).any()


@given(batches(), st.sampled_from(["threshold", "trade-off"]), st.integers(1, 3), st.data())
def test_rows_that_can_no_longer_be_kept_change_nothing(batch, rule, keep, data):
    score, group, inputs = batch
    config = RejectionConfig(rule=rule, keep=keep, fallback="none")
    finished = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=len(score), max_size=len(score)))
    )
    free = RejectionConfig(rule=rule, fallback="none")
    passed, _ = accept(free, score, group, **inputs)
    stopped = surplus(config, passed & finished, finished, group)
    assert not (stopped & finished).any()
    kept, _ = accept(config, score, group, **inputs)
    assert not (stopped & kept).any()
    for i in (~finished).nonzero().flatten().tolist():
        before = passed & finished & (group == group[i]) & (torch.arange(len(score)) < i)
        assert bool(stopped[i]) == (int(before.sum()) >= keep)


def test_rules_that_rank_stop_no_row_early():
    true = torch.ones(4, dtype=torch.bool)
    rows = (true, torch.tensor([True, True, False, False]), torch.zeros(4, dtype=torch.int64))
    assert surplus(RejectionConfig(rule="threshold", keep=2), *rows).tolist() == [0, 0, 1, 1]
    for rule in ("top-fraction", "statistical", "combined"):
        assert not surplus(RejectionConfig(rule=rule, keep=2), *rows).any()
    assert not surplus(RejectionConfig(rule="threshold"), *rows).any()


def test_the_bar_of_a_group():
    finished = [0.1, 0.9, 0.5, 0.3, -2.0]
    bar = {
        "threshold": 0.25 - 0.1,
        "top-fraction": 0.3 - 0.1,  # ceil(0.5 · 5) = 3rd highest
        "combined": 0.3 - 0.1,
        "statistical": 0.9 + 0.2 * math.log(0.01) - 0.1,
        "trade-off": -math.inf,
    }
    for rule, want in bar.items():
        config = RejectionConfig(rule=rule, threshold=0.25)
        assert hopeless_below(config, finished) == pytest.approx(want)
        assert hopeless_below(config, []) == (0.15 if rule == "threshold" else -math.inf)


@given(st.lists(scores, max_size=8), scores)
def test_a_cut_ends_at_the_last_good_segment(segments, bar):
    keep = cut_back(segments, bar)
    if keep is None:
        assert not segments or segments[-1] >= bar
        return
    assert segments[-1] < bar and 0 <= keep < len(segments)
    assert keep == 0 or segments[keep - 1] >= bar
    assert all(score < bar for score in segments[keep:])
    with pytest.raises(ValueError, match=f"segment {len(segments)} is NaN"):
        cut_back([*segments, math.nan], bar)
