"""The fused product and online softmax, held to plain torch in float64."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton has no build for this platform")

from meal_fast.kernels import linear_logprob as kernel
from meal_fast.kernels.linear_logprob import KEPT, Tiling, linear_logprob_forward

from meal_fast import ops

# The interpreter computes with numpy, which remarks on what the kernels select out afterwards.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]

# Small, so that a few tokens and columns fill several tiles.
SMALL = Tiling(16, 32, 16, num_warps=4, num_stages=2, per_sm=1)
D = 32


def reference(hidden, weight, target, temperature=1.0, softcap=None, bias=None):
    """(logp, entropy) in the precision of `hidden` and `weight`."""
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias.to(z.dtype)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    logp = (z / temperature).log_softmax(1)
    p = logp.exp()
    entropy = -torch.where(p > 0, p * logp, 0).sum(1)
    inside = (target >= 0) & (target < weight.shape[0])
    picked = logp.gather(1, torch.where(inside, target, 0)[:, None]).squeeze(1)
    return torch.where(inside, picked, torch.nan), entropy


def problem(n, v, device, dtype=None, seed=0, d=D, spread=1.0):
    """hidden (n, d), weight (v, d), target (n,). float32 does not go to a GPU's tensor cores."""
    generator = torch.Generator().manual_seed(seed)
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    hidden = torch.randn(n, d, generator=generator) * spread
    weight = torch.randn(v, d, generator=generator)
    target = torch.randint(v, (n,), generator=generator)
    return hidden.to(device, dtype), weight.to(device, dtype), target.to(device)


def launch(hidden, weight, target, tile=SMALL, per_part=3, partial=None, pad=0, **readout):
    """`linear_logprob_forward` with a tile of our choice, and outputs that begin as NaN."""
    n, v = hidden.shape[0], weight.shape[0]
    if partial is None:
        parts = -(-v // (tile.columns * per_part))
        partial = hidden.new_full((parts, KEPT, n), torch.nan, dtype=torch.float32)
    made = [hidden.new_full((n + pad,), torch.nan, dtype=torch.float32) for _ in range(2)]
    out = [x[:n] for x in made]
    for x in made:
        x[n:] = 7
    options = [readout.get("temperature", 1.0), readout.get("softcap"), readout.get("bias")]
    kernel._launch(hidden, weight, target, *options, tile, per_part, partial, *out)
    return made if pad else out


def check(got, hidden, weight, target, tolerance=2e-6, **readout):
    """As near the exact result as plain torch in float32, up to a factor of 2 and roundings."""
    bias = readout.pop("bias", None)
    wide = None if bias is None else bias.double()
    exact = reference(hidden.double(), weight.double(), target, bias=wide, **readout)
    plain = reference(hidden.float(), weight.float(), target, bias=bias, **readout)
    for name, ours, true, theirs in zip(("logp", "entropy"), got, exact, plain, strict=True):
        assert ours.dtype == torch.float32
        infinite = ~true.isfinite()
        assert torch.equal(ours.isnan(), true.isnan()), name
        assert torch.equal(ours[infinite].nan_to_num(), true[infinite].float().nan_to_num()), name
        if infinite.all():
            continue
        wrong = (ours.double() - true)[~infinite].abs().max()
        allowed = (theirs.double() - true)[~infinite].abs().max()
        scale = 1 + true[~infinite].abs().max()
        assert wrong <= 2 * allowed + tolerance * scale, f"{name}: {wrong:.1e}, torch {allowed:.1e}"


def some_bias(v, device):
    bias = torch.linspace(-3, 3, v, device=device)
    bias[1::5] = -torch.inf
    return bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "readout",
    [{"temperature": 0.7}, {"softcap": 4.0, "temperature": 1.3}, {"bias": True, "softcap": 9.0}],
)
def test_the_wrapper_matches_float64(device, dtype, readout):
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("the tensor cores take half the digits")
    hidden, weight, target = problem(20, 300, device, dtype, spread=0.1)
    target[:2] = torch.tensor([0, 299])
    if readout.get("bias"):
        readout = readout | {"bias": some_bias(300, device)}
    got = linear_logprob_forward(hidden, weight, target, **readout)
    check(got, hidden, weight, target, **readout)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    n=st.integers(1, 20),
    v=st.integers(1, 300),
    per_part=st.integers(1, 4),
    temperature=st.floats(0.2, 5),
    softcap=st.none() | st.floats(1, 50),
    with_bias=st.booleans(),
    spread=st.sampled_from([0.01, 1.0, 20.0]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_split(device, n, v, per_part, temperature, softcap, with_bias, spread, seed):
    hidden, weight, target = problem(n, v, device, seed=seed, spread=spread)
    bias = some_bias(v, device) if with_bias else None
    readout = {"temperature": temperature, "softcap": softcap, "bias": bias}
    got = launch(hidden, weight, target, per_part=per_part, **readout)
    check(got, hidden, weight, target, **readout)


def test_a_part_may_end_with_the_vocabulary(device):
    """V is a multiple of the tile, and the last part has fewer tiles than the others."""
    # Of logits near 0, so that the zeros which lie past the end would count.
    hidden, weight, target = problem(5, 5 * SMALL.columns, device, spread=0.05)
    check(launch(hidden, weight, target, per_part=2), hidden, weight, target)


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_extreme_logits(device, shift):
    """Every logit near ±1e4: sums that do not start at -inf underflow or overflow."""
    hidden, weight, target = problem(18, 130, device)
    bias = torch.full((130,), shift, device=device)
    got = launch(hidden, weight, target, per_part=2, bias=bias)
    check(got, hidden, weight, target, bias=bias)
    wide, weight, target = problem(18, 130, device, spread=2e3)  # and logits from -1e4 to 1e4
    check(launch(wide, weight, target), wide, weight, target)


def test_columns_out_of_the_vocabulary(device):
    """Whole tiles and a whole part at -inf, a target among them, and a row with nothing left."""
    hidden, weight, target = problem(17, 200, device)
    bias = torch.zeros(200, device=device)
    bias[:100] = -torch.inf
    target[:] = torch.arange(120, 137)
    target[3] = 40
    logp, entropy = got = launch(hidden, weight, target, per_part=2, bias=bias)
    check(got, hidden, weight, target, bias=bias)
    assert logp[3] == -torch.inf and logp.isfinite().sum() == 16 and entropy.isfinite().all()

    nothing = torch.full((200,), -torch.inf, device=device)
    logp, entropy = launch(hidden, weight, target, bias=nothing)
    assert logp.isnan().all() and entropy.isnan().all()


def test_a_target_outside_the_vocabulary_gives_nan(device):
    hidden, weight, target = problem(6, 70, device)
    good = launch(hidden, weight, target)
    bad = target.clone()
    bad[:4] = torch.tensor([-1, 70, 2**32 + 5, -(2**63)])
    logp, entropy = linear_logprob_forward(hidden, weight, bad)
    assert logp[:4].isnan().all()
    check((logp, entropy), hidden, weight, bad)
    assert torch.equal(launch(hidden, weight, bad)[0][4:], good[0][4:])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_bad_row_spoils_no_other(device, poison):
    hidden, weight, target = problem(18, 70, device)
    clean = launch(hidden, weight, target)
    hidden[2, 3] = poison
    spoiled = launch(hidden, weight, target)
    for before, after in zip(clean, spoiled, strict=True):
        assert after[2].isnan()
        keep = torch.arange(18, device=device) != 2
        assert torch.equal(before[keep], after[keep])


def test_nothing_is_written_past_the_end(device):
    hidden, weight, target = problem(18, 70, device)
    room = hidden.new_full((3 * KEPT * 18 + 30,), 7.0, dtype=torch.float32)
    partial = room[:-30].view(3, KEPT, 18)
    got = launch(hidden, weight, target, per_part=1, partial=partial, pad=30)
    assert (room[-30:] == 7).all() and all((x[18:] == 7).all() for x in got)
    check([x[:18] for x in got], hidden, weight, target)


def test_two_runs_are_bit_equal(device):
    arguments = problem(20, 300, device)
    for one, other in zip(launch(*arguments), launch(*arguments), strict=True):
        assert torch.equal(one, other)


def test_no_tokens_and_one(device):
    hidden, weight, target = problem(1, 40, device)
    logp, entropy = linear_logprob_forward(hidden[:0], weight, target[:0])
    assert logp.shape == entropy.shape == (0,) and logp.dtype == torch.float32
    check(linear_logprob_forward(hidden, weight, target), hidden, weight, target)


@pytest.mark.parametrize("layout", ["odd width", "transposed", "every other", "one row", "offset"])
def test_layouts_that_a_descriptor_cannot_describe(device, layout):
    hidden, weight, target = problem(6, 40, device, torch.float16, d=33)
    if layout == "transposed":
        hidden, weight = hidden.T.contiguous().T, weight.T.contiguous().T
    elif layout == "every other":
        hidden, weight = hidden[:, :32:2], weight[:, 1::2]
    elif layout == "one row":
        hidden, weight = hidden[:1, :32].expand(6, 32), weight[:1, :32].expand(40, 32)
    elif layout == "offset":
        hidden, weight = hidden.flatten()[1:193].view(6, 32), weight[:, 1:]
    target = torch.stack([target, -target], 1)[:, 0]
    check(linear_logprob_forward(hidden, weight, target), hidden, weight, target)


def sparse(count, dtype, device, path):
    """`count` elements of which only those written take memory, on the CPU: a file of holes."""
    if device == "cuda":
        return torch.empty(count, dtype=dtype, device=device)
    return torch.from_file(str(path), shared=True, size=count, dtype=dtype)


def test_offsets_past_32_bits(device, tmp_path):
    """Rows of hidden, and parts of the partial results, that start past element 2³¹."""
    hidden, weight, target = problem(18, 96, device, torch.float16)
    stride = 2**27
    far = sparse(17 * stride + D, torch.float16, device, tmp_path / "hidden")
    far = far.as_strided((18, D), (stride, 1)).copy_(hidden)
    stride = 2**30
    partial = sparse(2 * stride + KEPT * 18, torch.float32, device, tmp_path / "partial")
    partial = partial.as_strided((3, KEPT, 18), (stride, 18, 1))
    got = launch(far, weight, target, per_part=1, partial=partial)
    check(got, hidden, weight, target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(4)}, r"hidden.shape=\(4,\): must be \(0 or more"),
        ({"hidden": torch.zeros(4, 7)}, r"weight: shape \(9, 8\), expected \(9, 7\)"),
        ({"weight": torch.zeros(0, 8)}, r"weight.shape=\(0, 8\): must be \(1 or mo"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, r"target: shape \(3,\), expected \(4,\)"),
        ({"target": torch.zeros(4)}, "target: dtype torch.float32"),
        ({"bias": torch.zeros(8)}, r"bias: shape \(8,\), expected \(9,\)"),
        ({"bias": torch.zeros(9, dtype=torch.int64)}, "bias: dtype torch.int64"),
        ({"temperature": 0.0}, "temperature=0.0: must be positive"),
        ({"softcap": -1.0}, "softcap=-1.0: must be positive"),
        ({"hidden": torch.zeros(4, 8).double()}, "hidden.dtype=torch.float64: cast it"),
        ({"weight": torch.zeros(9, 8).half()}, "weight.dtype=torch.float16: must be hidden's"),
        ({"hidden": torch.zeros(4, 8).to(torch.float8_e5m2)}, "hidden.dtype=torch.float8_e5m2"),
        ({"weight": torch.zeros(9, 8, device="meta")}, "weight: on meta, but hidden is on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    good = {
        "hidden": torch.zeros(4, 8),
        "weight": torch.zeros(9, 8),
        "target": torch.zeros(4, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        linear_logprob_forward(**(good | change))


def test_without_a_gpu_or_the_interpreter_it_says_so(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    hidden, weight, target = problem(2, 9, "cpu")
    with pytest.raises(ValueError, match="needs a CUDA tensor, or TRITON_INTERPRET=1"):
        linear_logprob_forward(hidden, weight, target)


@given(
    n=st.integers(1, 10**6),
    d=st.integers(1, 16384),
    v=st.integers(1, 262_144),
    multiprocessors=st.integers(1, 160),
    capability=st.sampled_from([80, 86, 90, 100, 120]),
)
def test_the_choice_of_a_tile_and_of_parts(n, d, v, multiprocessors, capability):
    tile = kernel.tiling(n, d, capability)
    # Operands of every stage, and scratch, in what one multiprocessor shares among its programs.
    shared = 2 * tile.depth * (tile.tokens + tile.columns) * tile.num_stages + 2048
    assert shared * tile.per_sm <= 228 * 1024
    assert capability in (90, 100) or shared <= 99 * 1024
    per_part = kernel.tiles_per_part(n, v, tile, multiprocessors)
    tiles = -(-v // tile.columns)
    assert 1 <= per_part <= tiles and -(-tiles // per_part) <= kernel.MAX_PARTS


def test_the_parts_keep_every_multiprocessor_busy():
    for n, d, v in [(1, 896, 151_936), (64, 4096, 128_256), (8192, 4096, 128_256)]:
        tile = kernel.tiling(n, d)
        slots = 132 * tile.per_sm
        per_part = kernel.tiles_per_part(n, v, tile, 132)
        blocks, tiles = -(-n // tile.tokens), -(-v // tile.columns)
        waves = -(-blocks * -(-tiles // per_part) // slots)
        assert blocks * tiles / slots >= 0.75 * waves * per_part


@pytest.mark.parametrize("readout", [{}, {"temperature": 0.7, "softcap": 5.0}])
def test_the_public_op_fused_is_the_chunked_one(device, readout):
    """Values of the fused product, gradients of the chunks."""
    hidden, weight, target = problem(19, 70, device)
    bias = torch.linspace(-1, 1, 70, device=device)
    results = []
    for impl in ("fused", "torch"):
        leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
        logp, entropy = ops.linear_logprob(
            *leaves[:2], target, bias=leaves[2], impl=impl, max_bytes=70 * 4 * 8, **readout
        )
        total = (logp * torch.arange(19.0, device=device)).sum() + 2 * entropy.sum()
        results.append((logp, entropy, *torch.autograd.grad(total, leaves)))
    close = {"rtol": 1e-4, "atol": 1e-4} if device == "cpu" else {"rtol": 2e-2, "atol": 2e-2}
    for fused, chunked in zip(*results, strict=True):
        torch.testing.assert_close(fused, chunked, **close)


def test_fused_without_a_reference_only(device):
    hidden, weight, target = problem(3, 9, device)
    with pytest.raises(ValueError, match="impl='fused': choose from"):
        ops.linear_logprob_kl(hidden, hidden, weight, target, impl="fused")
