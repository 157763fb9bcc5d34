"""Scores and group-relative advantages against hand-computed values, limits and derivatives."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meal_fast import ops
from meal_fast.ops.reference import scalarize

F64 = torch.float64


def t(*values, dtype=F64):
    return torch.tensor(values, dtype=dtype)


def advantages(rewards, weights, group, **options):
    options.setdefault("utopia", [1.0] * rewards.shape[1])
    return ops.group_advantages(rewards, weights, torch.as_tensor(group), **options)


def test_scores_by_hand():
    r, w = t([0.2, 0.8], [0.5, 0.1]), t([0.25, 0.75], [0.5, 0.5])
    # w (1 - r): (0.2, 0.15) and (0.25, 0.45)
    linear, _ = advantages(r, w, [0, 0], scalarization="linear")
    torch.testing.assert_close(linear, t(0.65, 0.3))
    hard, _ = advantages(r, w, [0, 0], scalarization="tchebycheff")
    torch.testing.assert_close(hard, t(-0.2, -0.45))
    soft, _ = advantages(r, w, [0, 0], mu=0.1)
    by_hand = [-0.1 * math.log(math.exp(a) + math.exp(b)) for a, b in ((2, 1.5), (2.5, 4.5))]
    torch.testing.assert_close(soft, t(*by_hand))


def test_offset_and_divisor_normalise_before_the_score():
    r, w = t([3.0, 10.0], [5.0, 20.0]), t(0.5, 0.5)
    raw, _ = advantages(r, w, [0, 0], offset=[1.0, 0.0], divisor=[4.0, 20.0], mu=0.3)
    done, _ = advantages(t([0.5, 0.5], [1.0, 1.0]), w, [0, 0], mu=0.3)
    torch.testing.assert_close(raw, done)


def test_advantage_by_hand_with_the_unbiased_std():
    # Scores of the linear corner are the rewards; group 4 has 1, 2, 6, group 9 has 0, 1.
    r = t([1.0, 0], [2.0, 0], [6.0, 0], [0.0, 0], [1.0, 0])
    _, a = advantages(r, t(1.0, 0.0), [4, 4, 4, 9, 9], scalarization="linear", eps=0.5)
    std = math.sqrt((4 + 1 + 9) / 2)
    half = math.sqrt(0.5)
    expected = [-2 / (std + 0.5), -1 / (std + 0.5), 3 / (std + 0.5)]
    torch.testing.assert_close(a, t(*expected, -0.5 / (half + 0.5), 0.5 / (half + 0.5)))
    _, bare = advantages(r, t(1.0, 0.0), [4, 4, 4, 9, 9], scalarization="linear", scale="none")
    torch.testing.assert_close(bare, t(-2.0, -1.0, 3.0, -0.5, 0.5))


def test_limits_of_mu():
    torch.manual_seed(0)
    r, w, z = torch.randn(20, 3, dtype=F64), torch.rand(20, 3, dtype=F64), t(3.0, 4.0, 5.0)
    hard = scalarize(r, w, z, 1.0, "tchebycheff")
    torch.testing.assert_close(scalarize(r, w, z, 1e-12, "smooth-tchebycheff"), hard)
    mu = 1e5
    soft = scalarize(r, w, z, mu, "smooth-tchebycheff")
    linear = scalarize(r, w, z, 1.0, "linear")
    constant = -mu * math.log(3) - (w * z).sum(1) / 3
    torch.testing.assert_close(soft - constant, linear / 3, atol=1e-4, rtol=0)


def test_smooth_score_is_finite_in_float32_for_a_tiny_mu():
    score = scalarize(
        t([-50.0, 3.0], dtype=torch.float32),
        t([0.5, 0.5], dtype=torch.float32),
        t(1.0, 1.0, dtype=torch.float32),
        1e-30,
        "smooth-tchebycheff",
    )
    assert score.item() == pytest.approx(-25.5)


def test_derivatives_of_the_smooth_score():
    torch.manual_seed(1)
    r = torch.randn(6, 3, dtype=F64, requires_grad=True)
    w = torch.rand(6, 3, dtype=F64).softmax(1).requires_grad_()
    z, mu = t(2.0, 2.5, 3.0), 0.4
    score, _ = advantages(r, w, [0] * 6, utopia=z, mu=mu)
    g_r, g_w = torch.autograd.grad(score.sum(), (r, w))
    p = (w * (z - r) / mu).softmax(1)
    torch.testing.assert_close(g_r, w * p)
    torch.testing.assert_close(g_w, -(z - r) * p)


@pytest.mark.parametrize("how", ["linear", "tchebycheff", "smooth-tchebycheff"])
@pytest.mark.parametrize("scale", ["std", "none"])
def test_gradcheck(how, scale):
    torch.manual_seed(2)
    r = torch.randn(7, 3, dtype=F64, requires_grad=True)
    logits = torch.randn(7, 3, dtype=F64, requires_grad=True)
    group = torch.tensor([5, 2, 5, 2, 2, 5, 7])
    keep = torch.tensor([1, 1, 1, 1, 0, 1, 1]).bool()

    def f(r, logits):
        return ops.group_advantages(
            r,
            logits.softmax(1),
            group,
            utopia=[2.0, 2.0, 2.0],
            scalarization=how,
            scale=scale,
            keep=keep,
        )

    assert torch.autograd.gradcheck(f, (r, logits))


def test_a_group_of_equal_scores_has_no_advantage_and_no_derivative():
    # 0.1 three times: the float32 mean is not 0.1.
    r = torch.full((3, 2), 0.1, requires_grad=True)
    for eps in (0.0, 1e-4):
        _, a = advantages(r, t(0.3, 0.7, dtype=torch.float32), [1, 1, 1], eps=eps)
        assert a.tolist() == [0, 0, 0]
        (g,) = torch.autograd.grad((a * torch.tensor([1.0, 2.0, 3.0])).sum(), r)
        assert g.tolist() == [[0, 0]] * 3


def test_dropped_rows_singletons_and_empty_input():
    nan = math.nan
    r = t([1.0, 1.0], [nan, 5.0], [3.0, 3.0], [7.0, 7.0], [2.0, 2.0]).requires_grad_()
    w = t(0.5, 0.5).requires_grad_()
    keep = torch.tensor([True, False, True, True, False])
    score, a = advantages(r, w, [0, 0, 0, 1, 1], keep=keep, scalarization="linear", scale="none")
    assert a.tolist() == [-1, 0, 1, 0, 0]
    assert score.isnan().tolist() == [False, True, False, False, False]
    g_r, g_w = torch.autograd.grad(score[keep].sum() + a.sum(), (r, w))
    assert g_r.isfinite().all() and g_w.isfinite().all()
    empty = advantages(torch.zeros(0, 2), torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
    assert [x.shape for x in empty] == [(0,), (0,)]


def test_a_kept_row_without_a_score_is_nan_where_values_are_not_looked_at():
    from meal_fast.ops import reference

    r = t([1.0, 1.0], [math.inf, 0.0], [1.0, 2.0], [3.0, 1.0])
    w = t([0.5, 0.5], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5])
    one, zero = torch.ones(2, dtype=F64), torch.zeros(2, dtype=F64)
    group, keep = torch.tensor([0, 0, 1, 1]), torch.ones(4, dtype=torch.bool)
    options = {"mu": 0.1, "scalarization": "linear", "scale": "std", "eps": 0.0}
    score, a = reference.group_advantages(r, w, group, one, zero, one, keep, **options)
    assert score.isnan().tolist() == [False, True, False, False]
    assert a.isnan().tolist() == [True, True, False, False]
    w[3] = t(0.5, 0.6)
    score, a = reference.group_advantages(r, w, group, one, zero, one, keep, **options)
    assert score.isnan().tolist() == [False, True, False, True] and a.isnan().all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([torch.float32, torch.bfloat16]))
def test_order_of_rows_does_not_matter_and_results_are_float32(seed, dtype):
    torch.manual_seed(seed)
    r, w = torch.randn(12, 2, dtype=dtype), torch.rand(12, 2).softmax(1)
    group = torch.randint(-3, 3, (12,))
    order = torch.randperm(12)
    score, a = advantages(r, w, group)
    score_2, a_2 = advantages(r[order], w[order], group[order])
    assert score.dtype == a.dtype == torch.float32
    torch.testing.assert_close(score[order], score_2)
    torch.testing.assert_close(a[order], a_2, atol=1e-4, rtol=1e-4)
    for g in group.unique():
        assert abs(a[group == g].sum().item()) < 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": t([0.5, 0.5], [0.7, 0.2])}, r"weights: row 1 is \[0.7, 0.2\], not on the sim"),
        ({"weights": t([1.5, -0.5], [1.0, 0.0])}, r"weights: row 0 is \[1.5, -0.5\]"),
        ({"weights": t(math.nan, 1.0)}, r"weights: row 0 is \[nan, 1.0\]"),
        ({"weights": t(1.0, 0.0, 0.0)}, r"weights: shape \(3,\), expected \(2, 2\) or \(2,\)"),
        ({"rewards": t([0.0, 1.0], [math.nan, 2.0])}, r"rewards: row 1 is \[nan, 2.0\].*keep"),
        ({"rewards": t(0.0, 1.0)}, r"rewards.shape=\(2,\): must be \(R, K\)"),
        ({"group": torch.tensor([0.0, 1.0])}, "group: dtype torch.float32, expected int64"),
        ({"utopia": None}, "utopia=None: smooth-tchebycheff needs one"),
        ({"utopia": [1.0]}, r"utopia: shape \(1,\), expected \(2,\)"),
        ({"utopia": [1.0, math.inf]}, "utopia=.*must be finite"),
        ({"divisor": [0.0, 1.0]}, "divisor=.*must not be zero"),
        ({"mu": 0.0}, "mu=0.0: must be positive"),
        ({"scalarization": "max"}, "scalarization='max': choose from linear"),
        ({"scale": "var"}, "scale='var': choose from std, none"),
        ({"keep": torch.ones(2)}, "keep.dtype=torch.float32: must be bool"),
        ({"impl": "triton"}, "impl='triton': group_advantages in Triton computes in float32"),
        ({"impl": "cuda"}, "impl='cuda': group_advantages has none such here"),
        ({"impl": "jax"}, "impl='jax': choose from torch, triton, cuda"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {
        "rewards": t([0.0, 1.0], [1.0, 0.0]),
        "weights": t(0.5, 0.5),
        "group": torch.tensor([0, 0]),
        "utopia": [1.0, 1.0],
    } | change
    with pytest.raises(ValueError, match=message):
        ops.group_advantages(**given)
