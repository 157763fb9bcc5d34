"""Triton's work on a row of the vocabulary, and the ops over it, against torch in float64.

Interpreted on the CPU; on a card the same tests run compiled, with the marker `gpu`.
"""

import math

import pytest
import torch

pytest.importorskip("triton", reason="triton has no build for this platform")

from meal_fast.kernels import vocabulary
from meal_fast.kernels.vocabulary import ENTROPY, KEPT, KL, LOGP, REF_LOGP

from meal_fast import ops
from meal_fast.ops.vocab_sweep_triton import chunk_rows

# What a select leaves out is computed all the same, and numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

F64 = torch.float64
N, D, V = 7, 5, 37


@pytest.fixture
def device(device, monkeypatch):
    # Small vocabularies would fit a block, and the sums over blocks would go untested.
    monkeypatch.setattr(vocabulary, "MAX_BLOCK", 16)
    return device


def close(got, expected, rtol=1e-5, atol=1e-5):
    torch.testing.assert_close(got.cpu().double(), expected.cpu().double(), rtol=rtol, atol=atol)


def at(log_p, target):
    return log_p.gather(1, target[:, None]).squeeze(1)


def stats_of(x, target, q=None, active=None):
    """The kernel's row statistics of plain logits, in a buffer that was full of NaN."""
    out = torch.full((KEPT, len(target)), torch.nan, device=x.device)
    if q is None:
        vocabulary.stats(x, target, 1.0, None, None, out, active)
    else:
        vocabulary.stats_kl(x, q, target, 1.0, None, None, None, out, active)
    return out


def gradient_of(x, target, kept, derivatives, q=None, grad=None, active=None):
    if grad is None:
        grad = torch.full(x.shape, torch.nan, device=x.device)
    vocabulary.gradient(x, q, target, 1.0, None, None, None, kept, derivatives, 1.0, grad, active)
    return grad


# --- the kernels -------------------------------------------------------------------------------


@pytest.mark.parametrize("v", [1, 16, 37])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_rows_and_their_gradients(device, v, scale):
    torch.manual_seed(v)
    x, q = scale * torch.randn(2, 4, v, device=device)
    if v > 3:
        x[:, 0] = q[:, 0] = x[1, 5:] = -torch.inf
        x[2, : v // 2 + 4] = -torch.inf  # the first block has no maximum
        q[3, 2:5] = -torch.inf if scale == 1 else q[3, 2:5]
        x[3, 2:5] = -torch.inf if scale == 1 else x[3, 2:5]
        q[2, 1 : v // 2 + 4] = -3.0 * scale  # a share of the reference where the policy has none
        q[1, 5:] = -torch.inf
    target = torch.tensor([0, 1, v - 1, v - 1], device=device).clamp(max=v - 1)
    z = x.double().requires_grad_()
    log_p, log_q = z.log_softmax(1), q.double().log_softmax(1)
    p = log_p.exp()
    finite = torch.where(p > 0, log_p, 0)
    entropy = -(p * finite).sum(1)
    gap = torch.where(p > 0, finite - torch.where(p > 0, log_q, 0), 0)
    kl = (p * gap).sum(1)

    out = stats_of(x, target, q)
    tolerance = {"rtol": 1e-5, "atol": 1e-5 if scale == 1 else 5e-3}
    close(out[LOGP.value], at(log_p, target), **tolerance)
    close(out[ENTROPY.value], entropy, **tolerance)
    close(out[REF_LOGP.value], at(log_q, target), **tolerance)
    close(out[KL.value], kl, **tolerance)
    without = stats_of(x, target)
    close(without[LOGP.value], at(log_p, target), **tolerance)
    close(without[ENTROPY.value], entropy, **tolerance)

    a, b, c = torch.randn(3, 4, device=device)
    a[0] = 0
    live = at(log_p, target).isfinite()  # a target of -inf has no derivative to compare with
    a = torch.where(live, a, 0)
    loss = (torch.where(live, at(log_p, target), 0) * a + entropy * b + kl * c).sum()
    (expected,) = torch.autograd.grad(loss, z)
    got = gradient_of(x, target, out, (a, b, c), q)
    close(got, expected, rtol=1e-4, atol=1e-5 if scale == 1 else 1e-2)
    again = gradient_of(x, target, stats_of(x, target, q), (a, b, c), q)
    assert torch.equal(got, again), "two runs differ"
    assert gradient_of(x, target, out, (a, b, c), q, grad=x) is x  # in its own place
    assert torch.equal(x, got)


def test_logits_that_are_all_far_below_zero(device):
    torch.manual_seed(0)
    x = torch.randn(3, 37, device=device) - 1e4
    target = torch.tensor([0, 20, 36], device=device)
    log_p = x.double().log_softmax(1)
    for out in (stats_of(x, target), stats_of(x, target, x)):
        close(out[LOGP.value], at(log_p, target), rtol=1e-4, atol=1e-4)


def test_a_small_kl_keeps_its_digits(device):
    torch.manual_seed(0)
    x = torch.randn(4, 300, device=device)
    q = x.clone()
    q[1, 7] += 1e-3
    q[2] += 1e-4 * torch.randn(300, device=device)
    q[3] += 500.0  # the same distribution, and in float32 nearly the same logits
    log_p, log_q = x.double().log_softmax(1), q.double().log_softmax(1)
    kl = (log_p.exp() * (log_p - log_q)).sum(1)
    got = stats_of(x, torch.zeros(4, dtype=torch.int64, device=device), q)[KL.value]
    assert got[0] == 0 and 1e-11 < kl[1] < 1e-8 and 1e-10 < kl[2] < 1e-8
    close(got[1:3], kl[1:3], rtol=1e-3, atol=0)
    close(got[3], kl[3], rtol=0, atol=1e-8)


def test_kl_of_far_and_infinite_and_unshared(device):
    inf = torch.inf
    rows = [  # policy, reference, KL
        ([0.0, 0.0, 200.0], [0.0, 0.0, -1e4], 1e4 + math.log(2)),
        ([0.0, -90.0, -95.0], [0.0, 90.0, 0.0], 90.0),
        ([0.0, 0.0, -200.0], [0.0, 0.0, 2.0], math.log((2 + math.exp(2)) / 2)),
        ([0.0, 0.0, -inf], [0.0, 0.0, 0.0], math.log(1.5)),
        ([0.0, 0.0, 0.0], [0.0, 0.0, -inf], inf),
        ([0.0, 0.0, math.nan], [0.0, 0.0, 0.0], math.nan),
        ([0.0, 0.0, 0.0], [0.0, 0.0, math.nan], math.nan),
        ([-inf, -inf, -inf], [0.0, 0.0, 0.0], math.nan),
    ]
    x, q = (torch.tensor([r[i] for r in rows], device=device) for i in (0, 1))
    target = torch.zeros(len(rows), dtype=torch.int64, device=device)
    got = stats_of(x, target, q)[KL.value]
    expected = torch.tensor([r[2] for r in rows])
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_nothing_but_its_row_is_read_or_written(device):
    torch.manual_seed(1)
    wide = torch.full((5, 3 * V), torch.nan, device=device)
    wide[:, : 2 * V : 2] = torch.randn(5, V, device=device)
    x = wide[:, : 2 * V : 2]  # NaN between its columns and after them
    target = torch.tensor([0, V, -1, 3, V - 1], device=device)
    active = torch.tensor([1, 1, 1, 0, 1], dtype=torch.uint8, device=device)
    out = stats_of(x, target, active=active)
    log_p = x.double().log_softmax(1)
    close(out[LOGP.value][[0, 4]], at(log_p, target.clamp(0, V - 1))[[0, 4]])
    assert out[LOGP.value][[1, 2]].isnan().all(), "a target that is no column"
    assert out[ENTROPY.value][[1, 2]].isfinite().all() and not out[:, 3].any()
    canary = torch.full((5, V + 3), torch.nan, device=device)
    one = torch.ones(5, device=device)
    gradient_of(x, target, out, (one, None, None), grad=canary[:, :V], active=active)
    assert canary[:, V:].isnan().all() and not canary[3, :V].any()
    onehot = torch.zeros(5, V, dtype=F64, device=device)
    onehot[0, 0] = onehot[4, V - 1] = 1
    live = [0, 1, 2, 4]
    close(canary[live, :V], (onehot - log_p.exp())[live])


@pytest.mark.parametrize("axis", ["rows", "columns", "outer"])
def test_offsets_beyond_int32(device, axis):
    # The storage is never touched but at the elements themselves, so the system gives it no pages.
    # Each stride fits in 31 bits, its product with an index does not.
    far = 2**30 + 3
    shape, stride = {
        "rows": ((3, 4), (far, 1)),
        "columns": ((2, 3), (1, far)),
        "outer": ((3, 1, 4), (far, 8, 1)),
    }[axis]
    x = torch.empty(2 * far + 16, dtype=torch.float16, device=device).as_strided(shape, stride)
    torch.manual_seed(0)
    x.copy_(torch.randn(shape))
    rows = x.reshape(-1, shape[-1])
    target = torch.arange(len(rows), device=device) % shape[-1]
    out = stats_of(x, target, q=x)
    log_p = rows.double().log_softmax(1)
    close(out[LOGP.value], at(log_p, target))
    close(out[REF_LOGP.value], at(log_p, target))
    grad = torch.empty(rows.shape, device=device)
    gradient_of(x, target, out, (torch.ones(len(rows), device=device), None, None), grad=grad)
    onehot = torch.nn.functional.one_hot(target, shape[-1])
    close(grad, onehot - log_p.exp())


def test_bfloat16_is_nearer_to_the_truth_than_torch_in_bfloat16(device):
    torch.manual_seed(2)
    x = (3 * torch.randn(4, 100, device=device)).bfloat16()
    target = torch.randint(0, 100, (4,), device=device)
    wide, naive = x.double().requires_grad_(), x.clone().requires_grad_()
    truth, low = (at(z.log_softmax(1), target) for z in (wide, naive))
    out = stats_of(x, target)
    error, allowed = (out[LOGP.value] - truth).abs(), (low.double() - truth).abs()
    assert (error <= allowed + 1e-6).all()
    (g_truth,) = torch.autograd.grad(truth.sum(), wide)
    (g_low,) = torch.autograd.grad(low.sum(), naive)
    one = torch.ones(4, device=device)
    error = (gradient_of(x, target, out, (one, None, None)).double() - g_truth).abs()
    assert (error <= (g_low.double() - g_truth).abs() + 1e-6).all()
    narrow = gradient_of(x, target, out, (one, None, None), grad=torch.empty_like(x))
    # The interpreter cuts off the digits that bfloat16 has no room for; a card rounds them.
    close(narrow, g_truth, rtol=2**-7 if device == "cpu" else 2**-8, atol=1e-7)


# --- the ops -----------------------------------------------------------------------------------


class Head:
    """Factors of the logits, twice: float32 on the device for Triton, float64 for torch."""

    def __init__(self, device, n=N, dtype=torch.float32, with_bias=True, frozen=False):
        torch.manual_seed(3)
        made = [torch.randn(n, D), torch.randn(V, D)] + [torch.randn(V)] * with_bias
        if with_bias:
            made[2][[0, 20]] = -torch.inf
        self.target = torch.randint(1, 20, (2 * n,), device=device)[::2]
        self.ref_hidden = torch.randn(n, D, device=device)
        self.advantage = torch.randn(n, device=device)
        trained = [True, not frozen, not frozen]
        low = [x.to(device, dtype) for x in made]
        self.low = [x.requires_grad_(t) for x, t in zip(low, trained, strict=False)]
        self.wide = [x.detach().double().requires_grad_(x.requires_grad) for x in self.low]

    def both(self, call):
        """(results and gradients in Triton, the same of torch in float64) of call(impl, inputs)."""
        found = []
        for impl, inputs in (("triton", self.low), ("torch", self.wide)):
            outputs, loss = call(impl, *inputs, *[None] * (3 - len(inputs)))
            trained = [x for x in inputs if x.requires_grad]
            found.append([*outputs, *torch.autograd.grad(loss, trained)])
        return found

    def compare(self, call, **tolerance):
        for got, expected in zip(*self.both(call), strict=True):
            close(got, expected, **tolerance)


# With a softcap a bias of -inf makes a column like another: its logit is minus the softcap.
@pytest.mark.parametrize(("softcap", "with_bias"), [(None, True), (2.5, False), (8.0, True)])
def test_logprob_and_kl(device, softcap, with_bias):
    head = Head(device, with_bias=with_bias)
    torch.manual_seed(4)
    upstream = torch.randn(3, N, device=device)

    def call(impl, hidden, weight, bias):
        logp, entropy, ref_logp, kl = ops.linear_logprob_kl(
            hidden, head.ref_hidden, weight, head.target, bias=bias, softcap=softcap,
            temperature=0.7, max_bytes=3 * V * 8, impl=impl,
        )  # fmt: skip
        loss = (upstream[0] * logp + upstream[1] * entropy + upstream[2] * kl).sum()
        return (logp, entropy, ref_logp, kl), loss

    head.compare(call, rtol=2e-5, atol=2e-5)

    def alone(impl, hidden, weight, bias):
        out = ops.linear_logprob(
            hidden, weight, head.target, bias=bias, softcap=softcap, max_bytes=3 * V * 4, impl=impl
        )
        return out, (upstream[0] * out[0]).sum()

    head.compare(alone, rtol=2e-5, atol=2e-5)


OPTIONS = [
    {},
    {"beta": 0.3, "kl": "exact", "softcap": 3.0},
    {"beta": 0.3, "kl": "k3", "temperature": 0.6},
    {"beta": 0.2, "kl": "exact", "level": "sequence", "reduce": "grpo"},
    {"beta": 0.2, "kl": "k1", "level": "sequence", "reduce": "dapo", "normalizer": 5.0},
]


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())) or "plain"
)
def test_the_losses(device, options):
    head = Head(device)
    advantage = head.advantage.clone()
    advantage[1] = 0
    mask = torch.tensor([1, 1, 1, 0, 1, 1, 1], device=device).repeat_interleave(2)[::2].bool()
    given = {
        "mask": mask,
        "sequence": torch.tensor([0, 0, 1, 1, 2, 2, 2], device=device),
        "old_logp": -3.5 * torch.ones(N, device=device),
        **options,
    }

    def linear(impl, hidden, weight, bias):
        reference = {"ref_hidden": head.ref_hidden} if "beta" in options else {}
        loss, metrics = ops.linear_policy_loss(
            hidden, weight, head.target, advantage, bias=bias, max_bytes=3 * V * 8, impl=impl,
            **reference, **given,
        )  # fmt: skip
        return (loss, *(metrics[k] for k in sorted(metrics))), -2.5 * loss

    head.compare(linear, rtol=3e-5, atol=3e-5)

    torch.manual_seed(5)
    logits, ref_logits = torch.randn(2, N, 2 * V, device=device)[..., ::2]
    logits[3] = math.nan  # masked
    before = logits.clone()
    found = []
    for impl, dtype in (("triton", torch.float32), ("torch", F64)):
        x = logits.to(dtype) if impl == "torch" else logits.detach()
        reference = {"ref_logits": ref_logits.to(dtype)} if "beta" in options else {}
        x.requires_grad_()
        loss, metrics = ops.policy_loss(x, head.target, advantage, impl=impl, **reference, **given)
        (g,) = torch.autograd.grad(-2.5 * loss, x)
        found.append([loss, *(metrics[k] for k in sorted(metrics)), g])
    for got, expected in zip(*found, strict=True):
        close(got, expected, rtol=3e-5, atol=3e-5)
    assert not found[0][-1][3].any() and torch.equal(before.isnan(), logits.isnan())


def test_logits_are_read_where_they_lie(device):
    torch.manual_seed(6)
    whole = torch.randn(2, 5, V, device=device).bfloat16().requires_grad_()
    target, advantage = torch.randint(0, V, (2, 4), device=device), torch.randn(2, device=device)
    before, version = whole.detach().clone(), whole._version
    loss, _ = ops.policy_loss(whole[:, :-1], target, advantage, reduce="grpo", impl="triton")
    (g,) = torch.autograd.grad(3 * loss, whole, retain_graph=True)
    (twice,) = torch.autograd.grad(3 * loss, whole)
    assert torch.equal(whole, before) and whole._version == version
    assert g.dtype == torch.bfloat16 and torch.equal(g, twice) and not g[:, -1].any()
    wide = before.double().requires_grad_()
    expected, _ = ops.policy_loss(wide[:, :-1], target, advantage, reduce="grpo", impl="torch")
    close(loss, expected)
    close(g, torch.autograd.grad(3 * expected, wide)[0], rtol=2**-7, atol=1e-6)


def test_low_precision_factors_and_a_frozen_head(device):
    head = Head(device, dtype=torch.bfloat16, frozen=True)

    def call(impl, hidden, weight, bias):
        logp, entropy = ops.linear_logprob(hidden, weight, head.target, bias=bias, impl=impl)
        assert impl == "torch" or logp.dtype == entropy.dtype == torch.float32
        return (logp, entropy), (logp * head.advantage).sum()

    (*stats, g), (*expected, g_expected) = head.both(call)
    for got, wanted in zip(stats, expected, strict=True):
        close(got, wanted, rtol=1e-4, atol=1e-4)
    assert g.dtype == torch.bfloat16
    close(g, g_expected, rtol=2**-6, atol=2**-6)


def test_no_tokens_and_masked_nan(device):
    head = Head(device, n=0)
    hidden, weight, bias = head.low
    logp, entropy = ops.linear_logprob(hidden, weight, head.target, bias=bias, impl="triton")
    assert logp.shape == entropy.shape == (0,)
    assert not torch.autograd.grad(logp.sum(), weight)[0].any()
    empty = torch.zeros(0, V, device=device, requires_grad=True)
    loss, m = ops.policy_loss(empty, head.target, head.advantage, impl="triton")
    assert loss == 0 and m["tokens"] == 0 and torch.autograd.grad(loss, empty)[0].shape == (0, V)

    head = Head(device)
    hidden, weight, _ = head.low
    with torch.no_grad():
        hidden[2] = math.nan
    head.target[2] = -100
    loss, m = ops.linear_policy_loss(hidden, weight, head.target, head.advantage, impl="triton")
    g_hidden, g_weight = torch.autograd.grad(loss, (hidden, weight))
    assert loss.isfinite() and g_weight.isfinite().all() and m["entropy"].isfinite()
    assert not g_hidden[2].any() and g_hidden.isfinite().all()


def test_what_is_kept_for_the_gradient_is_not_what_is_returned(device):
    head = Head(device)
    found = []
    for spoil in (False, True):
        logp, entropy = ops.linear_logprob(*head.low[:2], head.target, impl="triton")
        loss = logp.sum() + (2 * entropy).sum()
        if spoil:
            with torch.no_grad():
                logp.zero_(), entropy.zero_()
        found.append(torch.autograd.grad(loss, head.low[0])[0])
    assert torch.equal(*found)


def test_a_chunk_stays_within_its_budget(device):
    from meal_fast.ops.vocab_sweep import LinearSource, Readout

    head = Head(device, dtype=torch.bfloat16)
    source = LinearSource(*head.low[:2], None, Readout(1.0, None), torch.float32)
    narrow = source.factor_dtype == torch.bfloat16  # on a card alone: a CPU multiplies in float32
    for tiles in (1, 2):
        for gradient in (False, True):
            row = V * (4 * tiles + 2 * (narrow and gradient))
            assert chunk_rows(source, tiles, gradient, 3 * row) == 3
            assert chunk_rows(source, tiles, gradient, 3 * row - 1) == 2
            assert chunk_rows(source, tiles, gradient, 1) == 1
            assert chunk_rows(source, tiles, gradient, None) == N
    many = LinearSource(
        torch.zeros(500, D), torch.zeros(V, D), None, Readout(1.0, None), torch.float32
    )
    assert chunk_rows(many, 1, False, 300 * 4 * V) == 256


def test_float64_is_refused(device):
    x = torch.zeros(2, 3, dtype=F64, device=device)
    with pytest.raises(ValueError, match="impl='triton': policy_loss in Triton computes in float3"):
        ops.policy_loss(x, torch.zeros(2, dtype=torch.int64), torch.zeros(2), impl="triton")
