"""The ops with a vocabulary in them under torch.library and torch.compile."""

import pytest
import torch

from meal_fast import ops
from meal_fast.ops import registration

# What a select leaves out is computed all the same, and numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TARGET = torch.tensor([1, 0, 6, 3])
ADVANTAGE = torch.tensor([1.0, -2.0, 0.5, 0.0])


def leaves(seed=0):
    """hidden, weight, bias."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((4, 5), (7, 5), (7,))
    return tuple(torch.randn(s, generator=generator).requires_grad_() for s in shapes)


def arguments(name, impl):
    hidden, weight, bias = leaves()
    ref, old = leaves(1)[0].detach(), -torch.ones(4)
    read = {"temperature": 0.9, "impl": impl}
    flat = registration.OPS[name].arguments
    if name == "linear_logprob":
        return flat(hidden, weight, TARGET, bias=bias, **read)
    if name == "linear_logprob_kl":
        return flat(hidden, ref, weight, TARGET, **read)
    if name == "linear_policy_loss":
        given = {"bias": bias, "old_logp": old, "ref_hidden": ref, "beta": 0.3}
        return flat(hidden, weight, TARGET, ADVANTAGE, **given, **read)
    logits = torch.randn(4, 7, requires_grad=True)
    return flat(logits, TARGET, ADVANTAGE, old_logp=old, ref_logp=old, beta=0.3, **read)


@pytest.mark.parametrize(
    "name", ["linear_logprob", "linear_logprob_kl", "linear_policy_loss", "policy_loss"]
)
def test_opcheck(name, impl):
    torch.library.opcheck(getattr(torch.ops.meal_fast, name).default, arguments(name, impl))


def everything(hidden, weight, bias, impl):
    ref = hidden.detach().cos()
    options = {"bias": bias, "temperature": 0.9, "impl": impl}
    logp, entropy = ops.linear_logprob(hidden, weight, TARGET, **options)
    logp_2, _, _, kl = ops.linear_logprob_kl(hidden, ref, weight, TARGET, **options)
    options |= {"beta": 0.2, "old_logp": logp.detach() - 0.1}
    linear, m = ops.linear_policy_loss(
        hidden, weight, TARGET, ADVANTAGE, ref_hidden=ref, kl="exact", **options
    )
    del options["bias"]
    logits = hidden @ weight.T
    plain, m_2 = ops.policy_loss(logits, TARGET, ADVANTAGE, ref_logp=logp.detach(), **options)
    total = logp.sum() + 2 * entropy.sum() + 3 * kl.sum() + logp_2.mean() + 5 * linear + 7 * plain
    return total, m, m_2


def test_compiled_ops_are_the_eager_ones(impl):
    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True)
    results = []
    for function in (everything, compiled):
        given = leaves()
        total, *metrics = function(*given, impl)
        results.append((total.detach(), *torch.autograd.grad(total, given), *metrics))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
