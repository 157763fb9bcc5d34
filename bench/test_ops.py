"""The ops beside what they replace, on the shapes of SmolLM2-135M: pytest bench/ --benchmark-only

Each case times the op with pytest-benchmark and, in turns with it, its rivals: eager torch, and for
the loss also TRL and liger-kernel where they are installed. `extra_info` has the medians, how far
each raised the process's peak memory, and the rate of the matrix products that the op must do.
With `--rows` it is appended to bench/results/, from which `make bench-table` makes the README's.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from bench import rivals
from bench.caches import Step
from bench.measure import Work, compare
from bench.rivals import Head
from meal_fast import ops

D, V = 576, 49152  # width and vocabulary of SmolLM2-135M


def same_gradients(head: Head, given: dict[str, rivals.Rival]) -> None:
    want = torch.autograd.grad(given["eager"](head), head.leaves())
    for name, f in given.items():
        got = torch.autograd.grad(f(head), head.leaves())
        for g, w in zip(got, want, strict=True):
            error = float((g - w).norm() / w.norm())
            assert error < 1e-4, f"{name}: another gradient, by {error:.1e}"


@pytest.mark.parametrize("head_is", ["frozen", "trained"])
def test_grpo_loss_and_gradients(benchmark, head_is):
    head = Head(16, 256, D, V, frozen=head_is == "frozen")
    given = {"meal-fast": rivals.meal_fast} | rivals.installed(gpu=False)
    same_gradients(head, given)

    def both(f: rivals.Rival) -> None:
        torch.autograd.grad(f(head), head.leaves())

    works: dict[str, Work] = {key: functools.partial(both, f) for key, f in given.items()}
    products = 2 if head_is == "frozen" else 3
    case = f"loss and gradients, 4,096 tokens, {head_is} head"
    flops = products * 2.0 * 4096 * D * V
    compare(benchmark, "linear_policy_loss", case, works, flops=flops)


@pytest.mark.parametrize("head_is", ["frozen", "trained"])
@pytest.mark.parametrize("kl", ["k3", "exact"])
def test_loss_with_a_reference(benchmark, head_is, kl):
    head = Head(8, 128, D, V, frozen=head_is == "frozen")
    ref_hidden = head.hidden.detach() + 0.05 * torch.randn_like(head.hidden)

    def ours():
        loss, _ = ops.linear_policy_loss(
            head.hidden,
            head.weight,
            head.target,
            head.advantage,
            beta=0.1,
            kl=kl,
            ref_hidden=ref_hidden,
        )
        torch.autograd.grad(loss, head.leaves())

    def eager():
        log_p = log_softmax(head.hidden, head.weight)
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p).sum(1)
            log_q = log_softmax(ref_hidden, head.weight)
        token_kl = (log_p.exp() * (log_p - log_q)).sum(1) if kl == "exact" else None
        loss, _ = ops.policy_loss_from_logp(
            picked(log_p, head.target),
            head.advantage,
            entropy=entropy,
            beta=0.1,
            kl=kl,
            ref_logp=picked(log_q, head.target),
            token_kl=token_kl,
        )
        torch.autograd.grad(loss, head.leaves())

    products = 3 if head_is == "frozen" else 4
    case = f"{kl} KL to a reference, 1,024 tokens, {head_is} head"
    given = {"meal-fast": ours, "eager": eager}
    flops = products * 2.0 * 1024 * D * V
    compare(benchmark, "linear_policy_loss", case, given, flops=flops)


def log_softmax(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden @ weight.T).log_softmax(1)


def picked(log_p: Tensor, target: Tensor) -> Tensor:
    return log_p.gather(1, target[:, None]).squeeze(1)


def test_linear_logprob(benchmark):
    head = Head(8, 128, D, V, frozen=True)

    def ours():
        logp, entropy = ops.linear_logprob(head.hidden, head.weight, head.target)
        torch.autograd.grad((logp + entropy).sum(), head.leaves())

    def eager():
        log_p = log_softmax(head.hidden, head.weight)
        entropy = -(log_p.exp() * log_p).sum(1)
        torch.autograd.grad((picked(log_p, head.target) + entropy).sum(), head.leaves())

    given = {"meal-fast": ours, "eager": eager}
    case = "with its gradient, 1,024 tokens, frozen head"
    # The logits are made again on the way back.
    compare(benchmark, "linear_logprob", case, given, flops=3 * 2.0 * 1024 * D * V)


def test_policy_loss(benchmark):
    head = Head(8, 128, D, V)
    logits = (head.hidden @ head.weight.T).detach().requires_grad_()

    def ours():
        loss, _ = ops.policy_loss(logits, head.target, head.advantage)
        torch.autograd.grad(loss, logits)

    def eager():
        log_p = logits.log_softmax(1)
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p).sum(1)
        loss, _ = ops.policy_loss_from_logp(
            picked(log_p, head.target), head.advantage, entropy=entropy
        )
        torch.autograd.grad(loss, logits)

    case = "loss and gradient from logits, 1,024 tokens"
    compare(benchmark, "policy_loss", case, {"meal-fast": ours, "eager": eager})


@pytest.mark.parametrize(
    "truncation", [{}, {"top_k": 50}, {"top_p": 0.9}], ids=["all", "top_k", "top_p"]
)
def test_sample(benchmark, truncation):
    torch.manual_seed(0)
    logits, row = 3 * torch.randn(64, V), torch.arange(64)

    def ours():
        return ops.sample(logits, seed=0, row=row, position=0, **truncation)

    def eager():
        log_p = logits.log_softmax(1)
        kept = log_p
        if "top_k" in truncation:
            least = log_p.topk(truncation["top_k"], 1).values[:, -1:]
            kept = log_p.masked_fill(log_p < least, -torch.inf)
        if "top_p" in truncation:
            ordered, order = log_p.sort(dim=1, descending=True)
            p = ordered.exp()
            out = p.cumsum(1) - p >= truncation["top_p"]
            kept = log_p.masked_fill(torch.zeros_like(out).scatter(1, order, out), -torch.inf)
        token = torch.multinomial(kept.softmax(1), 1)
        return token, log_p.gather(1, token)

    options = ", ".join(f"{name} {value}" for name, value in truncation.items())
    case = f"64 rows, {options or 'all tokens'}"
    compare(benchmark, "sample", case, {"meal-fast": ours, "eager": eager})


def test_group_advantages(benchmark):
    torch.manual_seed(0)
    rewards, weights = torch.randn(512, 2), torch.rand(512, 2).softmax(1)
    group, utopia = torch.arange(64).repeat_interleave(8), torch.tensor([4.0, 4.0])

    def ours():
        return ops.group_advantages(rewards, weights, group, utopia=utopia)

    def eager():  # of even groups, unchecked
        score = -0.1 * (weights * (utopia - rewards) / 0.1).logsumexp(1)
        grid = score.view(64, 8)
        return (grid - grid.mean(1, keepdim=True)) / (grid.std(1, keepdim=True) + 1e-4)

    torch.testing.assert_close(ours()[1], eager().flatten(), rtol=1e-3, atol=1e-3)
    case = "64 groups of 8, 2 objectives; eager checks nothing"
    compare(benchmark, "group_advantages", case, {"meal-fast": ours, "eager": eager})


LAYERS = 8  # each with caches of its own: no processor cache holds them all
# Which prompt each of 64 rows is behind.
GROUPS = {
    "8 prompts of 8 rows": torch.arange(8).repeat_interleave(8),
    "8 prompts of 1 to 15 rows": torch.arange(8).repeat_interleave(torch.arange(1, 17, 2)),
    "64 prompts of 1 row": torch.arange(64),
}


@pytest.mark.parametrize(
    ("groups", "t"), [(0, 1), (0, 64), (1, 32), (2, 32)], ids=["even", "long", "uneven", "single"]
)
def test_prefix_attention(benchmark, groups, t):
    name, group = list(GROUPS.items())[groups]
    steps = [Step(group, 200, t, (9, 3, 64)) for _ in range(LAYERS)]
    given: dict[str, Work] = {
        "meal-fast": lambda: [step.ours() for step in steps],
        "eager": lambda: [step.grown() for step in steps],
        "eager, cache in place": lambda: [step.static() for step in steps],
    }
    for f in (steps[0].grown, steps[0].static):
        torch.testing.assert_close(steps[0].ours(), f(), rtol=1e-5, atol=1e-5)
    case = f"{name}, 200 tokens shared and {t} of their own, {LAYERS} layers"
    flops = LAYERS * 4.0 * 64 * 9 * 64 * (200 + t)
    compare(benchmark, "prefix_attention", case, given, flops=flops)
