"""Attention over shared prefixes in Triton, against a loop over the rows in float64.

Interpreted on the CPU; on a card the same tests run compiled, with the marker `gpu`.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton has no build for this platform")

from meal_fast.kernels import prefix_attention as kernels

from meal_fast import ops
from tests.helpers.prefixes import draw

# What a select leaves out is computed all the same, and numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NAN = torch.nan


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """A few tokens and rows fit one block, and the sums over blocks would go untested."""
    monkeypatch.setattr(kernels, "TILE", 16)
    monkeypatch.setattr(kernels, "BLOCK", 16)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What the kernels are to write is NaN before they do."""
    empty = torch.empty

    def nan(*shape, **options):
        made = empty(*shape, **options)
        return made.fill_(NAN) if made.is_floating_point() else made

    monkeypatch.setattr(kernels.torch, "empty", nan)


def close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got.cpu().double(), expected, rtol=tolerance, atol=tolerance)


def in_parts(monkeypatch, walked):
    monkeypatch.setattr(kernels, "blocks_per_part", lambda *_: walked)


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_shapes_groups_and_lengths(device, monkeypatch, data):
    b = data.draw(st.integers(1, 4))
    group = data.draw(st.lists(st.integers(0, b - 1), max_size=9))
    prefixes = data.draw(st.lists(st.integers(0, 50), min_size=b, max_size=b))
    tails = [data.draw(st.integers(0 if prefixes[g] else 1, 20)) for g in group]
    case = draw(
        group,
        prefixes,
        tails,
        heads=data.draw(st.integers(1, 2)),
        rep=data.draw(st.sampled_from([1, 3, 7, 18])),
        d=data.draw(st.sampled_from([5, 16, 20])),
        seed=data.draw(st.integers(0, 99)),
    )
    with monkeypatch.context() as patch:
        in_parts(patch, data.draw(st.integers(1, 5)))
        close(case.spoiled().to(device).run(impl="triton", scale=0.3), case.expected(scale=0.3))


@pytest.mark.parametrize("walked", [1, 2, 9])
def test_parts_and_tiles_make_no_difference(device, monkeypatch, walked):
    # Prefix 1 has more rows than a tile, prefix 2 none, prefix 3 no tokens.
    case = draw([1, 0, 1, 3, 1, 1, 0, 1, 1, 1], [70, 35, 9, 0], [20, 1, 0, 2, 17, 3, 0, 5, 16, 33],
                rep=3)  # fmt: skip
    in_parts(monkeypatch, walked)
    close(case.spoiled().to(device).run(impl="triton"), case.expected())


def test_scores_far_below_and_far_above_zero(device, monkeypatch):
    """A maximum that starts at 0 loses the first; a wrong merge of parts, the second."""
    in_parts(monkeypatch, 1)
    case = draw([0, 1, 0], [40, 20], [20, 0, 17], d=16)
    ones = replace(case, query=torch.ones_like(case.query))
    for key in (-60.0, 60.0):
        shifted = replace(ones, prefix_key=case.prefix_key + key, tail_key=case.tail_key + key)
        close(shifted.to(device).run(impl="triton"), shifted.expected(), 1e-4)
    # Prefix and tail, and the parts of the prefix, far apart.
    case.prefix_key[:, :, 16:32] += 30
    for apart in (ones, replace(ones, tail_key=case.tail_key + 60)):
        close(apart.to(device).run(impl="triton"), apart.expected(), 1e-4)


@pytest.mark.parametrize("walked", [1, 3])
def test_keys_of_minus_infinity_are_not_seen(device, monkeypatch, walked):
    in_parts(monkeypatch, walked)
    case = draw([0, 0], [40], [20, 5])
    case = replace(case, query=case.query.abs())
    case.prefix_key[:, :, :16] = -torch.inf  # a whole part, and a whole block of the tail
    case.tail_key[0, :, :16] = -torch.inf
    close(case.to(device).run(impl="triton"), case.expected())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(device, dtype):
    case = draw([1, 0, 1, 1], [70, 33], [20, 1, 9, 0], d=16).to(dtype=dtype)
    out = case.to(device).run(impl="triton")
    assert out.dtype == dtype
    # On a card the weights are rounded too before they meet the values.
    close(out, case.expected(), tolerance=2 * torch.finfo(dtype).eps)


def test_strided_views_and_a_longer_buffer(device):
    case = draw([1, 0, 1], [20, 33], [20, 1, 9]).to(device)
    across = {
        name: getattr(case, name).transpose(1, 2).contiguous().transpose(1, 2)
        for name in ("query", "prefix_key", "prefix_value", "tail_value")
    }
    room = torch.full((3, 2, 40, 4), NAN, device=device)
    room[:, :, :21] = case.tail_key
    last = case.prefix_value.transpose(2, 3).contiguous().transpose(2, 3)
    want = case.to("cpu").expected()
    close(replace(case, **across, tail_key=room[:, :, :21]).run(impl="triton"), want)
    close(replace(case, prefix_value=last).run(impl="triton"), want)


PREFIX_AND_TAIL = ("prefix_key", "prefix_value", "tail_key", "tail_value")


@pytest.mark.parametrize(
    ("name", "axis"),
    [("query", 0), ("query", 1), *((name, axis) for name in PREFIX_AND_TAIL for axis in range(3))],
)
def test_offsets_past_32_bits(device, name, axis):
    """Rows, prefixes, heads and tokens that start past element 2³¹."""
    case = draw([1, 0, 2], [3, 2, 3], [2, 3, 3], heads=3, rep=1, spare=0)
    case = case.to(dtype=torch.float16)
    x = getattr(case, name)
    far = (1 << 30) + 8
    near = torch.empty(x.shape[:axis] + x.shape[axis + 1 :]).stride()
    strides = (*near[:axis], far, *near[axis:])
    storage = x.new_empty(2 * far + x.numel(), device=device)
    apart = storage.as_strided(x.shape, strides).copy_(x)
    got = replace(case.to(device), **{name: apart}).run(impl="triton")
    close(got, case.expected(), 2e-3)


def test_nothing_to_do(device):
    for case in (draw([], [3], []), draw([], [], []), draw([0, 0], [0], [2, 1], spare=0)):
        close(case.to(device).run(impl="triton"), case.expected())
    close((c := draw([1, 0], [2, 1], [0, 0], spare=0)).to(device).run(impl="triton"), c.expected())


def test_two_runs_give_the_same_bits_and_a_row_does_not_see_the_others(device, monkeypatch):
    in_parts(monkeypatch, 1)
    case = draw([1, 0, 1, 1], [70, 33], [20, 1, 9, 0]).to(device)
    first = case.run(impl="triton")
    assert torch.equal(first, case.run(impl="triton"))
    keep = torch.tensor([2, 1], device=device)
    fewer = {n: getattr(case, n)[keep] for n in vars(case) if not n.startswith("prefix")}
    assert torch.equal(replace(case, **fewer).run(impl="triton"), first[keep])


def test_what_is_out_of_range_is_nan_and_reads_nothing(device):
    """As on a card, where values are not looked at: past the checks of the CPU."""
    case = draw([0, 1, 0, 1, 0, 0], [20, 0], [3, 0, 9, 1, 2, 0]).to(device)
    group = torch.tensor([0, 1, 2, 1, -1, 0], device=device)
    ordered, order = group.sort(stable=True)
    offset = torch.searchsorted(ordered, torch.arange(3, device=device))
    plan = ops.Groups(2, group, order, offset)
    q, pk, pv, length, _, tk, tv, tails = vars(case).values()
    tails = torch.tensor([3, 0, 9, 11, 2, 0], device=device)
    # What stands before the lengths is a length too, and must not be taken for group -1's.
    length = torch.cat([length[:1], length])[1:]
    out = kernels.prefix_attention_forward(q, pk, pv, length, plan, tk, tv, tails, 0.5)
    assert out.isnan().all(2).all(1).tolist() == [False, True, True, True, True, False]
    close(out[[0, 5]], case.to("cpu").expected(0.5)[[0, 5]])
    longer = torch.tensor([22, 0], device=device)
    out = kernels.prefix_attention_forward(q, pk, pv, longer, plan, tk, tv, tails, 0.5)
    assert out[[0, 5]].isnan().all()
    # Prefixes of no tokens: nothing of theirs is merged that could make a wrong group show.
    case = draw([0, 0], [0], [2, 1], spare=0).to(device)
    group = torch.tensor([-1, 0], device=device)
    plan = ops.Groups(1, group, group.argsort(), torch.tensor([1, 2], device=device))
    q, pk, pv, _, _, tk, tv, tails = vars(case).values()
    length = torch.zeros(2, dtype=torch.int64, device=device)[1:]
    out = kernels.prefix_attention_forward(q, pk, pv, length, plan, tk, tv, tails, 0.5)
    assert out.isnan().all(2).all(1).tolist() == [True, False]


def test_the_grid_comes_from_shapes_alone():
    """Enough tiles for any groups of R rows, and parts that cover the prefix."""
    for sizes in ([40], [1] * 40, [39, 0, 1], [5, 5, 30], [6] * 7):
        for rep in (1, 3, 7):
            tiles = sum(-(-n * rep // kernels.TILE) for n in sizes)
            r = sum(sizes)
            assert tiles <= min(len(sizes), r) + r * rep // kernels.TILE
    for slots, blocks in ((1, 500), (11, 4), (600, 4), (1, 1)):
        per_part = kernels.blocks_per_part(slots, 3, blocks, 132)
        assert 1 <= per_part <= blocks and -(-blocks // per_part) <= kernels.MAX_PARTS


def test_wide_heads_run_in_torch(device):
    case = draw([0, 0], [3], [1, 2], heads=1, d=260).to(device)
    close(case.run(), case.to("cpu").expected())
    with pytest.raises(ValueError, match="impl='triton': heads of 260 are wider than the 256 th"):
        case.run(impl="triton")
    with pytest.raises(ValueError, match="impl='triton': prefix_attention in Triton computes in"):
        draw([0], [3], [1]).to(device, torch.float64).run(impl="triton")


@pytest.mark.gpu
def test_nothing_waits_for_the_card_and_a_graph_replays_with_other_groups():
    case = draw([1, 0, 1, 1], [70, 33], [20, 1, 9, 0], d=16, spare=0).to("cuda")
    other = replace(
        case,
        group=torch.tensor([0, 0, 1, 0], device="cuda"),
        tail_length=torch.tensor([3, 20, 0, 7], device="cuda"),
    )

    def step():
        return case.run(impl="triton")

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    want = other.to("cpu").expected()
    case.group.copy_(other.group)
    case.tail_length.copy_(other.tail_length)
    graph.replay()
    close(out, want)
