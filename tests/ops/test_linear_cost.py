"""What the ops with a head spend: products, rows, memory; empty input; messages for bad input."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meal_fast import ops
from meal_fast.ops import gemm
from tests.helpers.heads import head


class Products(TorchDispatchMode):
    """Matrix products done, and the largest tensor made, in bytes."""

    def __init__(self):
        super().__init__()
        self.count, self.rows, self.largest = 0, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        if func.overloadpacket in (aten.mm, aten.addmm, aten.addmm_):
            self.count += 1
            self.rows.append(args[-2].shape[0])
        elif func.overloadpacket is gemm._onednn:
            self.count += 1
            self.rows.append(args[0].shape[0])
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        return out


def test_products_and_memory_that_are_spent():
    n, d, v = 512, 8, 4096
    hidden, weight, _, target = head(n, d, v, torch.float32)
    frozen, advantage = weight.detach(), torch.randn(n)
    budget = 1 << 20  # the tile; (N, V) would be eight of it
    chunks = n * v * 4 // budget

    def spent(f):
        with Products() as p:
            f()
        assert p.largest <= 2 * budget, "a tensor of more than the tile"
        return p.count / chunks

    def loss(w, **options):
        made, _ = ops.linear_policy_loss(hidden, w, target, advantage, max_bytes=budget, **options)
        made.backward()

    assert spent(lambda: loss(weight)) == 3
    assert spent(lambda: loss(frozen)) == 2
    assert spent(lambda: loss(frozen, ref_hidden=hidden.detach(), beta=0.1)) == 3
    assert spent(lambda: ops.linear_logprob(hidden.detach(), frozen, target, max_bytes=budget)) == 1
    with torch.no_grad():
        made = lambda: ops.linear_policy_loss(hidden, weight, target, advantage, max_bytes=budget)  # noqa: E731
        assert spent(made) == 1

    def both_ways():
        logp, _ = ops.linear_logprob(hidden, frozen, target, max_bytes=budget)
        logp.sum().backward()

    assert spent(both_ways) == 3


def test_rows_that_cannot_move_the_loss_stay_out_of_the_product():
    hidden, weight, _, target = head(20, 5, 30, torch.float32)
    advantage = torch.zeros(20)
    advantage[[3, 7, 8]] = 1.0
    mask = torch.ones(20)
    mask[8] = 0
    with Products() as p:
        loss, m = ops.linear_policy_loss(hidden, weight, target, advantage, mask=mask)
    assert p.rows == [2, 2, 30] and m["tokens"] == 2
    (g,) = torch.autograd.grad(loss, hidden)
    assert g.any(1).nonzero().squeeze(1).tolist() == [3, 7]
    with Products() as p:  # with a KL term only the mask leaves rows out
        ops.linear_policy_loss(
            hidden, weight, target, advantage, mask=mask, ref_logp=torch.zeros(20), beta=0.1
        )
    assert p.rows[0] == 19


def test_a_frozen_head_gets_nothing():
    hidden, weight, _, target = head()
    loss, _ = ops.linear_policy_loss(hidden, weight.detach(), target, torch.ones(17))
    loss.backward()
    assert hidden.grad is not None and weight.grad is None
    hidden, weight, _, target = head()
    ops.linear_policy_loss(hidden.detach(), weight, target, torch.ones(17))[0].backward()
    assert weight.grad is not None and hidden.grad is None


def test_no_tokens():
    weight = torch.randn(5, 3, requires_grad=True)
    hidden = torch.zeros(0, 3, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    for target, x in (
        (none, hidden),
        (torch.full((2,), -100), torch.zeros(2, 3, requires_grad=True)),
    ):
        loss, m = ops.linear_policy_loss(x, weight, target, torch.ones(len(target)))
        g_x, g_w = torch.autograd.grad(loss, (x, weight))
        assert loss.item() == 0 and m["tokens"] == 0 and not g_x.any() and not g_w.any()
    logp, h = ops.linear_logprob(hidden, weight, none)
    assert logp.shape == h.shape == (0,)
    g_x, g_w = torch.autograd.grad(logp.sum(), (hidden, weight))
    assert g_x.shape == (0, 3) and not g_w.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.tensor([0, 5])}, r"target: row 1 is 5, outside \[0, 5\); mask it"),
        ({"target": torch.tensor([-1, 0])}, r"target: row 0 is -1, outside"),
        ({"target": torch.tensor([0])}, r"target: shape \(1,\), expected \(2,\)"),
        ({"target": torch.tensor([0.0, 1.0])}, "target: dtype torch.float32, expected int64"),
        ({"weight": torch.zeros(5, 4)}, r"weight: shape \(5, 4\), expected \(5, 3\)"),
        ({"bias": torch.zeros(4)}, r"bias: shape \(4,\), expected \(5,\)"),
        ({"temperature": 0.0}, "temperature=0.0: must be positive"),
        ({"softcap": -1.0}, "softcap=-1.0: must be positive"),
        ({"max_bytes": 0}, "max_bytes=0: must be positive"),
        ({"beta": 0.1}, "ref_logp=None: beta=0.1 needs it, or ref_hidden"),
        ({"beta": 0.1, "kl": "exact"}, "ref_hidden=None: kl='exact' needs the whole"),
        ({"ref_weight": torch.zeros(5, 3)}, "ref_weight: given without ref_hidden"),
        (
            {"ref_hidden": torch.zeros(2, 3), "ref_logp": torch.zeros(2)},
            "ref_logp: given together with ref_hidden",
        ),
        (
            {"ref_hidden": torch.zeros(2, 3), "ref_weight": torch.zeros(6, 3)},
            r"ref_weight: shape \(6, 3\), expected \(5, 3\)",
        ),
        ({"advantage": torch.zeros(3)}, r"advantage: shape \(3,\), expected \(2,\)"),
        ({"impl": "cuda"}, "impl='cuda': linear_policy_loss has none such here"),
    ],
)
def test_bad_input_is_named(change, message):
    given = {
        "hidden": torch.zeros(2, 3),
        "weight": torch.zeros(5, 3),
        "target": torch.tensor([0, 1]),
        "advantage": torch.zeros(2),
    } | change
    with pytest.raises(ValueError, match=message):
        ops.linear_policy_loss(**given)


@pytest.mark.reliability("message", "an advantage or importance weight that is not finite")
@pytest.mark.parametrize("name", ["advantage", "importance_weight"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("shape", [(4,), (2, 2)])
def test_a_constant_that_is_not_finite_is_named_with_its_row(name, bad, shape):
    hidden, weight = torch.randn(*shape, 3), torch.randn(5, 3)
    target = torch.tensor([0, 1, -100, 2]).reshape(shape)
    values = {"advantage": torch.ones(shape), name: torch.ones(shape)}
    values[name].view(-1)[3] = bad
    row = "3" if len(shape) == 1 else "1, 1"
    of_linear, of_logits = (hidden, weight, target), (hidden @ weight.T, target)
    for loss, given in ((ops.linear_policy_loss, of_linear), (ops.policy_loss, of_logits)):
        with pytest.raises(ValueError, match=f"{name}: row {row} is {bad}; .*mask its tokens"):
            loss(*given, **values)
    with pytest.raises(ValueError, match=f"{name}: row {row} is {bad}"):
        ops.policy_loss_from_logp(torch.zeros(shape), **values)
    values[name].view(-1)[2] = bad
    values[name].view(-1)[3] = 1.0  # now the token that ignore_index leaves out has it
    for loss, given in ((ops.linear_policy_loss, of_linear), (ops.policy_loss, of_logits)):
        assert loss(*given, **values)[0].isfinite()


@pytest.mark.reliability("message", "a row's advantage that is not finite, of padded rows")
def test_a_row_without_live_tokens_may_have_any_advantage():
    logp, mask = torch.zeros(2, 3), torch.tensor([[True] * 3, [False] * 3])
    advantage = torch.tensor([1.0, math.nan])
    assert ops.policy_loss_from_logp(logp, advantage, mask=mask)[0].isfinite()
    with pytest.raises(ValueError, match="advantage: row 1 is nan"):
        ops.policy_loss_from_logp(logp, advantage)


@pytest.mark.reliability("message", "a target of -100 where no token can be left out")
def test_linear_logprob_advises_what_it_has():
    hidden, weight, target = torch.randn(2, 3), torch.randn(5, 3), torch.tensor([1, -100])
    with pytest.raises(ValueError, match=r"row 1 is -100.*pick those that count") as error:
        ops.linear_logprob(hidden, weight, target)
    assert "ignore_index" not in str(error.value)
    live = target >= 0
    assert ops.linear_logprob(hidden[live], weight, target[live])[0].isfinite().all()
