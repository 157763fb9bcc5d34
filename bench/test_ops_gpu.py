"""The ops on a GPU beside what they replace: pytest bench/test_ops_gpu.py --benchmark-only --rows

As bench/test_ops.py, at the shapes of larger models, and beside torch.compile, TRL, liger-kernel
and Cut Cross-Entropy where they are installed. The floor is measured in the same process: a bare
product of the same shape for what multiplies, a copy for what moves.

Never run on a GPU so far.
"""

from __future__ import annotations

import functools

import pytest
import rivals
import torch
from caches import Step
from measure import Meter, Work, compare
from rivals import Head
from torch import Tensor

from meal_fast import ops
from meal_fast.ops import cuda_build

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# (sequences, length, width, vocabulary): SmolLM2-135M, and the shape that other libraries publish.
SHAPES = {"SmolLM2": (16, 512, 576, 49_152), "8B": (16, 512, 4096, 131_072)}


def head_of(shape: str) -> tuple[Head, float]:
    """The head, and the operations of one product with it."""
    b, t, d, v = SHAPES[shape]
    return Head(b, t, d, v, device="cuda", dtype=torch.bfloat16), 2.0 * b * t * d * v


def product_s(head: Head, meter: Meter) -> float:
    """The bare product, cut as a GPU likes it."""
    parts = head.hidden.detach().split(2048)
    return meter.median(lambda: [part @ head.weight.detach().T for part in parts])


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_logprob_forward(benchmark, shape):
    from meal_fast.kernels.linear_logprob import linear_logprob_forward

    head, flops = head_of(shape)
    given = (head.hidden.detach(), head.weight.detach(), head.target)

    def eager():
        log_p = (given[0] @ given[1].T).float().log_softmax(1)
        entropy = torch.special.entr(log_p.exp()).sum(1)
        return log_p.gather(1, given[2][:, None]).squeeze(1), entropy

    works: dict[str, Work] = {
        "meal-fast": lambda: ops.linear_logprob(*given, impl="triton"),
        "meal-fast, fused product": lambda: linear_logprob_forward(*given),
        "meal-fast, plain torch": lambda: ops.linear_logprob(*given, impl="torch"),
        "eager": eager,
        "torch.compile": torch.compile(eager),
    }
    compare(
        benchmark,
        "linear_logprob",
        f"forward, {shape}",
        works,
        device="cuda",
        floor=functools.partial(product_s, head),
        flops=flops,
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_linear_policy_loss(benchmark, shape):
    head, flops = head_of(shape)

    def both(f: rivals.Rival) -> None:
        torch.autograd.grad(f(head), head.leaves())

    found = {
        "meal-fast": rivals.meal_fast,
        "meal-fast, plain torch": functools.partial(rivals.meal_fast, impl="torch"),
        **rivals.installed(gpu=True),
    }
    works: dict[str, Work] = {name: functools.partial(both, f) for name, f in found.items()}
    compare(
        benchmark,
        "linear_policy_loss",
        f"loss and gradients, {shape}",
        works,
        device="cuda",
        floor=lambda meter: 3 * product_s(head, meter),
        flops=3 * flops,
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
def test_policy_loss_from_logits(benchmark, backward):
    n, v = 8192, 151_936
    torch.manual_seed(0)
    logits = torch.randn(n, v, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target, advantage = torch.randint(0, v, (n,), device="cuda"), torch.randn(n, device="cuda")

    def eager() -> Tensor:
        log_p = logits.float().log_softmax(1)
        logp = log_p.gather(1, target[:, None]).squeeze(1)
        entropy = torch.special.entr(log_p.detach().exp()).sum(1)
        return ops.policy_loss_from_logp(logp, advantage, entropy=entropy)[0]

    def ours(impl: str) -> Tensor:
        return ops.policy_loss(logits, target, advantage, impl=impl)[0]

    def run(f) -> None:
        if backward:
            torch.autograd.grad(f(), logits)
        else:
            f()

    given = {
        "meal-fast": functools.partial(ours, "triton"),
        "meal-fast, plain torch": functools.partial(ours, "torch"),
        "eager": eager,
        "torch.compile": torch.compile(eager),
    }
    works: dict[str, Work] = {name: functools.partial(run, f) for name, f in given.items()}
    reads_and_writes = 3 if backward else 1  # read; and read again, and the gradient written

    def copy(meter: Meter) -> float:  # one read and one write
        return meter.median(lambda: logits.detach().clone()) * reads_and_writes / 2

    case = f"{'loss and gradient' if backward else 'loss'} from logits, Qwen2"
    moved = 2.0 * n * v * reads_and_writes
    compare(benchmark, "policy_loss", case, works, device="cuda", floor=copy, moved=moved)


# Rows, prompts, tokens of a prompt, tokens of a row; heads of queries, of keys, and their width.
STEPS = {
    "Qwen2-0.5B, 256 rows of 32 prompts": (256, 32, 512, 256, (14, 2, 64)),
    "8B, 64 rows of 8 prompts": (64, 8, 2048, 256, (32, 8, 128)),
    "8B, 64 rows of 64 prompts": (64, 64, 2048, 256, (32, 8, 128)),
}


@pytest.mark.parametrize("name", STEPS)
def test_prefix_attention(benchmark, name):
    r, b, p, t, heads = STEPS[name]
    step = Step(torch.arange(r) % b, p, t, heads, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(step.ours("triton"), step.static(), rtol=2e-2, atol=2e-2)
    works: dict[str, Work] = {
        "meal-fast": functools.partial(step.ours, "triton"),
        "meal-fast, plain torch": functools.partial(step.ours, "torch"),
        "eager": step.grown,
        "eager, cache in place": step.static,
    }
    half = torch.empty(step.bytes // 2, dtype=torch.int8, device="cuda")

    def copy(meter: Meter) -> float:  # reads half of the bytes, and writes as many
        return meter.median(lambda: half.clone())

    case = f"{name}, {p} tokens shared and {t} of their own, a layer"
    compare(benchmark, "prefix_attention", case, works, device="cuda", floor=copy, moved=step.bytes)


@pytest.mark.parametrize(
    "truncation", [{}, {"top_k": 50}, {"top_p": 0.9}], ids=["all", "top_k", "top_p"]
)
def test_sample(benchmark, truncation):
    rows, v = 256, 151_936
    torch.manual_seed(0)
    logits, row = 3 * torch.randn(rows, v, device="cuda"), torch.arange(rows, device="cuda")

    def ours(impl: str):
        return ops.sample(logits, seed=0, row=row, position=row, impl=impl, **truncation)

    def eager():
        log_p = logits.log_softmax(1)
        token = torch.multinomial(log_p.exp(), 1)
        return token, log_p.gather(1, token)

    works: dict[str, Work] = {
        "meal-fast": functools.partial(ours, "triton"),
        "meal-fast, plain torch": functools.partial(ours, "torch"),
    }
    if cuda_build.nvcc() is not None:
        works["meal-fast, CUDA C++"] = functools.partial(ours, "cuda")
    if not truncation:
        works["eager"] = eager

    def read(meter: Meter) -> float:  # one read: half of a copy
        return meter.median(lambda: logits.clone()) / 2

    options = ", ".join(f"{name} {value}" for name, value in truncation.items())
    case = f"{rows} rows, {options or 'all tokens'}, Qwen2"
    compare(benchmark, "sample", case, works, device="cuda", floor=read, moved=4.0 * rows * v)
