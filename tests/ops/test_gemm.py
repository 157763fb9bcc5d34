"""The oneDNN products against torch's own, gradients too, and the models that use them."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from meal_fast.ops import gemm

pytestmark = pytest.mark.skipif(gemm._onednn is None, reason="this torch has no oneDNN")
SIZE = st.integers(1, 40)


def leaf(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).requires_grad_()


def double(x):
    return None if x is None else x.detach().double().requires_grad_()


@given(SIZE, SIZE, SIZE, st.booleans(), st.booleans(), st.booleans())
def test_matmul_of_any_shape_and_stride(m, k, n, a_turned, b_turned, with_bias):
    a = leaf(k, m).detach().t() if a_turned else leaf(m, k).detach()
    b = leaf(n, k, seed=1).detach().t() if b_turned else leaf(k, n, seed=1).detach()
    bias = leaf(n, seed=2).detach() if with_bias else None
    want = a.double() @ b.double() + (0 if bias is None else bias.double())
    torch.testing.assert_close(gemm.matmul(a, b, bias).double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 8), (8, 8), (2, 20, 8), (0, 8), (9, 100)])
@pytest.mark.parametrize("n", [5, 70])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_and_its_gradients(shape, n, with_bias):
    x, w = leaf(*shape), leaf(n, shape[-1], seed=1)
    bias = leaf(n, seed=2) if with_bias else None
    got, wide = gemm.linear(x, w, bias), [double(x), double(w), double(bias)]
    want = F.linear(*wide)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    probe = torch.randn_like(got)
    got.backward(probe)
    want.backward(probe.double())
    for mine, theirs in zip((x, w, bias), wide, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("counts", [(0, 40, 35), (40, 3, 70, 90, 60), (1, 2, 3, 1)])
@pytest.mark.parametrize("sizes", [(12, 70), (70, 12)])
@pytest.mark.parametrize("frozen_x", [False, True])
def test_blocks_are_terms_of_their_own(counts, sizes, frozen_x):
    """Three terms side by side, their rows in long runs or in short ones."""
    k, n = sizes
    block_N = torch.cat([torch.full((c,), i % 3) for i, c in enumerate(counts)])
    x, w = leaf(len(block_N), k).requires_grad_(not frozen_x), leaf(n, k, seed=1).detach()
    a, b = leaf(3 * 4, k, seed=3), leaf(n, 3 * 4, seed=4)
    blocks = gemm.Blocks.of(block_N, torch.arange(3).repeat_interleave(4))
    assert bool(blocks.runs) == (max(counts) > 3)
    got = gemm.lora_linear(x, w, None, a, b, 0.5, blocks)
    wide = [double(x), double(a), double(b)]
    want = wide[0] @ w.double().t()
    for i in range(3):
        own, of = (block_N == i)[:, None], slice(4 * i, 4 * i + 4)
        want = want + own * (wide[0] @ wide[1][of].t() @ wide[2][:, of].t()) * 0.5
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-5)
    probe = torch.randn_like(got)
    got.backward(probe)
    want.backward(probe.double())
    assert (x.grad is None) == frozen_x
    for mine, theirs in zip((x, a, b), wide, strict=True):
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 7, 8, 33])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("sizes", [(12, 70), (70, 12)])
def test_lora_linear_and_its_gradients(rows, with_bias, sizes):
    k, n = sizes
    x, w = leaf(2, rows, k), leaf(n, k, seed=1).detach()
    bias = leaf(n, seed=2).detach() if with_bias else None
    a, b = leaf(4, k, seed=3), leaf(n, 4, seed=4)
    got = gemm.lora_linear(x, w, bias, a, b, 0.5)
    xd, ad, bd = double(x), double(a), double(b)
    want = F.linear(xd, w.double(), None if bias is None else bias.double())
    want = want + 0.5 * (xd @ ad.T) @ bd.T
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-5)
    probe = torch.randn_like(got)
    got.backward(probe)
    want.backward(probe.double())
    for mine, theirs in ((x, xd), (a, ad), (b, bd)):
        torch.testing.assert_close(mine.grad.double(), theirs.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_blocks", [False, True])
@pytest.mark.parametrize("sizes", [(48, 70), (70, 48)])
def test_lora_linear_in_low_precision(dtype, with_blocks, sizes):
    """No further from the truth than what widens x does, but for the rounding of the factors."""
    k, n = sizes
    x, w = leaf(3, 40, k).detach().to(dtype).requires_grad_(), leaf(n, k, seed=1).detach().to(dtype)
    a, b, bias = leaf(8, k, seed=3), leaf(n, 8, seed=4), leaf(n, seed=2).detach().to(dtype)
    blocks = None
    if with_blocks:
        blocks = gemm.Blocks(torch.arange(120)[:, None] // 60 != torch.arange(8) // 4)
    probe = leaf(3, 40, n, seed=6).detach().to(dtype)

    def widened(x, w, bias, a, b):
        low = F.linear(x.to(a.dtype), a)
        if blocks is not None:
            low = low.masked_fill(blocks.others_NR.view(low.shape), 0)
        return F.linear(x, w, bias) + (F.linear(low, b) * 0.5).to(x.dtype)

    def made(call, *given):
        x, w, bias, a, b = (g.detach() for g in given)
        trained = [g.requires_grad_() for g in (x, a, b)]
        out = call(x, w, bias, a, b)
        return [out.detach(), *torch.autograd.grad(out, trained, probe.to(out.dtype))]

    given = (x, w, bias, a, b)
    got = made(lambda *g: gemm.lora_linear(*g, 0.5, blocks), *given)
    naive, truth = made(widened, *given), made(widened, *map(double, given))
    assert [g.dtype for g in got] == [dtype, dtype, torch.float32, torch.float32]
    for mine, theirs, wanted in zip(got, naive, truth, strict=True):
        error, allowed = ((y.double() - wanted).norm() / wanted.norm() for y in (mine, theirs))
        assert error <= 1.5 * allowed + 2 * torch.finfo(dtype).eps


def test_lora_linear_in_bfloat16_keeps_x_as_it_is():
    x, w = leaf(64, 48).detach().bfloat16().requires_grad_(), leaf(70, 48, seed=1).detach()
    w, a, b = w.bfloat16(), leaf(4, 48, seed=3), leaf(70, 4, seed=4)
    kept = {}

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = gemm.lora_linear(x, w, None, a, b, 0.5)
    assert out.dtype == torch.bfloat16
    for t in (x, w):
        del kept[t.untyped_storage().data_ptr()]
    assert sum(t.untyped_storage().nbytes() for t in kept.values()) == 2 * (
        64 * 4 + 4 * 48 + 70 * 4
    )


def test_without_a_second_factor_the_layer_is_its_base_and_with_one_near_its_merged_weight():
    """What is sampled from is the merged weight; before the first update B is 0."""
    x, w = leaf(200, 96).detach().bfloat16(), (leaf(80, 96, seed=1).detach() / 10).bfloat16()
    a, b = leaf(4, 96, seed=3).detach() / 10, torch.zeros(80, 4)
    assert torch.equal(gemm.lora_linear(x, w, None, a, b, 2.0), F.linear(x, w))
    b += 0.02 * leaf(80, 4, seed=4).detach()
    merged = (w.float() + 2.0 * b @ a).bfloat16()
    truth = x.double() @ (w.double() + 2.0 * b.double() @ a.double()).t()
    got, sampled = gemm.lora_linear(x, w, None, a, b, 2.0), F.linear(x, merged)
    errors = [(y.double() - truth).norm() / truth.norm() for y in (got, sampled, F.linear(x, w))]
    assert errors[0] < 3e-3 and errors[1] < 3e-3 < errors[2]


def test_accelerated_modules_compute_the_same_and_stay_linear():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 4, bias=False))
    fast = gemm.accelerate(copy.deepcopy(plain))
    assert isinstance(fast[0], nn.Linear) and type(fast[0]) is not nn.Linear
    assert fast.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(10, 6)
    torch.testing.assert_close(fast(x), plain(x))
    for model in (fast, plain):
        model(x).square().sum().backward()
    for mine, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-5)
    assert fast(x.double()[:0].float()).shape == (0, 4)


def test_float64_goes_through_torch():
    x, w = leaf(9, 6).double(), leaf(4, 6).double()
    torch.testing.assert_close(gemm.linear(x, w), F.linear(x, w), rtol=0, atol=0)
