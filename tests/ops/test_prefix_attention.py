"""Attention over shared prefixes in torch, against a loop over the rows in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meal_fast import ops
from meal_fast.ops import Groups
from tests.helpers.prefixes import draw

# What a select leaves out is computed all the same, and numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

MIXED = draw([2, 0, 2, 0, 3], [5, 7, 3, 0], [1, 3, 0, 2, 4])


def close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


@st.composite
def cases(draw_from):
    b = draw_from(st.integers(1, 5))
    group = draw_from(st.lists(st.integers(0, b - 1), max_size=9))
    if draw_from(st.booleans()):  # groups of one size, rows in any order
        group = draw_from(st.permutations(list(range(b)) * draw_from(st.integers(1, 3))))
    prefixes = draw_from(st.lists(st.integers(0, 9), min_size=b, max_size=b))
    tails = [draw_from(st.integers(0 if prefixes[g] else 1, 6)) for g in group]
    size = draw_from(st.sampled_from([1.0, 4.0]))
    case = draw(
        list(group),
        prefixes,
        tails,
        heads=draw_from(st.integers(1, 3)),
        rep=draw_from(st.integers(1, 3)),
        d=draw_from(st.integers(1, 6)),
        spare=draw_from(st.integers(0, 2)),
        seed=draw_from(st.integers(0, 99)),
        size=size,
    )
    return case, 1e-5 * size**2  # scores grow with its square, and their rounding with them


@settings(max_examples=60, deadline=None)
@given(drawn=cases())
def test_any_shapes_groups_and_lengths(drawn):
    case, tolerance = drawn
    close(case.run(), case.expected(), tolerance)
    close(case.spoiled().run(scale=0.3), case.expected(scale=0.3), tolerance)
    plan = Groups.of(case.group, len(case.prefix_length))
    assert torch.equal(replace(case, group=plan).run(), case.run())


@pytest.mark.parametrize("group", [[0, 1, 2, 3], [0, 0, 1, 1, 2, 2, 3, 3], [1, 1, 1], [3, 1, 0, 1]])
def test_strided_views(group):
    """Layouts in which heads come after tokens, and tails in a longer buffer."""
    case = draw(group, [4, 4, 4, 4], [3] * len(group), heads=3)
    across = {
        name: getattr(case, name).transpose(1, 2).contiguous().transpose(1, 2)
        for name in ("query", "prefix_key", "prefix_value", "tail_key", "tail_value")
    }
    close(replace(case, **across).run(), case.expected())
    room = torch.full((len(group), 3, 9, 4), torch.nan)
    room[:, :, :4] = case.tail_key
    close(replace(case, tail_key=room[:, :, :4]).run(), case.expected())
    wide = case.query.repeat(1, 1, 2)[:, :, ::2]
    close(replace(case, query=wide).run(), replace(case, query=wide).expected())


def test_large_scores_and_one_that_is_minus_infinity():
    case = draw([0, 1, 0], [3, 2], [2, 0, 1], size=60.0)
    close(case.run(), case.expected())
    case.prefix_key[0, :, 1] = torch.where(case.query[0, ::2] > 0, -torch.inf, torch.inf)
    masked = replace(case, query=case.query[:1], group=case.group[:1])
    masked = replace(masked, tail_key=case.tail_key[:1], tail_value=case.tail_value[:1])
    masked = replace(masked, tail_length=case.tail_length[:1])
    even_heads = slice(None, None, 2)  # the others' signs differ: NaN there, as in the loop
    close(masked.run()[:, even_heads], masked.expected()[:, even_heads])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_rounded_once(dtype):
    case = draw([1, 0, 1, 1], [30, 17], [9, 1, 4, 0], d=16).to(dtype=dtype)
    out = case.run()
    assert out.dtype == dtype
    # Half a unit in the last place, or what float64 itself leaves.
    close(out, case.expected(), tolerance=max(torch.finfo(dtype).eps, 1e-12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = case.to(dtype=torch.float32)
        assert torch.equal(wide.run(), case.to(dtype=torch.float32).run())
        close(wide.run(), wide.expected())


def test_no_rows_no_prefixes_and_no_tails():
    assert draw([], [3], []).run().shape == (0, 4, 4)
    assert draw([], [], []).run().shape == (0, 4, 4)
    close((case := draw([0, 0], [0], [2, 1], spare=0)).run(), case.expected())
    close((case := draw([1, 0], [2, 1], [0, 0], spare=0)).run(), case.expected())


def test_the_plan_of_groups():
    plan = Groups.of(torch.tensor([3, 1, 3, 0], dtype=torch.int32), 5)
    assert plan.group_R.dtype == torch.int64
    assert plan.order_R.tolist() == [3, 1, 0, 2] and plan.offset.tolist() == [0, 1, 2, 2, 4, 4]
    assert plan.layout.even == 0 and plan.layout.back.tolist() == [2, 1, 3, 0]
    ordered = Groups.of(torch.tensor([0, 0, 1, 1]), 2).layout
    assert ordered.even == 2 and ordered.order is None
    assert Groups.of(torch.zeros(0, dtype=torch.int64), 2).layout.starts == [0, 0, 0]


def test_the_output_is_no_view_and_the_inputs_stay():
    before = {name: x.clone() for name, x in vars(MIXED).items()}
    MIXED.run().zero_()
    assert all(torch.equal(x, before[name]) for name, x in vars(MIXED).items())


def test_a_gradient_is_refused():
    with pytest.raises(ValueError, match="tail_key: requires a gradient, and prefix_attention has"):
        replace(MIXED, tail_key=MIXED.tail_key.clone().requires_grad_()).run()
    case = replace(MIXED, query=MIXED.query.clone().requires_grad_())
    with torch.no_grad():
        assert torch.equal(case.run(), MIXED.run())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(5, 4)}, r"query.shape=\(5, 4\): must be \(R, Hq, d\)"),
        ({"query": torch.zeros(5, 3, 4)}, "query.shape=.*Hq must be a multiple of H = 2"),
        ({"query": torch.zeros(5, 4, 0)}, "query.shape=.*needs a width"),
        ({"query": torch.zeros(5, 4, 4, dtype=torch.int64)}, "query: dtype torch.int64"),
        ({"query": torch.zeros(5, 4, 4).double()}, "prefix_key: dtype torch.float32, but query"),
        ({"prefix_value": torch.zeros(4, 2, 8, 5)}, "prefix_value: shape"),
        ({"prefix_length": torch.zeros(3, dtype=torch.int64)}, r"prefix_length: shape \(3,\)"),
        ({"prefix_length": torch.tensor([5, 9, 3, 0])}, r"prefix_length: entry 1 is 9, outside \["),
        ({"tail_length": torch.tensor([1, -3, 0, 2, 4])}, r"tail_length: entry 1 is -3, outside"),
        ({"tail_length": torch.tensor([1, 3, 0, 2, 0])}, "tail_length: row 4 has no tail and its"),
        ({"tail_length": torch.zeros(5)}, "tail_length: dtype torch.float32, expected int64"),
        ({"tail_value": torch.zeros(5, 2, 4, 4)}, "tail_value: shape"),
        ({"group": torch.tensor([2, 0, 2, 4, 3])}, r"group: row 3 is 4, outside \[0, 4\)"),
        ({"group": torch.zeros(4, dtype=torch.int64)}, r"group: shape \(4,\), expected \(5,\)"),
        ({"group": torch.zeros(5)}, "group: dtype torch.float32"),
        ({"group": Groups.of(MIXED.group, 5)}, "group='Groups of 5 prefixes': prefix_key has 4"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(MIXED, **change).run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": float("nan")}, "scale=nan: must be finite"),
        ({"impl": "cuda"}, "impl='cuda': prefix_attention has none such here"),
        ({"impl": "flash"}, "impl='flash': choose from"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MIXED.run(**options)


def test_opcheck_and_compile(impl):
    op = torch.ops.meal_fast.prefix_attention.default
    plan = Groups.of(MIXED.group, 4)
    q, pk, pv, length, group, *tail = vars(MIXED).values()
    for parts in ((None, None), (plan.order_R, plan.offset)):
        torch.library.opcheck(op, (q, pk, pv, length, group, *parts, *tail, None, impl))
    compiled = torch.compile(ops.prefix_attention, backend="aot_eager", fullgraph=True)
    for group in (MIXED.group, plan):
        got = compiled(q, pk, pv, length, group, *tail, scale=0.2, impl=impl)
        assert torch.equal(got, MIXED.run(scale=0.2, impl=impl))
