"""Scores and advantages in Triton against torch in float64: values, gradients, awkward groups."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton has no build for this platform")

from meal_fast.kernels import group_advantages as kernels

from meal_fast import ops
from meal_fast.ops import dispatch, reference

# What a select leaves out is computed all the same, and numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HOWS = ("linear", "tchebycheff", "smooth-tchebycheff")
F64 = torch.float64


def draw(seed, rows, k):
    """Rewards and weights, in numbers that bfloat16 holds too."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(rows, k, generator=generator).bfloat16().float()
    return rewards, torch.rand(rows, k, generator=generator).softmax(1)


def run(impl, device, rewards, weights, *, score_counts=None, **options):
    """(score, advantage, gradients of rewards and weights) of a fixed mix of the two results."""
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    r = rewards.detach().to(device).requires_grad_()
    w = weights.detach().to(device).requires_grad_()
    score, advantage = ops.group_advantages(r, w, impl=impl, **options)
    i = torch.arange(len(r), device=device, dtype=F64)
    counted = score if score_counts is None else torch.where(score_counts.to(device), score, 0)
    mix = (counted * (i + 1).cos()).sum() + (advantage * (3 * i).sin()).sum()
    return [x.detach().cpu() for x in (score, advantage, *torch.autograd.grad(mix, (r, w)))]


def check(device, rewards, weights, tolerance=2e-5, **options):
    got = run("triton", device, rewards, weights, **options)
    expected = run("torch", "cpu", rewards.double(), weights.double(), **options)
    for name, a, b in zip(("score", "advantage", "d r", "d w"), got, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(
            a.double(), b, rtol=tolerance, atol=tolerance, equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 40),
    k=st.integers(1, 5),
    groups=st.integers(1, 6),
    how=st.sampled_from(HOWS),
    scale=st.sampled_from(["std", "none"]),
    dropping=st.booleans(),
)
def test_any_groups(device, seed, rows, k, groups, how, scale, dropping):
    torch.manual_seed(seed)
    rewards, weights = draw(seed, rows, k)
    keep = torch.rand(rows) < 0.7 if dropping else None
    if keep is not None:
        rewards[~keep] = torch.tensor([math.nan, math.inf, 3.0])[torch.randint(0, 3, (k,))]
    check(
        device, rewards, weights, score_counts=keep, keep=keep, utopia=[2.0] * k, eps=0.5,
        group=torch.randint(-2, groups, (rows,)), scalarization=how, scale=scale,
    )  # fmt: skip


@pytest.mark.parametrize("how", HOWS)
def test_groups_longer_than_a_tile_and_empty_ones(device, how):
    # 96 rows in 5 groups: tiles of 32 rows, of which the first group takes three.
    rewards, weights = draw(1, 96, 3)
    offsets = torch.tensor([0, 80, 80, 83, 84, 96])
    assert kernels.configuration(96, 3, 5)["BLOCK"] == 32
    options = {
        "utopia": [2.0, 2.5, 3.0],
        "offset": [0.1, 0.2, -0.3],
        "divisor": [1.0, -2.0, 3.0],
        "scalarization": how,
        "eps": 0.1,
    }
    check(device, rewards, weights, offsets=offsets, **options)
    group = torch.repeat_interleave(torch.arange(5), offsets.diff())
    sorted_ = run("triton", device, rewards, weights, offsets=offsets, **options)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    score, advantage, *_ = run(
        "triton", device, rewards[order], weights[order], group=group[order], **options
    )
    torch.testing.assert_close(score, sorted_[0][order])
    torch.testing.assert_close(advantage, sorted_[1][order], rtol=1e-4, atol=1e-5)


def test_sixteen_objectives_and_a_thousand_rows(device):
    rewards, weights = draw(2, 1024, 16)
    assert kernels.configuration(1024, 16, 1) == {"K_TILE": 16, "BLOCK": 128, "num_warps": 4}
    check(device, rewards, weights, offsets=torch.tensor([0, 1024]), utopia=[3.0] * 16)


def test_a_tile_stays_within_its_bound():
    for k in (1, 2, 3, 16, 17, 128):
        for rows, groups in ((1, 1), (10, 100), (64, 8), (10**6, 10**6), (10**6, 1)):
            c = kernels.configuration(rows, k, groups)
            assert k <= c["K_TILE"] < 2 * k and 1 <= c["num_warps"] <= 4
            assert c["K_TILE"] * c["BLOCK"] <= kernels.TILE and c["BLOCK"] & (c["BLOCK"] - 1) == 0


def test_equal_scores_singletons_and_dropped_rows_are_exactly_zero(device):
    # 0.1 three times: its float32 mean is not 0.1.
    rewards, weights = torch.full((6, 2), 0.1), torch.tensor([0.3, 0.7])
    rewards[5] = math.nan
    keep = torch.tensor([True] * 4 + [False] * 2)
    group = torch.tensor([1, 1, 1, 2, 2, 3])
    for eps in (0.0, 1e-4):
        score, advantage, g_r, g_w = run(
            "triton", device, rewards, weights, group=group, keep=keep, utopia=[1.0, 1.0], eps=eps,
            score_counts=torch.zeros(6, dtype=torch.bool),
        )  # fmt: skip
        assert advantage.tolist() == [0] * 6 and score.isnan().tolist() == [False] * 5 + [True]
        assert not g_r.any() and not g_w.any() and g_w.shape == (2,)


def test_a_spread_far_below_the_mean_survives(device):
    # In float32 E[S²] - E[S]² of these is off by several units; their variance is 2/3.
    rewards = torch.tensor([[4095.0], [4096.0], [4097.0], [4096.0]])
    _, advantage, *_ = run(
        "triton", device, rewards, torch.ones(4, 1), offsets=torch.tensor([0, 4]), utopia=None,
        scalarization="linear", eps=0.0,
    )  # fmt: skip
    unit = math.sqrt(3 / 2)
    torch.testing.assert_close(advantage, torch.tensor([-unit, 0, unit, 0]), atol=1e-6, rtol=1e-6)


def test_ties_of_the_largest_shortfall_share_the_gradient(device):
    rewards, weights = torch.zeros(2, 3), torch.tensor([[0.25, 0.25, 0.5], [0.4, 0.3, 0.3]])
    check(
        device, rewards, weights, group=torch.tensor([0, 1]), utopia=[2.0, 2.0, 1.0],
        scalarization="tchebycheff",
    )  # fmt: skip


def test_views_and_low_precision(device):
    rewards, weights = draw(3, 12, 3)
    group = torch.arange(12) % 4
    options = {"utopia": [2.0, 2.5, 3.0], "eps": 0.1}
    plain = run("triton", device, rewards, weights[:1].expand(12, 3), group=group, **options)
    view = rewards.t().contiguous().t()
    one = run("triton", device, view, weights[0], group=group, **options)
    for a, b in zip(plain[:3], one[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(plain[3].sum(0), one[3])
    half = run("triton", device, rewards.bfloat16(), weights, group=group, **options)
    check_half = run("triton", device, rewards, weights, group=group, **options)
    assert half[0].dtype == torch.float32 and half[2].dtype == torch.bfloat16
    for a, b in zip(half, check_half, strict=True):
        torch.testing.assert_close(a.float(), b, rtol=1e-2, atol=1e-2)


def plan_for(offsets, k, device, **changes):
    """What the public op hands to the kernel: here without its look at the values."""
    one = torch.ones(k, device=device)
    given = {
        "offsets": offsets.to(device),
        "order": None,
        "utopia": 2 * one,
        "offset": None,
        "divisor": None,
        "keep": None,
        "mu": 0.1,
        "scalarization": "smooth-tchebycheff",
        "scale": "std",
        "eps": 1e-4,
    }
    return kernels.Plan(**given | changes)


@pytest.mark.parametrize("scale", ["std", "none"])
def test_a_kept_row_without_a_score_poisons_its_group_alone(device, scale):
    rewards, weights = draw(4, 9, 2)
    rewards[1, 0] = math.nan
    weights[8] = torch.tensor([0.5, 0.6])
    offsets = torch.tensor([0, 3, 6, 8, 9])
    one, zero, keep = torch.ones(2), torch.zeros(2), torch.ones(9, dtype=torch.bool)
    expected = reference.group_advantages(
        rewards, weights, torch.repeat_interleave(torch.arange(4), offsets.diff()), 2 * one, zero,
        one, keep, mu=0.1, scalarization="smooth-tchebycheff", scale=scale, eps=1e-4,
    )  # fmt: skip
    r, w = rewards.to(device).requires_grad_(), weights.to(device).requires_grad_()
    got = kernels.GroupAdvantages.apply(r, w, plan_for(offsets, 2, device, scale=scale))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.detach().cpu(), b, equal_nan=True, rtol=1e-4, atol=1e-4)
    assert got[1].isnan().tolist() == [True] * 3 + [False] * 5 + [True]
    g_r, g_w = torch.autograd.grad(got[1][3:8].square().sum(), (r, w))
    assert g_r[3:8].isfinite().all() and g_w[3:8].isfinite().all() and g_r[3:6].any()


def test_every_row_is_written_whatever_lay_there(device):
    rewards, weights = (x.to(device) for x in draw(5, 10, 3))
    plan = plan_for(torch.tensor([0, 7, 10]), 3, device)
    outputs = [torch.full((10,), math.nan, device=device) for _ in range(2)]
    kernels.launch(kernels.forward_kernel, tuple(outputs), rewards, weights, plan)
    gradients = [torch.full((10, 3), math.nan, device=device) for _ in range(2)]
    upstream = [torch.ones(10, device=device)] * 2
    kernels.launch(kernels.backward_kernel, (*gradients, *upstream), rewards, weights, plan)
    assert all(x.isfinite().all() for x in (*outputs, *gradients))


def test_offsets_outside_the_rows_touch_nothing(device):
    rewards, weights = (x.to(device) for x in draw(6, 4, 2))
    plan = plan_for(torch.tensor([-5, 2, 99]), 2, device)
    store = torch.full((2, 6), 7.0, device=device)
    kernels.launch(kernels.forward_kernel, (store[0, 1:5], store[1, 1:5]), rewards, weights, plan)
    assert (store[:, 0] == 7).all() and (store[:, 5] == 7).all() and (store[0, 1:5] != 7).all()


def test_two_runs_give_the_same_bits(device):
    rewards, weights = draw(7, 50, 3)
    options = {"group": torch.arange(50) % 3, "utopia": [2.0] * 3}
    runs = [run("triton", device, rewards, weights, **options) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_nothing_to_do(device):
    for group in ({"group": torch.zeros(0, dtype=torch.int64)}, {"offsets": torch.tensor([0])}):
        out = run("triton", device, torch.zeros(0, 2), torch.zeros(0, 2), utopia=[1.0] * 2, **group)
        assert [tuple(x.shape) for x in out] == [(0,), (0,), (0, 2), (0, 2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"offsets": torch.tensor([0, 3])},
            r"offsets=\(0, 3\): the first must be 0 and the last R",
        ),
        ({"offsets": torch.tensor([0, 3, 1, 2])}, "offsets: group 1 ends at 1, before it begins"),
        ({"offsets": torch.tensor([0.0, 2.0])}, "offsets: dtype torch.float32, expected int64"),
        ({"offsets": torch.tensor(0)}, r"offsets.shape=\(\): must be \(G \+ 1,\)"),
        ({"offsets": torch.zeros(0).long()}, r"offsets.shape=\(0,\): must be \(G \+ 1,\)"),
        ({"offsets": torch.tensor([0, 2]), "group": torch.zeros(2).long()}, "group: give either"),
        ({"offsets": None}, "group: give either group or offsets"),
        ({"rewards": torch.zeros(2, 0)}, r"rewards.shape=\(2, 0\): needs an objective"),
    ],
)
def test_bad_groups_are_named(change, message, impl):
    if impl == "triton" and not dispatch.interpreted():
        pytest.skip("tensors on the CPU, where the kernels are not interpreted")
    given = {
        "rewards": torch.zeros(2, 2),
        "weights": torch.tensor([0.5, 0.5]),
        "offsets": torch.tensor([0, 2]),
        "utopia": [1.0, 1.0],
    } | change
    with pytest.raises(ValueError, match=message):
        ops.group_advantages(impl=impl, **given)


@pytest.mark.gpu
def test_a_cuda_graph_captures_the_call_and_nothing_waits_for_the_card():
    rewards, weights = (x.cuda() for x in draw(8, 64, 2))
    offsets, z = torch.arange(0, 65, 8, device="cuda"), torch.full((2,), 2.0, device="cuda")

    def call():
        return ops.group_advantages(rewards, weights, offsets=offsets, utopia=z)

    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
        ops.group_advantages(rewards, weights, torch.arange(64, device="cuda") // 8, utopia=z)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    rewards.copy_(draw(9, 64, 2)[0])
    graph.replay()
    for a, b in zip(captured, call(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
