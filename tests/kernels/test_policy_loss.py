"""The elementwise loss in Triton against its definition in torch, in float64."""

import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton has no build for this platform")

from meal_fast.kernels import policy_loss as kernels

from meal_fast import ops
from meal_fast.ops import reference

# What a select leaves out is computed all the same, and numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

F64 = torch.float64


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """A few tokens fit one block, and the sums over blocks would go untested."""
    monkeypatch.setattr(kernels, "BLOCK", 16)


def run(impl, device, logp, advantage, token_kl=None, dtype=None, **options):
    """loss, metrics, gradients of logp and token_kl (of three times the loss)."""

    def moved(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else None)

    logp = moved(logp.detach()).requires_grad_()
    options = {name: moved(value) for name, value in options.items()}
    leaves = [logp]
    if token_kl is not None:
        options["token_kl"] = moved(token_kl.detach()).requires_grad_()
        leaves.append(options["token_kl"])
    loss, metrics = ops.policy_loss_from_logp(logp, moved(advantage), impl=impl, **options)
    gradients = torch.autograd.grad(3 * loss, leaves)
    return (
        loss.detach().cpu(),
        {name: value.cpu() for name, value in metrics.items()},
        [g.cpu() for g in gradients],
    )


def same(got, expected, tolerance=1e-5):
    loss, metrics, gradients = got
    loss_2, metrics_2, gradients_2 = expected
    close = {"rtol": tolerance, "atol": tolerance * 0.1, "check_dtype": False}
    torch.testing.assert_close(loss, loss_2, **close)
    assert metrics.keys() == metrics_2.keys()
    for name, value in metrics.items():
        torch.testing.assert_close(
            value, metrics_2[name], **close, msg=lambda m, n=name: f"{n} {m}"
        )
    for a, b in zip(gradients, gradients_2, strict=True):
        torch.testing.assert_close(a, b, **close)


def draw(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(shape, generator=generator)
    other, third = (logp + torch.randn(shape, generator=generator) * 0.4 for _ in range(2))
    return logp, other, third, torch.randn(shape, generator=generator)


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 50),
    kl=st.sampled_from(["k1", "k2", "k3", "exact"]),
    beta=st.sampled_from([0.0, 0.3]),
    reduce=st.sampled_from(["grpo", "dapo", "dr_grpo"]),
    normalizer=st.sampled_from([None, 7.0, torch.tensor(7)]),
    optional=st.sets(st.sampled_from(["old_logp", "importance_weight", "mask", "entropy"])),
)
def test_any_options(device, seed, n, kl, beta, reduce, normalizer, optional):
    torch.manual_seed(seed)
    logp, old, ref, advantage = draw(seed, n)
    advantage[::3] = 0
    given = {
        "old_logp": old,
        "importance_weight": torch.rand(n),
        "mask": torch.rand(n) < 0.7,
        "entropy": torch.rand(n),
    }
    options = {name: given[name] for name in optional}
    if kl == "exact" and beta:
        options["token_kl"] = torch.rand(n)
    elif kl != "exact":
        options["ref_logp"] = ref
    if reduce == "dr_grpo" and normalizer is None:
        normalizer = 11
    options |= {"kl": kl, "beta": beta, "reduce": reduce, "normalizer": normalizer}
    options |= {"sequence": torch.randint(-2, 5, (n,)), "clip": (0.2, 0.3)}
    got = run("triton", device, logp, advantage, **options)
    same(got, run("torch", "cpu", logp, advantage, dtype=F64, **options))


@pytest.mark.parametrize("reduce", ["grpo", "dapo", "dr_grpo"])
def test_padded_rows_share_an_advantage(device, reduce):
    logp, old, ref, _ = draw(1, 3, 14)
    mask = torch.arange(14) < torch.tensor([14, 5, 0])[:, None]
    advantage = torch.tensor([1.0, -0.5, 2.0])
    options = {"old_logp": old, "ref_logp": ref, "mask": mask, "beta": 0.1, "reduce": reduce}
    got = run("triton", device, logp, advantage, **options)
    same(got, run("torch", "cpu", logp, advantage, dtype=F64, **options))
    wide = run("triton", device, logp, advantage[:, None].expand(3, 14), **options)
    same(got, wide, 1e-7)
    across = run("triton", device, logp.t().contiguous().t(), advantage, **options)
    same(got, across, 1e-7)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_clamps_and_infinities_as_in_the_definition(device, kl):
    # Ratios at and beyond the bounds, gaps beyond the limit, -inf on one side and on both. One by
    # one: in a sum the largest would leave nothing of the others.
    inf = math.inf
    logp = [-1e4, 0.0, -inf, -1e4, -inf, -1.0, 0.0, 0.0, -1.0, 0.0, 0.0, -21.0, 21.0, -1.0]
    other = [0.0, -1e4, -inf, 0.0, -1.0, -inf, 0.0, -0.5, 0.0, 20.0, -20.0, 0.0, 0.0, -1.0]
    advantage = [-1.0, -1, 1, 1, 1, 1, -2, 1, 1, 1, -1, -1, -1, 1e-38]
    for p, q, a in zip(logp, other, advantage, strict=True):
        given = {"old_logp": torch.tensor([q]), "ref_logp": torch.tensor([q]), "clip": (0.0, 0.5)}
        got, expected = (
            run(impl, where, torch.tensor([p]), torch.tensor([a]), beta=0.1, kl=kl, **given)
            for impl, where in (("triton", device), ("torch", "cpu"))
        )
        same(got, expected)
        if kl != "k2":  # whose square of the lowest number is infinite, there as here
            assert got[0].isfinite() and got[2][0].isfinite().all()


def test_masked_tokens_may_hold_anything(device):
    bad = torch.tensor([math.nan, math.inf, -math.inf] * 7)
    logp, other = torch.cat((torch.tensor([-1.0]), bad)), torch.cat((torch.tensor([-2.0]), bad))
    options = {
        "old_logp": other,
        "ref_logp": other,
        "importance_weight": other.abs(),
        "entropy": other,
        "mask": torch.arange(22) == 0,
        "beta": 0.1,
    }
    advantage = torch.cat((torch.tensor([1.0]), bad))
    loss, metrics, (g,) = run("triton", device, logp, advantage, **options)
    assert loss.isfinite() and g[0] != 0 and not g[1:].any()
    assert all(v.isfinite() for v in metrics.values()) and metrics["entropy"] == -2
    kl = {"token_kl": other, "kl": "exact", "mask": options["mask"], "beta": 0.1}
    _, metrics, (_, g) = run("triton", device, logp, advantage, **kl)
    assert metrics["kl"] == -2 and g[0] == pytest.approx(0.3) and not g[1:].any()


def test_a_nan_that_counts_is_not_hidden(device):
    logp = torch.tensor([-1.0, math.nan, -1.0])
    loss, metrics, _ = run("triton", device, logp, torch.ones(3), old_logp=torch.zeros(3))
    assert loss.isnan() and metrics["ratio"].isnan() and metrics["tokens"] == 3
    advantage = torch.tensor([1.0, math.nan, 1.0])
    if device == "cpu":  # where values are looked at
        with pytest.raises(ValueError, match="advantage: row 1 is nan"):
            run("triton", device, torch.zeros(3), advantage)
    else:
        loss, *_ = run("triton", device, torch.zeros(3), advantage)
        assert loss.isnan()


def test_small_gaps_keep_their_k3(device):
    # The plain exp(g) - 1 - g is 0 in float32 for the first, and half wrong for the second.
    gap = torch.tensor([1e-5, 3e-4, -1e-2, 0.3, -0.49999, 0.50001, 3.0, -9.0])
    for i in range(len(gap)):
        _, metrics, (g,) = run(
            "triton", device, torch.zeros(1), torch.zeros(1), ref_logp=gap[i : i + 1], beta=1.0
        )
        x = gap[i].double()
        assert metrics["kl"].item() == pytest.approx((x.expm1() - x).item(), rel=2e-6)
        assert g.item() == pytest.approx(-3 * x.expm1().item(), rel=1e-6)


def test_two_runs_give_the_same_bits_and_other_blocks_the_same_loss(device, monkeypatch):
    logp, old, ref, advantage = draw(2, 100)
    options = {"old_logp": old, "ref_logp": ref, "beta": 0.1, "reduce": "dapo"}
    first, second = (run("triton", device, logp, advantage, **options) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[2][0], second[2][0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])
    monkeypatch.setattr(kernels, "BLOCK", 128)
    same(run("triton", device, logp, advantage, **options), first, 1e-6)


def test_low_precision_and_no_gradient(device):
    logp = torch.full((5,), -0.5, dtype=torch.bfloat16, device=device, requires_grad=True)
    advantage = torch.ones(5, device=device, requires_grad=True)
    loss, metrics = ops.policy_loss_from_logp(logp, advantage, impl="triton")
    loss.backward()
    assert loss.dtype == torch.float32 and logp.grad.dtype == torch.bfloat16
    assert advantage.grad is None and not any(v.requires_grad for v in metrics.values())
    assert logp.grad.tolist() == pytest.approx([-0.2] * 5, rel=1e-2)
    with torch.no_grad():
        quiet, _ = ops.policy_loss_from_logp(logp, advantage, impl="triton")
    assert not quiet.requires_grad and torch.equal(quiet, loss)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (2, 3)])
def test_nothing_to_do(device, shape):
    logp = torch.zeros(shape, device=device, requires_grad=True)
    options = {"mask": torch.zeros(shape, device=device), "impl": "triton"}
    if len(shape) == 1:
        options["sequence"] = torch.zeros(0, dtype=torch.int64, device=device)
    for reduce in ("grpo", "dapo"):
        loss, m = ops.policy_loss_from_logp(logp, torch.ones_like(logp), reduce=reduce, **options)
        loss.backward()
        assert loss.item() == 0 and m["tokens"].item() == 0 and not logp.grad.any()
        assert m["ratio"].item() == 0


def test_the_ratio_of_a_sequence_runs_in_torch():
    options = {"level": "sequence", "sequence": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match="impl='triton': level='sequence' runs in torch"):
        ops.policy_loss_from_logp(torch.zeros(2), torch.ones(2), impl="triton", **options)
    ops.policy_loss_from_logp(torch.zeros(2), torch.ones(2), **options)


@pytest.mark.gpu
def test_nothing_waits_for_the_card():
    logp, old, ref, advantage = (x.cuda() for x in draw(3, 5000))
    logp.requires_grad_()

    def call():
        loss, _ = ops.policy_loss_from_logp(logp, advantage, old_logp=old, ref_logp=ref, beta=0.1)
        loss.backward()

    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# A value of each field of LossOptions that moves the loss of the case below.
MOVES = {
    "beta": {"beta": 0.5},
    "kl": {"beta": 0.2, "kl": "k1"},
    "clip": {"clip": (0.0, 0.05)},
    "level": {},  # level="sequence" runs in torch: test_the_ratio_of_a_sequence_runs_in_torch
    "reduce": {"reduce": "grpo"},
    "normalizer": {"normalizer": 7.0},
}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(reference.LossOptions)])
def test_no_option_is_ignored(field, device):
    """A new field has to be put into MOVES, and then the kernel has to know it, or to refuse it."""
    torch.manual_seed(5)
    logp = -torch.rand(12) - 0.5
    given = {
        "old_logp": logp + torch.randn(12) / 4,
        "ref_logp": logp + torch.randn(12) / 4,
        "sequence": torch.tensor([0] * 5 + [1] * 3 + [2] * 4),
        "beta": 0.2,
    }
    advantage = torch.randn(12)
    before = run("triton", device, logp, advantage, **given)[0]
    changed = given | MOVES[field]
    got = run("triton", device, logp, advantage, **changed)
    same(got, run("torch", "cpu", logp, advantage, dtype=F64, **changed))
    assert not MOVES[field] or not torch.isclose(got[0], before)
