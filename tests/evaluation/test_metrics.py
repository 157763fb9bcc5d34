"""What an evaluation measures, against values worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from meal_fast.data.preferences import evaluation_weights, lattice
from meal_fast.evaluation import metrics

LINE = lattice(2, 5)  # (1, 0), (0.75, 0.25), … (0, 1)


def test_hypervolume_of_known_points():
    # Three unit steps of a staircase above (0, 0): 3 x 1 + 2 x 1 + 1 x 1.
    staircase = np.array([[3.0, 1.0], [2.0, 2.0], [1.0, 3.0]])
    assert metrics.hypervolume(staircase, np.zeros(2)) == pytest.approx(6.0)
    # A dominated point adds nothing; nor does one that is not above the reference in everything.
    more = np.vstack([staircase, [[1.5, 1.5], [9.0, -1.0]]])
    assert metrics.hypervolume(more, np.zeros(2)) == pytest.approx(6.0)
    # Three objectives: two boxes 2 x 1 x 1 and 1 x 2 x 1 that share a unit cube.
    boxes = np.array([[2.0, 1.0, 1.0], [1.0, 2.0, 1.0]])
    assert metrics.hypervolume(boxes, np.zeros(3)) == pytest.approx(3.0)


def test_hypervolumes_of_resamples_come_one_each():
    fronts = np.array([[[1.0, 1.0]], [[2.0, 3.0]]])
    assert metrics.hypervolume(fronts, np.zeros(2)).tolist() == [1.0, 6.0]


def test_reference_point_is_nadir_minus_a_tenth_of_the_range():
    points = np.array([[0.0, 5.0], [10.0, 3.0], [4.0, 4.0]])
    np.testing.assert_allclose(metrics.reference_point(points), [-1.0, 2.8])


def test_nondominated_keeps_equal_points_and_drops_what_is_no_better_anywhere():
    points = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.5], [1.0, 0.0], [0.6, 0.6]])
    assert metrics.nondominated(points).tolist() == [True, True, False, True, True]


def test_spearman_by_hand_and_against_scipy_with_ties():
    x = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    # ranks 2 1 4 3 5: sum d² = 4, rho = 1 - 6 x 4 / (5 x 24)
    assert metrics.spearman(x, np.array([0.2, 0.1, 7.0, 3.0, 9.0])) == pytest.approx(0.8)
    rng = np.random.default_rng(0)
    y = rng.integers(0, 4, size=(6, 5)).astype(float)
    ties = np.array([0.0, 0.0, 1.0, 1.0, 2.0])
    want = [stats.spearmanr(ties, row).statistic for row in y]
    np.testing.assert_allclose(metrics.spearman(ties, y), want)
    assert np.isnan(metrics.spearman(x, np.ones(5)))


def test_neighbours_gaps_and_violations_of_a_line():
    points = np.array([[4.0, 0.0], [4.0, 3.0], [5.0, 3.0], [1.0, 3.0], [0.0, 4.0]])
    pairs = metrics.neighbours(LINE)
    assert pairs == [(0, 1), (1, 2), (2, 3), (3, 4)]
    np.testing.assert_allclose(metrics.gaps(points, pairs), [3.0, 1.0, 4.0, 2**0.5])
    # w_1 falls along the line and its reward rises once (4 to 5); that of w_2 never falls.
    assert metrics.violations(LINE, points, pairs) == [(1, 4), (0, 4)]


def test_neighbours_of_an_uneven_grid_are_consecutive_and_of_a_triangle_one_step_apart():
    weights = evaluation_weights(2, 28)
    assert metrics.neighbours(weights) == [(i, i + 1) for i in range(27)]
    triangle = lattice(3, 3)  # 6 points: 3 corners, 3 midpoints
    pairs = metrics.neighbours(triangle)
    w = np.array(triangle)
    assert len(pairs) == 9
    assert all(np.abs(w[i] - w[j]).sum() == pytest.approx(1.0) for i, j in pairs)


def test_ends_and_expected_utility():
    points = np.array([[4.0, 0.0], [4.0, 3.0], [5.0, 3.0], [1.0, 3.0], [0.0, 4.0]])
    np.testing.assert_allclose(metrics.ends(LINE, points), [4.0, 4.0])
    # best of w · r at each w: 5, 4.5, 4, 3.5, 4
    assert metrics.expected_utility(LINE, points) == pytest.approx(21 / 5)
    # Three objectives: the corner against the mean of all points with no weight there.
    triangle = lattice(3, 3)
    rewards = np.array(triangle) ** 2 + np.array([0.0, 1.0, 2.0])
    np.testing.assert_allclose(metrics.ends(triangle, rewards), [1.0, 1.0, 1.0])


def test_bootstrap_is_the_same_every_time_and_rows_are_means():
    draw = metrics.resamples(16, 1000, seed=3)
    np.testing.assert_array_equal(draw, metrics.resamples(16, 1000, seed=3))
    assert not np.array_equal(draw, metrics.resamples(16, 1000, seed=4))
    np.testing.assert_allclose(draw.sum(1), 1.0)
    by_prompt = np.random.default_rng(0).normal(size=(3, 16, 2))
    means = metrics.resampled_means(by_prompt, draw)
    picked = np.repeat(np.arange(16), np.rint(draw[7] * 16).astype(int))
    np.testing.assert_allclose(means[7], by_prompt[:, picked].mean(1))


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(1)
    draw = metrics.resamples(30, 1000, seed=0)
    hits = 0
    for _ in range(200):
        x = rng.normal(2.0, 1.0, size=30)
        e = metrics.estimate(x.mean(), draw @ x, prompts=30)
        hits += e.low <= 2.0 <= e.high
    # Percentile intervals at n = 30 cover a little less than 95 %; three standard errors around.
    assert 0.88 <= hits / 200 <= 0.985


def test_one_prompt_gives_no_interval_and_undefined_becomes_null():
    alone = metrics.estimate(1.0, np.ones(10), prompts=1)
    assert (alone.low, alone.high) == (None, None)
    undefined = metrics.estimate(float("nan"), np.full(10, np.nan), prompts=8)
    assert metrics.plain(undefined) == {"value": None, "low": None, "high": None}


def test_five_weights_span_the_sweep():
    weights = lattice(2, 11)
    chosen = [weights[i][0] for i in metrics.five_weights(weights)]
    assert len(chosen) == 5 and chosen[0] == 1.0 and chosen[2] == 0.5 and chosen[-1] == 0.0
    triangle = lattice(3, 4)
    kept = [triangle[i] for i in metrics.five_weights(triangle)]
    np.testing.assert_allclose(kept, [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1 / 3, 1 / 3, 1 / 3)])
    assert len(metrics.five_weights(lattice(2, 2))) == 2


@pytest.mark.parametrize(
    ("value", "trials", "low", "high"),
    [(0.0, 10, 0.0, 0.27753), (0.5, 10, 0.23659, 0.76341), (1.0, 32, 0.89282, 1.0)],
)
def test_a_share_s_interval_is_wilson_s(value, trials, low, high):
    """The values of statsmodels' proportion_confint(method="wilson")."""
    found = metrics.share(value, trials)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-4)


@given(st.lists(st.floats(-5, 5, allow_subnormal=False), min_size=1, max_size=12))
def test_the_isotonic_curve_never_falls_and_is_the_nearest(values):
    y = np.array(values)
    fit = metrics.isotonic(y)
    assert fit.shape == y.shape and (np.diff(fit) >= 0).all()
    assert fit.sum() == pytest.approx(y.sum(), abs=1e-9)
    # the minimax formula of isotonic regression
    n = len(y)
    want = [
        max(min(y[a : b + 1].mean() for b in range(i, n)) for a in range(i + 1)) for i in range(n)
    ]
    np.testing.assert_allclose(fit, want, atol=1e-9)


def test_where_and_how_steeply_a_curve_rises():
    levels = np.linspace(0, 1, 5)
    dial, switch = metrics.rise(levels, 3 * levels), metrics.rise(levels, np.array([0, 0, 0, 1, 1]))
    assert (dial.half, dial.largest) == pytest.approx((0.5, 0.25))
    assert (switch.half, switch.largest, switch.between) == (0.625, 1.0, (0.5, 0.75))
    assert metrics.rise(levels, -levels) is None and metrics.rise(levels, np.ones(5)) is None
    noisy = metrics.rise(levels, np.array([0.0, 1.0, -1.0, 1.0, 2.0]))  # steps of +1, −2, +2, +1
    assert (noisy.half, noisy.largest) == pytest.approx((0.75, 0.5))
