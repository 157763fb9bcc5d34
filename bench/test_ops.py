"""The ops beside eager torch, on the shapes of SmolLM2-135M: pytest bench/ --benchmark-only

Each case times the op with pytest-benchmark and, alternating with it, the eager code that it
replaces. `extra_info` has the eager time, the ratio of the two (below 1: the op is faster), the
bare matrix products of the same work as a floor, and how far each raised the process's peak memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from meal_fast import ops

N, D, V = 1024, 576, 49152  # tokens of a micro-batch, width and vocabulary of SmolLM2-135M
ROUNDS = 3


def seconds(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def status_mib(field: str) -> float:
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) / 1024


def peak_mib(f: Callable[[], object]) -> float:
    """How far `f` raises the resident set at its highest. Linux only."""
    before = status_mib("VmRSS")
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # the high-water mark starts again from here
    f()
    return status_mib("VmHWM") - before


def compare(benchmark, op: Callable[[], object], eager: Callable[[], object], products: int):
    """Time `op` and `eager` in turns, after one run of each for its peak memory."""
    info = {"peak_mib": round(peak_mib(op)), "eager_peak_mib": round(peak_mib(eager))}
    op_s, eager_s = [], []
    benchmark.pedantic(
        lambda: op_s.append(seconds(op)),
        setup=lambda: eager_s.append(seconds(eager)),
        rounds=ROUNDS,
    )
    info |= {
        "eager_s": round(statistics.median(eager_s), 4),
        "ratio": round(statistics.median(o / e for o, e in zip(op_s, eager_s, strict=True)), 3),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if products:
        a, w, out = torch.randn(N, D), torch.randn(V, D), torch.empty(N, V)
        floor = min(seconds(lambda: torch.mm(a, w.t(), out=out)) for _ in range(ROUNDS))
        info["products_s"] = round(products * floor, 4)
    benchmark.extra_info |= info


class Head:
    """A head, hidden states of policy and reference, and what the loss needs of the tokens."""

    def __init__(self, frozen: bool) -> None:
        torch.manual_seed(0)
        self.weight = (0.05 * torch.randn(V, D)).requires_grad_(not frozen)
        self.hidden = torch.randn(N, D, requires_grad=True)
        self.ref_hidden = self.hidden.detach() + 0.05 * torch.randn(N, D)
        self.target = torch.randint(0, V, (N,))
        self.advantage = torch.randn(N)

    def log_p(self, hidden: Tensor) -> Tensor:
        return (hidden @ self.weight.T).log_softmax(1)

    def picked(self, log_p: Tensor) -> Tensor:
        return log_p.gather(1, self.target[:, None]).squeeze(1)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("kl", ["none", "k3", "exact"])
def test_linear_policy_loss(benchmark, frozen, kl):
    head = Head(frozen)
    beta = 0.0 if kl == "none" else 0.1
    name = "k3" if kl == "none" else kl
    reference = {} if kl == "none" else {"ref_hidden": head.ref_hidden}

    def op():
        loss, _ = ops.linear_policy_loss(
            head.hidden, head.weight, head.target, head.advantage, beta=beta, kl=name, **reference
        )
        loss.backward()

    def eager():
        log_p = head.log_p(head.hidden)
        given = {}
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p).sum(1)
            log_q = head.log_p(head.ref_hidden) if reference else None
        if log_q is not None:
            given["ref_logp"] = head.picked(log_q)
            if kl == "exact":
                given["token_kl"] = (log_p.exp() * (log_p - log_q)).sum(1)
        loss, _ = ops.policy_loss_from_logp(
            head.picked(log_p), head.advantage, entropy=entropy, beta=beta, kl=name, **given
        )
        loss.backward()

    compare(benchmark, op, eager, products=3 - frozen + (kl != "none"))


def test_linear_logprob(benchmark):
    head = Head(frozen=True)

    def op():
        logp, entropy = ops.linear_logprob(head.hidden, head.weight, head.target)
        (logp + entropy).sum().backward()

    def eager():
        log_p = head.log_p(head.hidden)
        (head.picked(log_p) - (log_p.exp() * log_p).sum(1)).sum().backward()

    compare(benchmark, op, eager, products=3)  # the logits are made again on the way back


def test_policy_loss(benchmark):
    head = Head(frozen=True)
    logits = (head.hidden @ head.weight.T).detach().requires_grad_()

    def op():
        ops.policy_loss(logits, head.target, head.advantage)[0].backward()
        logits.grad = None

    def eager():
        log_p = logits.log_softmax(1)
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p).sum(1)
        loss, _ = ops.policy_loss_from_logp(head.picked(log_p), head.advantage, entropy=entropy)
        loss.backward()
        logits.grad = None

    compare(benchmark, op, eager, products=0)


@pytest.mark.parametrize(
    "truncation", [{}, {"top_k": 50}, {"top_p": 0.9}], ids=["all", "top_k", "top_p"]
)
def test_sample(benchmark, truncation):
    torch.manual_seed(0)
    logits, row = 3 * torch.randn(64, V), torch.arange(64)

    def op():
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

    compare(benchmark, op, eager, products=0)


def test_group_advantages(benchmark):
    torch.manual_seed(0)
    rewards, weights = torch.randn(512, 2), torch.rand(512, 2).softmax(1)
    group, utopia = torch.arange(64).repeat_interleave(8), torch.tensor([4.0, 4.0])

    def op():
        return ops.group_advantages(rewards, weights, group, utopia=utopia)

    def eager():  # of even groups, unchecked
        score = -0.1 * (weights * (utopia - rewards) / 0.1).logsumexp(1)
        grid = score.view(64, 8)
        return (grid - grid.mean(1, keepdim=True)) / (grid.std(1, keepdim=True) + 1e-4)

    torch.testing.assert_close(op()[1], eager().flatten(), rtol=1e-3, atol=1e-3)
    compare(benchmark, op, eager, products=0)
