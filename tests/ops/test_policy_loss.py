"""The one definition of the policy loss, by hand; what the gradients of its KL terms estimate."""

import dataclasses
import inspect
import math

import pytest
import torch

from meal_fast import ops
from meal_fast.ops.reference import LossOptions

F64 = torch.float64
loss_of = ops.policy_loss_from_logp


def t(*values):
    return torch.tensor(values, dtype=F64)


def test_clipped_terms_by_hand():
    ratio = t(1.5, 0.5, 1.5, 0.5, 1.1)
    a = t(2.0, 2.0, -2.0, -2.0, 3.0)
    logp = ratio.log().requires_grad_()
    loss, m = loss_of(logp, a, old_logp=torch.zeros(5), clip=(0.2, 0.3))
    # -min(ratio A, clip(ratio) A): clipped at 1.3, free, free, clipped at 0.8, free
    terms = t(-2.6, -1.0, 3.0, 1.6, -3.3)
    torch.testing.assert_close(loss, terms.mean())
    (g,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(g, t(0, -1.0, 3.0, 0, -3.3) / 5)
    assert m["clip_fraction"].item() == pytest.approx(0.4)
    assert m["ratio"].item() == pytest.approx(ratio.mean().item())
    assert m["tokens"].item() == 5 and "kl" not in m
    assert m["policy_loss"].item() == pytest.approx(loss.item())


def test_on_policy_is_the_policy_gradient():
    logp = t(-1.0, -2.0, -0.5).requires_grad_()
    loss, m = loss_of(logp, t(1.0, -2.0, 0.0))
    (g,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(g, t(-1.0, 2.0, 0.0) / 3)
    assert m["ratio"].item() == 1 and m["tokens"].item() == 2  # A = 0 with beta 0 is not active


@pytest.mark.parametrize(
    ("kl", "value"), [("k1", -0.7), ("k2", 0.245), ("k3", math.exp(0.7) - 1.7), ("exact", 0.9)]
)
def test_kl_terms_by_hand(kl, value):
    exact = {"token_kl": t(0.9)} if kl == "exact" else {}
    loss, m = loss_of(t(-1.7), t(0.0), ref_logp=t(-1.0), beta=0.5, kl=kl, **exact)
    assert loss.item() == pytest.approx(0.5 * value) and m["kl"].item() == pytest.approx(value)


def test_reductions_by_hand():
    logp = torch.zeros(6, dtype=F64, requires_grad=True)
    a = t(1.0, 2.0, 3.0, 4.0, 5.0, 100.0)
    sequence = torch.tensor([8, -1, 8, -1, -1, 3])
    mask = torch.tensor([1, 1, 1, 1, 1, 0])

    def loss(**options):
        return loss_of(logp, a, sequence=sequence, mask=mask, **options)[0].item()

    assert loss(reduce="dapo") == pytest.approx(-15 / 5)
    assert loss(reduce="dapo", normalizer=30) == pytest.approx(-15 / 30)
    assert loss(reduce="grpo") == pytest.approx(-(4 / 2 + 11 / 3) / 2)  # sequence 3 is all masked
    assert loss(reduce="grpo", normalizer=4.0) == pytest.approx(-(4 / 2 + 11 / 3) / 4)
    assert loss(reduce="dr_grpo", normalizer=torch.tensor(7)) == pytest.approx(-15 / 7)


def test_micro_batches_add_up_to_the_step():
    torch.manual_seed(0)
    logp, a = torch.randn(10, dtype=F64), torch.randn(10, dtype=F64)
    sequence = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3])
    for reduce, normalizer in (("dapo", 10), ("grpo", 4), ("dr_grpo", 50)):
        options = {"reduce": reduce, "normalizer": normalizer}
        whole, _ = loss_of(logp, a, sequence=sequence, **options)
        parts = [
            loss_of(logp[s], a[s], sequence=sequence[s], **options)[0]
            for s in (slice(0, 5), slice(5, 10))
        ]
        torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("reduce", ["grpo", "dapo", "dr_grpo"])
def test_padded_and_packed_agree(level, reduce):
    torch.manual_seed(1)
    logp, old = -torch.rand(3, 5, dtype=F64), -torch.rand(3, 5, dtype=F64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0]]).bool()
    a = t(1.0, -0.5, 2.0)
    options = {"level": level, "reduce": reduce, "ref_logp": old - 0.1, "beta": 0.2}
    padded, m = loss_of(logp, a, old_logp=old, mask=mask, **options)
    rows = torch.arange(3)[:, None].expand(3, 5)[mask]
    options |= {"ref_logp": old[mask] - 0.1}
    if reduce == "dr_grpo":
        options["normalizer"] = 15  # B T, the constant of padded tokens
    packed, m_2 = loss_of(logp[mask], a[rows], old_logp=old[mask], sequence=rows, **options)
    torch.testing.assert_close(padded, packed)
    assert {k: v.item() for k, v in m.items()} == pytest.approx(
        {k: v.item() for k, v in m_2.items()}
    )


def test_sequence_ratio_by_hand():
    logp = t(0.1, 0.3, -0.2).requires_grad_()
    loss, m = loss_of(
        logp,
        t(1.0, 1.0, 1.0),
        old_logp=torch.zeros(3),
        sequence=torch.tensor([0, 0, 1]),
        level="sequence",
        reduce="grpo",
        clip=(0.5, 0.5),
    )
    first, second = math.exp(0.2), math.exp(-0.2)
    assert loss.item() == pytest.approx(-(first + second) / 2)
    assert m["ratio"].item() == pytest.approx((2 * first + second) / 3)
    (g,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(g, -t(first / 2, first / 2, second) / 2)


def test_a_sequence_ratio_counts_its_tokens_without_advantage():
    sequence = torch.tensor([0, 0, 1])
    loss, m = loss_of(
        t(0.1, 0.3, 0.7),
        t(1.0, 0.0, 0.0),
        old_logp=torch.zeros(3),
        sequence=sequence,
        level="sequence",
        normalizer=1,
        clip=(0.9, 9.0),
    )
    assert loss.item() == pytest.approx(-math.exp(0.2))
    assert m["tokens"] == 2  # sequence 1 has no advantage anywhere


def test_importance_weight_scales_the_policy_term_alone():
    options = {"ref_logp": t(-1.0, -2.0), "beta": 0.3}
    logp, a = t(-0.5, -1.5), t(1.0, 2.0)
    loss, m = loss_of(logp, a, importance_weight=t(0.5, 2.0), **options)
    plain, m_2 = loss_of(logp, t(0.5, 4.0), **options)
    torch.testing.assert_close(loss, plain)
    assert m["kl"] == m_2["kl"]


def test_masked_tokens_may_hold_anything():
    bad = t(math.nan, math.inf, -math.inf)
    logp = torch.cat((t(-1.0), bad)).requires_grad_()
    filler = torch.cat((t(-2.0), bad))
    loss, m = loss_of(
        logp,
        torch.cat((t(1.0), bad)),
        old_logp=filler,
        ref_logp=filler,
        importance_weight=filler.abs(),
        entropy=filler,
        mask=torch.tensor([1, 0, 0, 0]),
        beta=0.1,
    )
    loss.backward()
    assert loss.isfinite() and logp.grad[0] != 0 and logp.grad[1:].tolist() == [0, 0, 0]
    assert all(v.isfinite() for v in m.values()) and m["entropy"] == -2


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_far_apart_log_probabilities_do_not_overflow(dtype):
    logp = torch.tensor([-1e4, 0.0, -math.inf, -1e4], dtype=dtype, requires_grad=True)
    other = torch.tensor([0.0, -1e4, -math.inf, 0.0], dtype=dtype)
    a = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    for kl in ("k1", "k3"):
        loss, m = loss_of(logp, a, old_logp=other, ref_logp=other, beta=0.1, kl=kl)
        (g,) = torch.autograd.grad(loss, logp)
        assert loss.isfinite() and g.isfinite().all() and all(v.isfinite() for v in m.values())
    # ratio exp(20), the limit: its derivative is zero, not enormous, and k3's is the plain 1 there
    assert g[1].item() == pytest.approx(0.1 / 4)


def test_gradcheck():
    torch.manual_seed(2)
    logp = -torch.rand(6, dtype=F64).requires_grad_()
    kl = torch.rand(6, dtype=F64, requires_grad=True)
    old, ref = -torch.rand(6, dtype=F64), -torch.rand(6, dtype=F64)
    sequence = torch.tensor([0, 0, 1, 1, 1, 2])
    a = torch.randn(6, dtype=F64)
    for level in ("token", "sequence"):
        for name in ("k1", "k2", "k3", "exact"):
            options = {"level": level, "sequence": sequence, "kl": name, "beta": 0.3}

            def f(logp, kl, options=options):
                exact = {"token_kl": kl} if options["kl"] == "exact" else {"ref_logp": ref}
                return loss_of(logp, a, old_logp=old, **exact, **options)[0]

            assert torch.autograd.gradcheck(f, (logp, kl))


def test_what_the_gradient_of_each_kl_estimator_estimates():
    """On-policy: k1 nothing, k2 and exact KL(p‖q), k3 KL(q‖p); the expectation is summed out."""
    torch.manual_seed(3)
    z = torch.randn(5, dtype=F64, requires_grad=True)
    log_q = torch.randn(5, dtype=F64).log_softmax(0)
    log_p = z.log_softmax(0)
    p = log_p.detach().exp()
    forward = (log_p.exp() * (log_p - log_q)).sum()
    reverse = (log_q.exp() * (log_q - log_p)).sum()
    g_forward, g_reverse = (
        torch.autograd.grad(x, z, retain_graph=True)[0] for x in (forward, reverse)
    )
    expected = {"k1": torch.zeros(5, dtype=F64), "k2": g_forward, "k3": g_reverse}
    for kl, g in expected.items():
        # token i is drawn with probability p_i: its term weighs p_i, through the advantage's place
        total = sum(
            p[i] * loss_of(log_p[i : i + 1], t(0.0), ref_logp=log_q[i : i + 1], beta=1.0, kl=kl)[0]
            for i in range(5)
        )
        torch.testing.assert_close(torch.autograd.grad(total, z, retain_graph=True)[0], g)
    exact, _ = loss_of(log_p[:1], t(0.0), token_kl=forward[None], beta=1.0, kl="exact")
    torch.testing.assert_close(torch.autograd.grad(exact, z)[0], g_forward)


def test_nothing_to_do():
    for shape in ((0,), (2, 0), (2, 3)):
        logp = torch.zeros(shape, requires_grad=True)
        options = {"sequence": torch.zeros(0, dtype=torch.int64)} if len(shape) == 1 else {}
        for reduce in ("grpo", "dapo"):
            mask = torch.zeros(shape)
            loss, m = loss_of(logp, torch.ones(shape), mask=mask, reduce=reduce, **options)
            loss.backward()
            assert loss.item() == 0 and m["tokens"].item() == 0 and not logp.grad.any()


def test_float32_out_and_constants_stay_constants():
    a = torch.ones(3, requires_grad=True)
    logp = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    loss, m = loss_of(logp, a, old_logp=torch.zeros(3, requires_grad=True))
    loss.backward()
    assert loss.dtype == torch.float32 and logp.grad.dtype == torch.bfloat16 and a.grad is None
    assert not any(v.requires_grad for v in m.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.1}, "ref_logp=None: beta=0.1 needs a reference"),
        ({"beta": -1.0}, "beta=-1.0: must not be negative"),
        ({"beta": 0.1, "kl": "exact", "ref_logp": torch.zeros(4)}, "token_kl=None: kl='exact'"),
        ({"token_kl": torch.zeros(4)}, "kl='k3': token_kl is given"),
        ({"kl": "k4"}, "kl='k4': choose from k1, k2, k3, exact"),
        ({"level": "word"}, "level='word'"),
        ({"level": "sequence"}, "level='sequence': packed tokens need `sequence`"),
        ({"reduce": "grpo"}, "reduce='grpo': packed tokens need `sequence`"),
        ({"reduce": "sum"}, "reduce='sum'"),
        ({"reduce": "dr_grpo"}, "normalizer=None: reduce='dr_grpo'"),
        ({"normalizer": 0}, "normalizer=0: must be positive"),
        ({"clip": (1.2, 0.2)}, r"clip=\(1.2, 0.2\)"),
        ({"old_logp": torch.zeros(3)}, r"old_logp: shape \(3,\), expected \(4,\)"),
        ({"mask": torch.zeros(2, 2)}, r"mask: shape \(2, 2\)"),
        ({"sequence": torch.zeros(4)}, "sequence: dtype torch.float32"),
        ({"impl": "cuda"}, "impl='cuda': policy_loss_from_logp has none such here"),
    ],
)
def test_bad_input_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        loss_of(torch.zeros(4), torch.zeros(4), **options)


def test_every_loss_takes_every_option_with_one_default():
    losses = (ops.policy_loss_from_logp, ops.policy_loss, ops.linear_policy_loss)
    for option in dataclasses.fields(LossOptions):
        defaults = {inspect.signature(loss).parameters[option.name].default for loss in losses}
        assert len(defaults) == 1, option.name
