"""What the ops are measured on at the heads of larger models, beside what they replace.

Each case is built when it is asked for, so that its tensors die with it. bench/test_ops_gpu.py
times them on a card with pytest-benchmark; tools/first_contact.py as a share of the card's
ceilings, and in its rehearsal on a CPU at tiny sizes, with Triton interpreted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from meal_fast.kernels.cases import HEADS
from torch import Tensor

from bench import rivals
from bench.caches import Step
from bench.measure import Meter, Work
from bench.rivals import Head
from meal_fast import ops
from meal_fast.ops import dispatch


@dataclass(frozen=True)
class OpCase:
    """One op on one input: works[“meal-fast”] is ours, the others are what it is held to."""

    op: str
    case: str
    works: dict[str, Work]
    floor: Callable[[Meter], float]  # seconds that no implementation can do without, measured
    flops: float = 0.0  # of matrix products
    moved: float = 0.0  # bytes to and from memory


# For each shape anew: from the second on it would take the sizes for variable ones.
COMPILE = functools.partial(torch.compile, dynamic=False)


@dataclass(frozen=True)
class Sizes:
    """How large the cases are, where they run, and what compiles the rivals."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    sequences: int = 16
    length: int = 512
    logit_rows: int = 8192
    sampled_rows: int = 256
    groups: int = 64
    heads: dict[str, tuple[int, int]] | None = None  # name -> width, vocabulary; None: HEADS
    compile: Callable[..., Any] = COMPILE
    peers: bool = True  # TRL, liger-kernel and Cut Cross-Entropy, where they are installed

    def shapes(self) -> dict[str, tuple[int, int]]:
        return HEADS if self.heads is None else self.heads

    def impls(self) -> list[str]:
        """Ours first: Triton where it compiles or is interpreted, then plain torch."""
        like = torch.empty(0, device=self.device)
        return ["triton", "torch"] if dispatch.triton_obstacle(like) is None else ["torch"]


TINY = Sizes("cpu", torch.float32, 2, 8, 16, 2, 2, {"toy": (32, 300)}, peers=False,
             compile=functools.partial(torch.compile, backend="aot_eager"))  # fmt: skip
COMPILED = ("torch.compile", "liger", "trl chunked")  # these take long to start
NAMES = {"triton": "meal-fast", "torch": "meal-fast, plain torch"}
# Rows, prompts, tokens of a prompt, tokens of a row; heads of queries, of keys, and their width.
STEPS = {
    "SmolLM2-135M, 256 rows of 32 prompts": (256, 32, 512, 256, (9, 3, 64)),
    "Qwen2-0.5B, 256 rows of 32 prompts": (256, 32, 512, 256, (14, 2, 64)),
    "Llama-3-8B, 64 rows of 8 prompts": (64, 8, 2048, 256, (32, 8, 128)),
    "Llama-3-8B, 64 rows of 64 prompts": (64, 64, 2048, 256, (32, 8, 128)),
}
TINY_STEPS = {"toy, 4 rows of 2 prompts": (4, 2, 9, 3, (4, 2, 16))}
TRUNCATIONS: tuple[dict[str, float], ...] = ({}, {"top_k": 50}, {"top_p": 0.9})


def named(sizes: Sizes, work: Callable[[str], Work]) -> dict[str, Work]:
    """Our own implementations, the first as `meal-fast`."""
    impls = sizes.impls()
    return {NAMES[impl] if len(impls) > 1 else NAMES["triton"]: work(impl) for impl in impls}


def build(sizes: Sizes) -> dict[str, Callable[[], OpCase]]:
    """The cases by name, in the order in which they matter."""
    made: dict[str, Callable[[], OpCase]] = {}
    for shape in sizes.shapes():
        made[f"linear_logprob, forward, {shape}"] = functools.partial(logprob, sizes, shape)
        made[f"linear_policy_loss, {shape}"] = functools.partial(policy_loss, sizes, shape)
    for step in STEPS if sizes.heads is None else TINY_STEPS:
        made[f"prefix_attention, {step}"] = functools.partial(attention, sizes, step)
    for shape in sizes.shapes():
        made[f"policy_loss from logits, {shape}"] = functools.partial(from_logits, sizes, shape)
    for shape in sizes.shapes():
        for t in TRUNCATIONS:
            name = f"sample, {truncated(t)}, {shape}"
            made[name] = functools.partial(sample, sizes, shape, t)
    made["group_advantages"] = functools.partial(advantages, sizes)
    return made


def head_of(sizes: Sizes, shape: str) -> tuple[Head, float, float]:
    """The head, the operations of one product with it, and the bytes of its inputs."""
    d, v = sizes.shapes()[shape]
    head = Head(sizes.sequences, sizes.length, d, v, device=sizes.device, dtype=sizes.dtype)
    n = sizes.sequences * sizes.length
    return head, 2.0 * n * d * v, head.hidden.element_size() * (n + v) * d


def product_s(head: Head, meter: Meter) -> float:
    """The bare product, cut as a GPU likes it."""
    parts = head.hidden.detach().split(2048)
    return meter.median(lambda: [part @ head.weight.detach().T for part in parts])


def logprob(sizes: Sizes, shape: str) -> OpCase:
    head, flops, moved = head_of(sizes, shape)
    given = (head.hidden.detach(), head.weight.detach(), head.target)

    def eager() -> tuple[Tensor, Tensor]:
        log_p = (given[0] @ given[1].T).float().log_softmax(1)
        entropy = torch.special.entr(log_p.exp()).sum(1)
        return log_p.gather(1, given[2][:, None]).squeeze(1), entropy

    def fused() -> object:
        from meal_fast.kernels.linear_logprob import linear_logprob_forward

        return linear_logprob_forward(*given)

    works = named(sizes, lambda impl: functools.partial(ops.linear_logprob, *given, impl=impl))
    if "triton" in sizes.impls():
        works["meal-fast, fused product"] = fused
    works |= {"eager": eager, "torch.compile": sizes.compile(eager)}
    floor = functools.partial(product_s, head)
    return OpCase("linear_logprob", f"forward, {shape}", works, floor, flops, moved)


def policy_loss(sizes: Sizes, shape: str) -> OpCase:
    """The loss and its gradients: three products, and the head's gradient written."""
    head, flops, moved = head_of(sizes, shape)

    def both(f: rivals.Rival) -> None:
        torch.autograd.grad(f(head), head.leaves())

    found = named(sizes, lambda impl: functools.partial(rivals.meal_fast, impl=impl))
    if sizes.peers:
        found |= rivals.installed(gpu=sizes.device == "cuda")
    found |= {"eager": rivals.eager, "torch.compile": sizes.compile(rivals.eager)}
    works: dict[str, Work] = {name: functools.partial(both, f) for name, f in found.items()}
    case = f"loss and gradients, {shape}"
    return OpCase(
        "linear_policy_loss",
        case,
        works,
        lambda meter: 3 * product_s(head, meter),
        3 * flops,
        2 * moved,
    )


def from_logits(sizes: Sizes, shape: str) -> OpCase:
    n, v = sizes.logit_rows, sizes.shapes()[shape][1]
    torch.manual_seed(0)
    logits = torch.randn(n, v, device=sizes.device, dtype=sizes.dtype, requires_grad=True)
    target = torch.randint(0, v, (n,), device=sizes.device)
    advantage = torch.randn(n, device=sizes.device)

    def eager() -> Tensor:
        log_p = logits.float().log_softmax(1)
        logp = log_p.gather(1, target[:, None]).squeeze(1)
        entropy = torch.special.entr(log_p.detach().exp()).sum(1)
        return ops.policy_loss_from_logp(logp, advantage, entropy=entropy)[0]

    def ours(impl: str) -> Tensor:
        return ops.policy_loss(logits, target, advantage, impl=impl)[0]

    def both(f: Callable[[], Tensor]) -> None:
        torch.autograd.grad(f(), logits)

    found = named(sizes, lambda impl: functools.partial(ours, impl))
    found |= {"eager": eager, "torch.compile": sizes.compile(eager)}
    works: dict[str, Work] = {name: functools.partial(both, f) for name, f in found.items()}

    def copy(meter: Meter) -> float:  # read; and read again, and the gradient written
        return 1.5 * meter.median(lambda: logits.detach().clone())

    moved = 3.0 * logits.element_size() * n * v
    case = f"loss and gradient from logits, {shape}"
    return OpCase("policy_loss", case, works, copy, moved=moved)


def attention(sizes: Sizes, name: str) -> OpCase:
    r, b, p, t, heads = (STEPS | TINY_STEPS)[name]
    step = Step(torch.arange(r) % b, p, t, heads, device=sizes.device, dtype=sizes.dtype)
    works = named(sizes, lambda impl: functools.partial(step.ours, impl))
    works |= {"eager": step.grown, "eager, cache in place": step.static}
    tolerance = 2e-2 if sizes.dtype == torch.bfloat16 else 1e-4
    for impl in sizes.impls():
        torch.testing.assert_close(step.ours(impl), step.static(), rtol=tolerance, atol=tolerance)
    half = torch.empty(step.bytes // 2, dtype=torch.int8, device=sizes.device)

    def copy(meter: Meter) -> float:  # reads half of the bytes, and writes as many
        return meter.median(lambda: half.clone())

    case = f"{name}, {p} tokens shared and {t} of their own, a layer"
    return OpCase("prefix_attention", case, works, copy, moved=step.bytes)


def truncated(by: dict[str, float]) -> str:
    return ", ".join(f"{name} {value}" for name, value in by.items()) or "all tokens"


def sample(sizes: Sizes, shape: str, truncation: dict[str, Any]) -> OpCase:
    rows, v = sizes.sampled_rows, sizes.shapes()[shape][1]
    torch.manual_seed(0)
    logits = 3 * torch.randn(rows, v, device=sizes.device)
    row = torch.arange(rows, device=sizes.device)

    def ours(impl: str) -> object:
        return ops.sample(logits, seed=0, row=row, position=row, impl=impl, **truncation)

    def eager() -> tuple[Tensor, Tensor]:
        log_p = logits.log_softmax(1)
        token = torch.multinomial(log_p.exp(), 1)
        return token, log_p.gather(1, token)

    works = named(sizes, lambda impl: functools.partial(ours, impl))
    if dispatch.cuda_obstacle(logits) is None:
        works["meal-fast, CUDA C++"] = functools.partial(ours, "cuda")
    if not truncation:
        works["eager"] = eager

    def read(meter: Meter) -> float:  # one read: half of a copy
        return meter.median(lambda: logits.clone()) / 2

    case = f"{rows} rows, {truncated(truncation)}, {shape}"
    return OpCase("sample", case, works, read, moved=4.0 * rows * v)


def advantages(sizes: Sizes) -> OpCase:
    """Its work is next to nothing: what counts is how often it launches."""
    torch.manual_seed(0)
    groups, device = sizes.groups, sizes.device
    rewards = torch.randn(8 * groups, 2, device=device)
    weights = torch.rand(8 * groups, 2, device=device).softmax(1)
    offsets = torch.arange(0, 8 * groups + 1, 8, device=device)
    utopia = torch.full((2,), 4.0, device=device)

    def ours(impl: str) -> tuple[Tensor, Tensor]:
        return ops.group_advantages(rewards, weights, offsets=offsets, utopia=utopia, impl=impl)

    def eager() -> Tensor:  # of even groups, unchecked
        score = -0.1 * (weights * (utopia - rewards) / 0.1).logsumexp(1)
        grid = score.view(groups, 8)
        return (grid - grid.mean(1, keepdim=True)) / (grid.std(1, keepdim=True) + 1e-4)

    for impl in sizes.impls():
        torch.testing.assert_close(ours(impl)[1], eager().flatten(), rtol=1e-3, atol=1e-3)
    works = named(sizes, lambda impl: functools.partial(ours, impl))
    works |= {"eager": eager, "torch.compile": sizes.compile(eager)}
    x = torch.zeros(1, device=device)

    def launch(meter: Meter) -> float:
        return meter.median(lambda: x.add_(1))

    moved = 4.0 * len(rewards) * 6
    return OpCase(
        "group_advantages", f"{groups} groups of 8, 2 objectives", works, launch, moved=moved
    )
