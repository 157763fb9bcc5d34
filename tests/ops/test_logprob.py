"""The ops with a head in them, against the same mathematics over whole logits and autograd."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meal_fast import ops
from tests.helpers.heads import F64, head


def distribution(hidden, weight, bias=None, softcap=None, temperature=1.0):
    z = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return (z / temperature).log_softmax(1)


def at(log_p, target):
    return log_p.gather(1, target.clamp(min=0)[:, None]).squeeze(1)


def entropy(log_p):
    return -(log_p.exp() * log_p).sum(1)


def exact_kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(1)


def assert_same(a, b, **tolerance):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, **tolerance)


@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("max_bytes", [1, 700, 1 << 26])
def test_logprob_and_kl_with_gradients(softcap, max_bytes):
    hidden, weight, bias, target = head()
    ref_hidden, ref_weight, ref_bias, _ = (x.detach() for x in head(d=4, seed=1))
    options = {"softcap": softcap, "temperature": 0.7}
    log_p = distribution(hidden, weight, bias, **options)
    log_q = distribution(ref_hidden, ref_weight, ref_bias, **options)
    expected = at(log_p, target), entropy(log_p), at(log_q, target), exact_kl(log_p, log_q)
    got = ops.linear_logprob_kl(
        hidden,
        ref_hidden,
        weight,
        target,
        bias=bias,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        max_bytes=max_bytes,
        **options,
    )
    assert_same(got, expected)
    assert not got[2].requires_grad
    upstream = torch.randn(3, len(target), dtype=F64)

    def gradients(logp, entropy, _, kl):
        outputs = (upstream[0] * logp + upstream[1] * entropy + upstream[2] * kl).sum()
        return torch.autograd.grad(outputs, (hidden, weight, bias))

    assert_same(gradients(*got), gradients(*expected))
    got = ops.linear_logprob(hidden, weight, target, bias=bias, max_bytes=max_bytes, **options)
    assert_same(got, expected[:2])
    one = torch.autograd.grad(got[0].sum(), (hidden, weight, bias))
    logp = at(distribution(hidden, weight, bias, **options), target)
    assert_same(one, torch.autograd.grad(logp.sum(), (hidden, weight, bias)))


def test_gradcheck():
    hidden, weight, bias, target = head(4, 3, 5)
    ref_hidden = torch.randn(4, 3, dtype=F64)
    advantage = torch.randn(4, dtype=F64)
    ref_weight = torch.randn(5, 3, dtype=F64)

    def kl(hidden, weight, bias):
        logp, h, _, kl = ops.linear_logprob_kl(
            hidden, ref_hidden, weight, target, bias=bias, softcap=3.0, ref_weight=ref_weight
        )
        return logp, h, kl

    def loss(hidden, weight, bias):
        return ops.linear_policy_loss(
            hidden,
            weight,
            target,
            advantage,
            bias=bias,
            old_logp=torch.full((4,), -1.5),
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            beta=0.2,
            kl="exact",
            sequence=torch.tensor([0, 0, 1, 1]),
            level="sequence",
        )[0]

    def from_logits(logits):
        old = torch.full((4,), -1.5)
        return ops.policy_loss(
            logits, target, advantage, old_logp=old, ref_logp=old, beta=0.3, softcap=2.0
        )[0]

    assert torch.autograd.gradcheck(kl, (hidden, weight, bias))
    assert torch.autograd.gradcheck(loss, (hidden, weight, bias))
    assert torch.autograd.gradcheck(
        from_logits, (hidden.detach() @ weight.T).detach().requires_grad_()
    )


options_of_the_loss = st.fixed_dictionaries(
    {
        "kl": st.sampled_from(["k1", "k2", "k3", "exact"]),
        "beta": st.sampled_from([0.0, 0.3]),
        "level": st.sampled_from(["token", "sequence"]),
        "reduce": st.sampled_from(["grpo", "dapo", "dr_grpo"]),
        "clip": st.sampled_from([(0.2, 0.2), (0.0, 0.5), (1.0, 0.0)]),
        "temperature": st.sampled_from([1.0, 0.6]),
        "softcap": st.sampled_from([None, 2.0]),
    }
)
cases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1000),
        "on_policy": st.booleans(),
        "with_bias": st.booleans(),
        "weighted": st.booleans(),
        "normalized": st.booleans(),
        "max_bytes": st.sampled_from([300, 1 << 20]),
    }
)


@settings(max_examples=80, deadline=None)
@given(cases, options_of_the_loss)
def test_fused_losses_agree_with_the_definition(case, options):
    hidden, weight, bias, target = head(seed=case["seed"])
    n = len(target)
    readout = {k: options.pop(k) for k in ("temperature", "softcap")}
    bias = bias if case["with_bias"] else None
    inputs = [hidden, weight] + [bias] * case["with_bias"]
    ref_hidden, ref_weight, _, _ = (x.detach() for x in head(seed=1))
    log_p = distribution(hidden, weight, bias, **readout)
    log_q = distribution(ref_hidden, ref_weight, **readout)
    logp, ref_logp = at(log_p, target), at(log_q, target)

    advantage = torch.randn(n, dtype=F64) * (torch.rand(n) > 0.3)
    target = torch.where(torch.rand(n) > 0.1, target, -100)
    mask = torch.rand(n) > 0.2
    options |= {"sequence": torch.randint(0, 5, (n,))}
    if not case["on_policy"]:
        options["old_logp"] = logp.detach() + 0.4 * torch.randn(n, dtype=F64)
    if case["weighted"]:
        options["importance_weight"] = torch.rand(n, dtype=F64)
    if case["normalized"] or options["reduce"] == "dr_grpo":
        options["normalizer"] = 23.0

    exact = {"token_kl": exact_kl(log_p, log_q)} if options["kl"] == "exact" else {}
    expected, m = ops.policy_loss_from_logp(
        logp,
        advantage,
        ref_logp=ref_logp,
        mask=mask & (target >= 0),
        entropy=entropy(log_p),
        **exact,
        **options,
    )
    options |= {"mask": mask, "max_bytes": case["max_bytes"]}
    linear, m_linear = ops.linear_policy_loss(
        hidden,
        weight,
        target,
        advantage,
        bias=bias,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        **options,
        **readout,
    )
    raw = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    from_logits, m_logits = ops.policy_loss(
        raw, target, advantage, ref_logits=ref_hidden @ ref_weight.T, **options, **readout
    )
    gradients = torch.autograd.grad(-2.5 * expected, inputs)  # not unit upstream
    for loss, metrics in ((linear, m_linear), (from_logits, m_logits)):
        torch.testing.assert_close(loss, expected)
        assert metrics.keys() == m.keys()
        assert_same([metrics[k] for k in m], m.values())
        assert not any(v.requires_grad for v in metrics.values())
        assert_same(torch.autograd.grad(-2.5 * loss, inputs), gradients)


def test_ref_logp_is_used_as_given():
    hidden, weight, _, target = head()
    advantage, ref_logp = torch.randn(17, dtype=F64), -torch.rand(17, dtype=F64)
    expected, _ = ops.policy_loss_from_logp(
        at(distribution(hidden, weight), target), advantage, ref_logp=ref_logp, beta=0.5
    )
    got, _ = ops.linear_policy_loss(hidden, weight, target, advantage, ref_logp=ref_logp, beta=0.5)
    torch.testing.assert_close(got, expected)


def test_a_shared_head_gets_no_gradient_through_the_reference():
    hidden, weight, bias, target = head()
    ref_hidden = torch.randn(17, 6, dtype=F64)
    shared = ops.linear_policy_loss(
        hidden, weight, target, torch.zeros(17), bias=bias, ref_hidden=ref_hidden, beta=1.0,
        kl="exact",
    )  # fmt: skip
    apart = ops.linear_policy_loss(
        hidden, weight, target, torch.zeros(17), bias=bias, ref_hidden=ref_hidden, beta=1.0,
        kl="exact", ref_weight=weight.detach().clone(), ref_bias=bias.detach().clone(),
    )  # fmt: skip
    inputs = (hidden, weight, bias)
    assert_same(torch.autograd.grad(shared[0], inputs), torch.autograd.grad(apart[0], inputs))


def test_padded_inputs_and_gradients_asked_for_twice():
    hidden, weight, _, target = head(12)
    advantage = torch.randn(3, dtype=F64)
    padded = hidden.view(3, 4, 6), weight, target.view(3, 4), advantage
    loss, _ = ops.linear_policy_loss(*padded, reduce="grpo")
    rows = torch.arange(3).repeat_interleave(4)
    flat, _ = ops.linear_policy_loss(
        hidden, weight, target, advantage[rows], reduce="grpo", sequence=rows
    )
    torch.testing.assert_close(loss, flat)
    loss.backward(retain_graph=True)
    first = weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * first)
    torch.testing.assert_close(
        ops.linear_logprob(*padded[:3])[0], ops.linear_logprob(hidden, weight, target)[0].view(3, 4)
    )


def test_masked_rows_may_hold_nan():
    hidden, weight, _, target = head(dtype=torch.float32)
    with torch.no_grad():
        hidden[2], hidden[5] = math.nan, math.inf
    target[2], mask = -100, torch.ones(17)
    mask[5] = 0
    for options in ({}, {"beta": 0.1, "ref_hidden": hidden.detach(), "kl": "exact"}):
        loss, m = ops.linear_policy_loss(
            hidden, weight, target, torch.ones(17), mask=mask, **options
        )
        g_hidden, g_weight = torch.autograd.grad(loss, (hidden, weight))
        assert (
            loss.isfinite() and g_weight.isfinite().all() and all(v.isfinite() for v in m.values())
        )
        assert not g_hidden[[2, 5]].any() and g_hidden[[0, 1]].all()


def test_columns_taken_out_by_a_bias_of_minus_infinity():
    hidden, weight, bias, target = head()
    gone = torch.tensor([0, 4])
    with torch.no_grad():
        bias[gone] = -torch.inf
    target = torch.where((target == 0) | (target == 4), 1, target)
    rest = torch.tensor([i for i in range(11) if i not in (0, 4)])
    ref_hidden = torch.randn(17, 6, dtype=F64)
    got = ops.linear_logprob_kl(hidden, ref_hidden, weight, target, bias=bias)
    moved = torch.tensor([rest.tolist().index(i) for i in target.tolist()])
    log_p = distribution(hidden, weight[rest], bias[rest])
    log_q = distribution(ref_hidden, weight[rest], bias[rest]).detach()
    expected = at(log_p, moved), entropy(log_p), at(log_q, moved), exact_kl(log_p, log_q)
    assert_same(got, expected)
    upstream = torch.randn(3, 17, dtype=F64)
    sums = [
        (upstream[0] * x[0] + upstream[1] * x[1] + upstream[2] * x[3]).sum()
        for x in (got, expected)
    ]
    (g_w, g_h), (e_w, e_h) = (torch.autograd.grad(s, (weight, hidden)) for s in sums)
    torch.testing.assert_close(g_h, e_h)
    torch.testing.assert_close(g_w, e_w)
    assert not g_w[gone].any()


def test_exact_kl_of_infinite_and_tiny_and_large():
    eye = torch.eye(3)
    target = torch.zeros(1, dtype=torch.int64)

    def kl(z, zq, dtype=torch.float32):
        z, zq = (torch.tensor([x], dtype=dtype) for x in (z, zq))
        return ops.linear_logprob_kl(z, zq, eye.to(dtype), target)[3].item()

    z = [0.3, -1.0, 0.2]
    near = [0.3 + 1e-4, -1.0, 0.2]
    exact = kl(z, near, F64)
    assert 1e-10 < exact < 1e-8 and kl(z, near) == pytest.approx(exact, rel=1e-2)
    assert kl(z, z) == 0
    assert kl([0.0, 0.0, 200.0], [0.0, 0.0, -1e4]) == pytest.approx(1e4, rel=1e-3)
    assert kl([0.0, -90.0, -95.0], [0.0, 90.0, 0.0]) == pytest.approx(90.0, rel=1e-5)
    bias, ref_bias = torch.zeros(3), torch.tensor([0.0, -math.inf, 0.0])
    options = {"bias": bias, "ref_weight": eye, "ref_bias": ref_bias}
    x = torch.tensor([[1.0, 0.0, 0.0]])
    assert ops.linear_logprob_kl(x, x, eye, target, **options)[3].item() == math.inf
    swapped = {"bias": ref_bias, "ref_weight": eye, "ref_bias": bias}
    p, q = torch.tensor([1.0, 0.0]).softmax(0), torch.tensor([1.0, 0.0, 0.0]).softmax(0)[[0, 2]]
    by_hand = (p * (p / q).log()).sum().item()
    got = ops.linear_logprob_kl(x, x, eye, target, **swapped)[3].item()
    assert got == pytest.approx(by_hand, rel=1e-5)


def test_extreme_logits():
    hidden, weight, _, target = head(9, 4, 301, torch.float32)
    with torch.no_grad():
        hidden.mul_(1e4)
    logp, h = ops.linear_logprob(hidden, weight, target)
    log_p = distribution(hidden.double(), weight.double())
    assert log_p.min() < -1e4
    torch.testing.assert_close(logp.double(), at(log_p, target), rtol=1e-5, atol=1e-2)
    assert h.isfinite().all() and (logp <= 0).all()
    loss, _ = ops.linear_policy_loss(
        hidden, weight, target, torch.ones(9), ref_hidden=-hidden.detach(), beta=0.1
    )
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("v", [1, 7, 300, 50_257])
def test_float32_is_close_to_float64_and_independent_of_the_chunks(v):
    hidden, weight, _, target = head(5, 16, v)
    with torch.no_grad():
        weight.mul_(0.3)
    narrow = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    expected = at(distribution(hidden, weight), target)
    g_expected = torch.autograd.grad(expected.sum(), (hidden, weight))
    for rows in (1, 2, 5):
        logp, h = ops.linear_logprob(*narrow, target, max_bytes=rows * v * 4)
        assert logp.dtype == h.dtype == torch.float32
        torch.testing.assert_close(logp.double(), expected, rtol=1e-5, atol=1e-5)
        got = torch.autograd.grad(logp.sum(), narrow)
        assert_same([g.double() for g in got], g_expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_gives_float32_results_and_sums_the_head_in_float32():
    hidden, weight, _, target = head(400, 8, 50, torch.float32)
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    wide = [x.detach().double().requires_grad_() for x in low]
    advantage = torch.randn(400)
    loss, m = ops.linear_policy_loss(*low, target, advantage, max_bytes=50 * 4, reduce="dapo")
    expected, _ = ops.linear_policy_loss(*wide, target, advantage)
    assert loss.dtype == m["entropy"].dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    g, e = torch.autograd.grad(loss, low)[1], torch.autograd.grad(expected, wide)[1]
    assert g.dtype == torch.bfloat16
    # 400 additions in bfloat16 would be off by far more than one final rounding of 2^-9
    torch.testing.assert_close(g.double(), e, rtol=2**-8, atol=1e-6)


def test_logits_of_any_strides_are_left_alone():
    torch.manual_seed(5)
    big = torch.randn(4, 6, 9)
    logits = big[:, 1:5].transpose(0, 1)[..., ::2].requires_grad_()
    before, target = big.clone(), torch.randint(0, 5, (4, 4))
    loss, _ = ops.policy_loss(logits, target, torch.randn(4), reduce="grpo", softcap=3.0)
    (g,) = torch.autograd.grad(loss, logits)
    assert torch.equal(big, before) and g.shape == logits.shape and g.any()


def test_autocast_outside_changes_nothing():
    """Under autocast a product of float32 would be made in bfloat16; an op keeps to its inputs."""
    hidden, weight, _, target = (x.float() if x.is_floating_point() else x for x in head())
    results = []
    for on in (False, True):
        leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            logp, entropy = ops.linear_logprob(*leaves, target)
            loss, _ = ops.linear_policy_loss(*leaves, target, torch.ones(len(target)))
            total = logp.sum() + 2 * entropy.sum() + 3 * loss
            results.append((logp, entropy, loss, *torch.autograd.grad(total, leaves)))
    for plain, under in zip(*results, strict=True):
        assert torch.equal(plain, under)
