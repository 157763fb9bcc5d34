"""The registered ops: what torch.library asks of them, and what torch.compile makes of them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from meal_fast import ops
from meal_fast.ops import registration

# What a select leaves out is computed all the same, and numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

GROUP = torch.tensor([3, 1, 3, 1, 1])
KEEP = torch.tensor([True, True, True, True, False])
OLD = torch.tensor([-1.0, -2.0, -0.3, -0.7])
ADVANTAGE = torch.tensor([1.0, -2.0, 0.5, 0.0])


def rewards_and_weights(requires_grad=True):
    torch.manual_seed(0)
    r, w = torch.randn(5, 2), torch.rand(5, 2).softmax(1)
    return r.requires_grad_(requires_grad), w.requires_grad_(requires_grad)


def logp_and_kl(requires_grad=True):
    torch.manual_seed(1)
    return tuple(x.requires_grad_(requires_grad) for x in (OLD + torch.randn(4) / 3, torch.rand(4)))


def advantages_loss(r, w, impl=None):
    score, advantage = ops.group_advantages(
        r.sin(), w, GROUP, utopia=[2.0, 2.0], keep=KEEP, eps=0.1, impl=impl
    )
    return (advantage * torch.arange(5)).sum() + score.square().sum()


def policy_loss(logp, token_kl, impl=None):
    loss, metrics = ops.policy_loss_from_logp(
        logp * 1.1, ADVANTAGE, old_logp=OLD, token_kl=token_kl, kl="exact", beta=0.3, impl=impl
    )
    return 2 * loss, metrics


def group_arguments(r, w, impl):
    z = torch.full((2,), 2.0)
    return registration.OPS["group_advantages"].arguments(
        r, w, GROUP, keep=KEEP, utopia=z, scalarization="linear", eps=0.1, impl=impl
    )


def loss_arguments(logp, token_kl, impl, kl="exact"):
    ref_logp = None if kl == "exact" else OLD - 0.1
    return registration.OPS["policy_loss_from_logp"].arguments(
        logp, ADVANTAGE, token_kl=token_kl, old_logp=OLD, ref_logp=ref_logp, beta=0.3, kl=kl,
        impl=impl,
    )  # fmt: skip


def test_opcheck_group_advantages(impl):
    op = torch.ops.meal_fast.group_advantages.default
    torch.library.opcheck(op, group_arguments(*rewards_and_weights(), impl))
    r, w = rewards_and_weights(False)
    torch.library.opcheck(op, group_arguments(r, w.requires_grad_(), impl))


def test_opcheck_policy_loss(impl):
    op = torch.ops.meal_fast.policy_loss_from_logp.default
    logp, token_kl = logp_and_kl()
    torch.library.opcheck(op, loss_arguments(logp, token_kl, impl))
    torch.library.opcheck(op, loss_arguments(logp, None, impl, kl="k3"))


def test_compiled_advantages_are_the_eager_ones(impl):
    compiled = torch.compile(advantages_loss, backend="aot_eager", fullgraph=True)
    results = []
    for function in (advantages_loss, compiled):
        leaves = rewards_and_weights()
        loss = function(*leaves, impl)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    # Values are looked at when the compiled function runs.
    r, w = rewards_and_weights(False)
    r[0] = torch.inf
    with pytest.raises(ValueError, match=r"weights: row 1 is"):
        compiled(r.nan_to_num(posinf=0), torch.where(torch.arange(5)[:, None] == 1, 2, w), impl)


def test_compiled_loss_is_the_eager_one(impl):
    compiled = torch.compile(policy_loss, backend="aot_eager", fullgraph=True)
    results = []
    for function in (policy_loss, compiled):
        leaves = logp_and_kl()
        loss, metrics = function(*leaves, impl)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves), metrics))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    assert not any(value.requires_grad for value in metrics.values())
    with torch.no_grad():
        quiet, _ = compiled(*logp_and_kl(), impl)
    assert not quiet.requires_grad and torch.equal(quiet, loss)
    # One input that needs a gradient, and one that does not.
    logp, token_kl = logp_and_kl()
    loss, _ = compiled(logp, token_kl.detach(), impl)
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], results[0][1])


class Seen(TorchDispatchMode):
    """The names of the ops that reach the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_by_hand_the_registered_ops_are_passed_by():
    with Seen() as seen:
        advantages_loss(*rewards_and_weights()).backward()
        policy_loss(*logp_and_kl())[0].backward()
    assert "aten::mul.Tensor" in seen.names
    assert not any(name.startswith("meal_fast::") for name in seen.names)
    with Seen() as seen:
        torch.ops.meal_fast.group_advantages(*group_arguments(*rewards_and_weights(), "torch"))
    assert "meal_fast::group_advantages" in seen.names


def test_autograd_is_switched_back_off_behind_a_body():
    logp, token_kl = logp_and_kl()
    arguments = loss_arguments(logp, token_kl, "torch")
    with torch.no_grad():
        first = torch.ops.meal_fast.policy_loss_from_logp(*arguments)
        assert not torch.is_grad_enabled()
    second = torch.ops.meal_fast.policy_loss_from_logp(*arguments)
    assert not first[0].requires_grad and second[0].requires_grad
    assert not any(x.requires_grad for x in second[1:])
    with pytest.raises(ValueError, match="kl='k9'"), registration.autograd_inside():
        ops.policy_loss_from_logp(logp, ADVANTAGE, kl="k9")
    torch.testing.assert_close(torch.autograd.grad(second[0], logp)[0], first[3])


def sample_arguments(logits, impl):
    return registration.OPS["sample"].arguments(
        logits, seed=7, row=torch.arange(3), position=torch.arange(3) + 2**40, temperature=0.8,
        top_k=4, top_p=0.9, min_p=0.01, impl=impl,
    )  # fmt: skip


def test_opcheck_sample(impl):
    torch.manual_seed(2)
    op = torch.ops.meal_fast.sample.default
    torch.library.opcheck(op, sample_arguments(torch.randn(3, 20), impl))
    if impl == "torch":
        torch.library.opcheck(op, sample_arguments(torch.randn(3, 20).double(), None))


def test_compiled_sampling_is_the_eager_one(impl):
    def call(logits, row):
        return ops.sample(2 * logits, seed=2**63 + 5, row=row, position=3, top_k=5, impl=impl)

    logits, row = torch.randn(3, 20), torch.arange(3)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for a, b in zip(call(logits, row), compiled(logits, row), strict=True):
        assert torch.equal(a, b)


def a_loss_of_everything(
    x: torch.Tensor,
    y: torch.Tensor | None,
    groups: torch.Tensor | ops.Groups,
    *,
    span: tuple[float, float] = (0.1, 0.2),
    total: float | torch.Tensor | None = None,
    count: int = 3,
    limit: int | None = None,
    flag: bool | None = None,
    impl: str | None = None,
) -> torch.Tensor:
    return x


def test_the_schema_is_read_off_the_signature():
    op = registration.Op(a_loss_of_everything, ("y",), None, is_loss=False)
    assert op.schema == (
        "Tensor x, Tensor? y, Tensor groups, Tensor? groups_1, Tensor? groups_2, float span_0, "
        "float span_1, float? total, Tensor? total_tensor, SymInt count, SymInt? limit, "
        "bool? flag, str? impl"
    )
    assert op.places == [1]


@pytest.mark.parametrize("total", [None, 2.5, torch.tensor(4)])
@pytest.mark.parametrize("planned", [True, False])
def test_arguments_go_to_the_schema_and_back(total, planned):
    op = registration.Op(a_loss_of_everything, ("y",), None, is_loss=False)
    group = ops.Groups.of(GROUP, 4) if planned else GROUP
    flat = op.arguments(OLD, ADVANTAGE, group, total=total, limit=7)
    assert len(flat) == 13
    given = op.given(flat)
    assert given["x"] is OLD and given["y"] is ADVANTAGE and given["total"] is total
    assert given["span"] == (0.1, 0.2) and given["count"] == 3 and given["limit"] == 7
    assert isinstance(given["groups"], ops.Groups) == planned
    if planned:
        assert given["groups"].b == 4 and given["groups"].order_R is group.order_R


def test_calls_that_python_would_refuse_are_refused_when_compiled():
    op = registration.Op(a_loss_of_everything, (), None, is_loss=False)
    with pytest.raises(TypeError, match="unexpected keyword argument 'cilp'"):
        op.bind((OLD, None, GROUP), {"cilp": 3})
    with pytest.raises(TypeError, match="needs the argument 'groups'"):
        op.bind((OLD, None), {})
    with pytest.raises(TypeError, match="takes 3 positional arguments, got 4"):
        op.bind((OLD, None, GROUP, (0.1, 0.2)), {})
    with pytest.raises(TypeError, match="multiple values for argument 'x'"):
        op.bind((OLD, None, GROUP), {"x": OLD})


def test_annotations_without_a_counterpart_are_refused():
    def op(x: dict) -> torch.Tensor: ...

    with pytest.raises(TypeError, match="x: <class 'dict'> has no counterpart in a schema"):
        registration.Op(op, (), None, is_loss=False)


def test_every_public_op_is_registered():
    functions = {name for name in ops.__all__ if name != "Groups"}
    assert set(registration.OPS) == functions


def test_a_seed_that_changes_is_no_compilation_each():
    def call(logits, seed):
        return ops.sample(2 * logits, seed=seed, row=torch.arange(3), position=3)

    logits, compiled = torch.randn(3, 20), torch.compile(call, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=3):
        for seed in (1, 7, 9, 11, 2**63 + 5, 2**62, 12):
            for a, b in zip(call(logits, seed), compiled(logits, seed), strict=True):
                assert torch.equal(a, b)
