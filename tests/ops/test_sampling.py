"""Sampling: the generator against its published answers, the draws against the softmax."""

import math

import pytest
import torch

from meal_fast import ops
from meal_fast.ops import sampling
from meal_fast.ops.philox import philox4x32, uniform


def draw(logits, n=None, seed=0, position=0, **options):
    """One draw of each row; with n, n draws of a single (V,) row."""
    logits = logits if n is None else logits.expand(n, -1)
    row = torch.arange(logits.shape[0])
    return ops.sample(logits, seed=seed, row=row, position=position, **options)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # kat_vectors of Random123, philox4x32 10
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    other = torch.arange(4)[None]
    both = torch.cat((other, torch.tensor([counter])))
    assert philox4x32(both, tuple(key))[1].tolist() == words


def test_uniform_uses_all_of_seed_row_and_position():
    def u(seed=5, row=7, position=9):
        return uniform(seed, torch.tensor([row]), torch.tensor([position])).item()

    big = 1 << 32
    values = {u(), u(seed=6), u(seed=5 + big), u(row=8), u(row=7 + big), u(row=-7)}
    values |= {u(position=10), u(position=9 + big), u(row=9, position=7)}
    assert len(values) == 9
    many = uniform(1, torch.arange(40_000), torch.zeros(40_000, dtype=torch.int64))
    assert 0 <= many.min() and many.max() < 1
    assert many.mean().item() == pytest.approx(0.5, abs=0.01)
    assert many.var().item() == pytest.approx(1 / 12, abs=0.005)


def chi_square(tokens, p):
    """Standardised: about N(0, 1) when tokens are drawn from p, over columns with 5 expected."""
    count = torch.bincount(tokens, minlength=p.numel()).double()
    expected = p.double() * tokens.numel()
    assert count[p == 0].sum() == 0
    rare = expected < 5
    count = torch.cat((count[~rare], count[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    used = expected > 0
    statistic = ((count - expected).square()[used] / expected[used]).sum()
    freedom = int(used.sum()) - 1
    return ((statistic - freedom) / math.sqrt(2 * freedom)).item()


@pytest.mark.parametrize("v", [7, 256, 1000])
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_draws_follow_the_softmax(v, temperature):
    torch.manual_seed(v)
    logits = 2 * torch.randn(v)
    logits[3] = -torch.inf
    token, logp, truncated = draw(logits, 20_000, temperature=temperature)
    log_p = (logits / temperature).log_softmax(0)
    assert abs(chi_square(token, log_p.exp())) < 4
    torch.testing.assert_close(logp, log_p[token])
    torch.testing.assert_close(truncated, logp)
    # A wrong temperature is noticed at this sample size.
    assert chi_square(token, (logits / temperature * 1.2).softmax(0)) > 4


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, range(11)),
        ({"top_k": 6}, [0, 1, 2, 3, 4, 5]),
        ({"top_p": 0.8}, [0, 1, 2, 3, 4]),
        ({"min_p": 0.3}, [0, 1, 2, 3, 4]),
        ({"top_k": 6, "top_p": 0.8, "min_p": 0.3}, [0, 1, 2, 3]),
    ],
)
def test_a_million_draws(options, kept):
    """200,000 of each: enough to see a probability that is off by a hundredth of itself."""
    p = torch.tensor([0.25, 0.2, 0.15, 0.12, 0.1, 0.06, 0.05, 0.03, 0.02, 0.015, 0.005])
    left = torch.zeros(11, dtype=torch.float64)
    left[list(kept)] = p.double()[list(kept)]
    left /= left.sum()
    place = torch.tensor([4, 9, 0, 2, 10, 7, 1, 3, 8, 6, 5])  # ids in no order of probability
    token, logp, truncated = draw(p.log()[place], 200_000, seed=8, **options)
    assert abs(chi_square(token, left[place])) < 4
    torch.testing.assert_close(logp, p.log()[place][token])
    torch.testing.assert_close(truncated, left[place].log().float()[token])


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 3}, [0, 1, 2]),
        ({"top_p": 0.6}, [0, 1]),  # 0.4 + 0.3 reaches it
        ({"top_p": 0.4 - 1e-6}, [0]),
        ({"top_p": 1e-9}, [0]),
        ({"min_p": 0.45}, [0, 1, 2]),
        ({"top_k": 3, "top_p": 0.7}, [0, 1]),  # 0.7 of the 0.9 that are left
        ({"top_k": 9}, [0, 1, 2, 3]),
    ],
)
def test_truncation_by_hand(options, kept):
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    token, logp, truncated = draw(p.log(), 4000, **options)
    assert sorted(token.unique().tolist()) == kept
    torch.testing.assert_close(logp, p.log()[token])
    left = torch.zeros(4)
    left[kept] = p[kept] / p[kept].sum()
    torch.testing.assert_close(truncated, left.log()[token])
    if len(kept) > 1:
        assert abs(chi_square(token, left)) < 4


def survivors(z, top_k=0, top_p=1.0, min_p=0.0):
    p = z.softmax(1)
    return sampling._survivors(z, p, top_k, top_p, min_p, torch.full_like(z, math.nan))


def test_ties_do_not_let_more_in():
    flat = torch.zeros(2000)
    assert sorted(draw(flat, 2000, top_k=5)[0].unique().tolist()) == [0, 1, 2, 3, 4]
    assert draw(flat, 4000, top_p=0.01)[0].max() == 19
    # Two rows of one batch, with and without a tie at the edge.
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0], [3.0, 1.0, 2.5, 2.0]])
    assert survivors(logits, top_k=2).tolist() == [[1, 0, 1, 0]] * 2


@pytest.mark.parametrize("v", [3000, 50])
def test_the_short_list_of_top_p_changes_nothing(monkeypatch, v):
    torch.manual_seed(3)
    z = 3 * torch.randn(4, v)
    z[0] = 0.0  # the short list of a flat row is all of it
    z[1, 5] = 40.0
    kept = {}
    for least in (0.25, 1 / 256, 0.0):  # too short at first, as it is, not used
        monkeypatch.setattr(sampling, "_SHORT_LIST", least)
        kept[least] = survivors(z, top_p=0.9)
    assert (kept[0.25] == kept[0.0]).all() and (kept[1 / 256] == kept[0.0]).all()
    p = z.softmax(1)
    mass = (p * kept[0.0]).sum(1, dtype=torch.float64)
    least = torch.where(kept[0.0] > 0, p, 1).amin(1)
    assert (mass >= 0.9 - 1e-6).all() and (mass - least < 0.9).all()
    assert kept[0.0][1].sum() == 1


@pytest.mark.parametrize("v", [40, 640, 5003])
@pytest.mark.parametrize("k", [1, 2, 7, 60, 5003])
def test_top_k_is_the_first_k_of_a_stable_sort(v, k):
    torch.manual_seed(k)
    z = torch.randint(0, 40, (6, v)).float()  # mostly ties
    z[3] = torch.randn(v)
    z[4, 7:] = -torch.inf
    order = z.sort(dim=1, descending=True, stable=True).indices[:, :k]
    expected = torch.zeros_like(z).scatter_(1, order, 1)
    assert torch.equal(survivors(z, top_k=k), expected)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.7}, {"temperature": 0.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_rows_at_a_time_are_all_rows_at_once(monkeypatch, rows, options, dtype):
    torch.manual_seed(6)
    logits = 3 * torch.randn(5, 600).to(dtype)
    for scale in ({}, {"temperature": 0.6}):
        given = scale | options
        whole = draw(logits, **given)
        monkeypatch.setattr(sampling, "_CHUNK", rows * 600)  # as many rows as that
        for a, b in zip(whole, draw(logits, **given), strict=True):
            assert torch.equal(a, b)
        monkeypatch.undo()
        log_p = (logits.float() / (given.get("temperature", 1.0) or 1.0)).log_softmax(1)
        torch.testing.assert_close(whole[1], log_p.gather(1, whole[0][:, None]).squeeze(1))


def test_greedy_takes_the_first_maximum_wherever_it_lies():
    torch.manual_seed(7)
    for v in (1, 255, 256, 700, 1024):
        logits = torch.randint(0, 4, (64, v)).float()
        assert torch.equal(draw(logits, temperature=0.0)[0], logits.argmax(1))
    logits = torch.full((1, 700), -torch.inf)
    logits[0, 699] = -5.0
    assert draw(logits, temperature=0.0)[0].item() == 699


def test_greedy():
    logits = torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 0.0]])
    token, logp, truncated = draw(logits, temperature=0.0, top_k=1)
    assert token.tolist() == [1, 0] and truncated.tolist() == [0, 0]
    torch.testing.assert_close(logp, logits.log_softmax(1).gather(1, token[:, None]).squeeze(1))


@pytest.mark.parametrize("options", [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.01}])
def test_a_row_does_not_see_the_rest_of_the_batch(options):
    torch.manual_seed(4)
    logits = 2 * torch.randn(33, 5001)
    row, position = torch.randint(-(2**62), 2**62, (33,)), torch.randint(0, 99, (33,))
    whole = ops.sample(logits, seed=11, row=row, position=position, **options)
    for part in (slice(0, 1), slice(5, 20), [32, 7, 3]):
        some = ops.sample(logits[part], seed=11, row=row[part], position=position[part], **options)
        for a, b in zip(whole, some, strict=True):
            assert torch.equal(a[part], b)
    strided = ops.sample(
        logits.t().contiguous().t(), seed=11, row=row, position=position, **options
    )
    assert torch.equal(strided[0], whole[0])


def test_a_token_of_probability_zero_is_never_drawn():
    # u is pushed to both ends of its range: rounding must land on a column with p > 0.
    p = torch.zeros(3, 700)
    p[0, 699], p[1, 300], p[2, [5, 600]] = 1.0, 0.3, torch.tensor([0.9, 1e-30])
    for u in (0.0, 1 - 2**-53, 1.0):
        sums = sampling._block_sums(p)
        token = sampling._inverse_cdf(p, sums, torch.full((3,), u, dtype=torch.float64))
        assert (p.gather(1, token[:, None]) > 0).all()
        torch.testing.assert_close(sums[:, -1], p.double().sum(1))
    assert token.tolist()[:2] == [699, 300]


def test_rare_tokens_of_a_large_vocabulary_keep_their_share():
    # Half of the mass in one early column: a float32 running sum has 6e-8 steps there, which is
    # 3 % of the 2e-6 each of the others has.
    v = 250_000
    logits = torch.zeros(v)
    logits[0] = math.log(v - 1)
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    p = logits.softmax(0).expand(2000, -1)
    token = sampling._inverse_cdf(p, sampling._block_sums(p), u)
    exact = p[0].double().cumsum(0)
    expected = torch.searchsorted(exact, u * exact[-1], right=True)
    assert (token - expected).abs().max() <= 1


def test_float64_and_bfloat16():
    logits = torch.randn(3, 50, dtype=torch.float64)
    assert draw(logits)[1].dtype == torch.float64
    token, logp, _ = draw(logits.bfloat16())
    assert token.dtype == torch.int64 and logp.dtype == torch.float32
    assert draw(torch.zeros(0, 5))[0].shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.tensor([[0.0, math.nan]])}, "logits: row 0 has a NaN"),
        ({"logits": torch.full((1, 2), -math.inf)}, "logits: row 0 has a NaN, an inf"),
        ({"logits": torch.zeros(2)}, r"logits.shape=\(2,\)"),
        ({"logits": torch.zeros(1, 2, dtype=torch.int64)}, "logits: dtype torch.int64"),
        ({"row": torch.zeros(2, dtype=torch.int64)}, r"row: shape \(2,\), expected \(1,\)"),
        ({"position": torch.zeros(1)}, "position: dtype torch.float32"),
        ({"seed": 1.5}, "seed=1.5: must be a 64-bit int"),
        ({"temperature": -1.0}, "temperature=-1.0: must be 0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"impl": "cuda"}, r"impl='cuda': sample in CUDA C\+\+ needs a CUDA tensor"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {
        "logits": torch.zeros(1, 2),
        "seed": 0,
        "row": torch.zeros(1, dtype=torch.int64),
        "position": 0,
    } | change
    with pytest.raises(ValueError, match=message):
        ops.sample(given.pop("logits"), **given)
