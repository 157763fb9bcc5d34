"""The sampler in Triton against its plain torch form: the same rng_key, the same tokens."""

import math

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton has no build for this platform")

import triton.language as tl  # noqa: E402
from meal_fast.kernels import sample as kernels  # noqa: E402

from meal_fast import ops  # noqa: E402
from meal_fast.ops import philox  # noqa: E402
from tests.helpers.sampler import OPTIONS, TIES, agree, at_a_boundary, keeps  # noqa: E402

# numpy says so where -inf meets NaN in a row that is no distribution.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def draw(logits, impl, device="cpu", seed=3, row=None, position=0, **options):
    row = torch.arange(len(logits)) if row is None else row
    given = {"seed": seed, "position": position, "impl": impl, **options}
    return tuple(x.cpu() for x in ops.sample(logits.to(device), row=row.to(device), **given))


def check(logits, device, row, position=0, **options):
    plain = draw(logits, "torch", device, row=row, position=position, **options)
    kernel = draw(logits, "triton", device, row=row, position=position, **options)
    agree(logits, plain, kernel, 3, row, torch.full_like(row, position), options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("v", [1, 13, 300, 2500])
def test_tokens_are_those_of_the_plain_form(device, v, options):
    torch.manual_seed(v)
    logits = 3 * torch.randn(3 if v < 2500 else 2, v)
    logits[0] = (2 * logits[0]).round() / 2  # ties
    if v > 7:
        logits[1, ::3] = -torch.inf
    row = torch.tensor([5, -(2**62), 2**40 + 1])[: len(logits)]
    check(logits, device, row=row, position=2**35 + 3, **options)


def test_the_boundary_rule_is_no_excuse():
    logits = torch.zeros(10)
    assert at_a_boundary(logits, 0.3 + 1e-7, 2, 3, {})
    assert not at_a_boundary(logits, 0.3 + 1e-5, 2, 3, {})
    assert not at_a_boundary(logits, 0.3, 2, 4, {})
    assert at_a_boundary(logits, 0.5, 0, 1, {"top_k": 2})


@triton.jit
def _uniform(out_ptr, seed, row_ptr, position_ptr):
    i = tl.program_id(0)
    u = kernels.uniform(seed, tl.load(row_ptr + i), tl.load(position_ptr + i))
    tl.store(out_ptr + i, u)


@pytest.mark.parametrize("seed", [0, 1, -7, 2**40 + 3, -(2**63)])
def test_the_uniforms_are_the_same_bits(device, seed):
    big = 2**62
    row = torch.tensor([0, 1, -1, big + 5, -big, 2**32])
    position = torch.tensor([0, 2**32 + 1, 7, -3, 9, 2**31])
    out = torch.empty(6, dtype=torch.float64, device=device)
    _uniform[(6,)](out, torch.tensor(seed).item(), row.to(device), position.to(device))
    assert torch.equal(out.cpu(), philox.uniform(seed, row, position))


def test_a_seed_and_its_complement_are_one_key(device):
    logits = torch.randn(2, 50)
    for seed in (2**64 - 1, 2**63):
        a, b = draw(logits, "triton", device, seed=seed), draw(logits, "torch", seed=seed)
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[0], draw(logits, "triton", device, seed=seed - 2**64)[0])


def test_rows_do_not_see_the_batch_and_views_are_as_good(device):
    torch.manual_seed(1)
    logits, row = 2 * torch.randn(3, 130), torch.tensor([7, 2**50, 3])
    for options in ({}, {"top_k": 9, "top_p": 0.9}):
        whole = draw(logits, "triton", device, row=row, **options)
        some = draw(logits[[2, 0]], "triton", device, row=row[[2, 0]], **options)
        view = draw(logits.t().contiguous().t(), "triton", device, row=row, **options)
        wide = torch.full((3, 400), math.nan)
        wide[:, 3:393:3] = logits
        apart = draw(wide[:, 3:393:3], "triton", device, row=row, **options)
        for w, s, t, x in zip(whole, some, view, apart, strict=True):
            assert torch.equal(w[[2, 0]], s) and torch.equal(w, t) and torch.equal(w, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(device, dtype):
    torch.manual_seed(2)
    logits = (3 * torch.randn(4, 200)).to(dtype)
    for options in ({}, {"temperature": 0.0}, {"top_k": 10, "temperature": 0.8}):
        a = draw(logits, "triton", device, **options)
        b = draw(logits.float(), "triton", device, **options)
        c = draw(logits, "torch", device, **options)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert torch.equal(a[0], c[0])


@pytest.mark.parametrize(("logits", "options", "kept"), TIES)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_exact_ties_do_not_let_more_in(device, impl, logits, options, kept):
    x = torch.tensor(logits)
    keeps(x, draw(x.expand(2 if impl == "triton" else 400, -1), impl, device, **options), kept)


def test_the_ends_of_the_range_land_on_a_token_with_mass(device):
    """`find` alone, with marks that no uniform gives: below all sums, at the total and past it."""
    x = torch.full((3000,), -torch.inf)
    x[300], x[2600] = 0.0, -40.0
    for mark, expected in ((-1.0, 300), (0.0, 300), (1.0, 2600), (2.0, 2600)):
        out = torch.empty(1, dtype=torch.int64, device=device)
        _find[(1,)](out, x.to(device), mark, V=3000, TILE=1024)
        assert out.item() == expected


def test_the_sum_goes_on_from_tile_to_tile(device):
    x = torch.zeros(3000, device=device)  # every column weighs 1
    for mark in (0.5, 1023.5, 1024.5, 2000.5, 2999.5):
        out = torch.empty(1, dtype=torch.int64, device=device)
        _find[(1,)](out, x, mark, V=3000, TILE=1024)
        assert out.item() == int(mark)


def test_the_first_of_equal_maxima_is_taken_from_whatever_tile(device):
    logits = torch.zeros(1, 2 * kernels.TILE + 5)
    logits[0, :3] = -1.0
    assert draw(logits, "triton", device, temperature=0.0)[0].tolist() == [3]


@triton.jit
def _find(out_ptr, x_ptr, mark, V: tl.constexpr, TILE: tl.constexpr):
    zero = tl.full((), 0, tl.uint32)
    mark = zero.to(tl.float64) + mark
    token = kernels.find(x_ptr, 1, 0.0, 1.0, zero, V, 0.0, mark, V, TILE, False)
    tl.store(out_ptr, token.to(tl.int64))


def test_rare_tokens_of_a_large_vocabulary_keep_their_share(device):
    v = 262_144
    logits = torch.zeros(2, v, dtype=torch.bfloat16)
    logits[:, 0] = math.log(v)  # half of the mass, as nearly as bfloat16 has it
    check(logits, device, row=torch.tensor([1, 4]))


@pytest.mark.parametrize("options", [{}, {"top_k": 4, "top_p": 0.95}], ids=str)
def test_draws_follow_the_softmax(device, options):
    n = (30 if options else 200) if device == "cpu" else 100_000
    logits = torch.tensor([1.0, 0.5, -torch.inf, 0.0, 2.0, -1.0])
    token = draw(logits.expand(n, -1), "triton", device, **options)[0]
    p = logits.softmax(0).double()
    if options:  # 0.53, 0.19, 0.12, 0.07: the first three hold 0.92 of these four
        p[5] = 0
        p /= p.sum()
    expected, count = n * p, torch.bincount(token, minlength=6)
    assert count[p == 0].sum() == 0
    used = p > 0
    statistic = ((count - expected).square()[used] / expected[used]).sum().item()
    freedom = int(used.sum()) - 1
    assert (statistic - freedom) / math.sqrt(2 * freedom) < 4


def test_a_row_that_is_no_distribution_is_nan_and_a_token_all_the_same(device):
    logits = torch.zeros(4, 20, device=device)
    logits[0, 3], logits[1], logits[2, 5] = math.nan, -torch.inf, torch.inf
    row = torch.arange(4, device=device)
    for options in ({}, {"temperature": 0.0}, {"top_k": 2, "top_p": 0.5, "min_p": 0.1}):
        given = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
        token, logp, truncated = kernels.sample(logits, 0, row, row, **given)
        assert ((token >= 0) & (token < 20)).all()
        assert logp.isnan().tolist() == truncated.isnan().tolist() == [True] * 3 + [False]
    if device == "cpu":
        with pytest.raises(ValueError, match="logits: row 0 has a NaN"):
            draw(logits, "triton")


def test_nothing_to_do(device):
    token, logp, truncated = draw(torch.zeros(0, 5), "triton", device)
    assert token.shape == logp.shape == truncated.shape == (0,) and token.dtype == torch.int64


@pytest.mark.gpu
def test_nothing_waits_for_the_card():
    logits, row = torch.randn(8, 1000, device="cuda"), torch.arange(8, device="cuda")
    options = {"top_k": 20, "top_p": 0.9, "min_p": 0.01}
    ops.sample(logits, seed=0, row=row, position=row, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.sample(logits, seed=0, row=row, position=row, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
