"""What compute-sanitizer and ncu look at: a few kernels, run once, held to plain torch.

python -m tools.contact.targets [--device cpu] [--large] [--profile] NAME ...
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from meal_fast.kernels.cases import HEADS
from torch import Tensor

from bench.caches import Step
from meal_fast import ops
from meal_fast.ops import cuda_build, dispatch

Run = Callable[[str | None], Iterable[Tensor]]  # by implementation


def sample(device: str, large: bool) -> Run:
    rows, v = (256, HEADS["Qwen2-0.5B"][1]) if large else (3, 301)
    logits = 3 * torch.randn(rows, v, device=device)
    row = torch.arange(rows, device=device)
    return lambda impl: ops.sample(
        logits, seed=0, row=row, position=row, top_k=40, top_p=0.9, impl=impl
    )[1:]


def linear_policy_loss(device: str, large: bool) -> Run:
    n, (d, v) = (4096, HEADS["SmolLM2-135M"]) if large else (9, (32, 301))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(n, d, device=device, dtype=dtype, requires_grad=True)
    weight = (0.05 * torch.randn(v, d, device=device, dtype=dtype)).requires_grad_()
    target = torch.randint(0, v, (n,), device=device)
    advantage = torch.randn(n, device=device)

    def run(impl: str | None) -> Iterable[Tensor]:
        loss, _ = ops.linear_policy_loss(hidden, weight, target, advantage, impl=impl)
        return (loss, *torch.autograd.grad(loss, (hidden, weight)))

    return run


def prefix_attention(device: str, large: bool) -> Run:
    r, b, p, t, heads = (256, 32, 512, 256, (14, 2, 64)) if large else (5, 2, 19, 7, (4, 2, 16))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    step = Step(torch.arange(r) % b, p, t, heads, device=device, dtype=dtype)
    return lambda impl: (step.ours(impl),)


def linear_logprob(device: str, large: bool) -> Run:
    n, (d, v) = (4096, HEADS["SmolLM2-135M"]) if large else (9, (32, 301))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(n, d, device=device, dtype=dtype)
    weight = 0.05 * torch.randn(v, d, device=device, dtype=dtype)
    target = torch.randint(0, v, (n,), device=device)

    def run(impl: str | None) -> Iterable[Tensor]:
        if impl != "triton":
            return ops.linear_logprob(hidden, weight, target, impl=impl)
        from meal_fast.kernels.linear_logprob import linear_logprob_forward

        return linear_logprob_forward(hidden, weight, target)

    return run


TARGETS: dict[str, Callable[[str, bool], Run]] = {
    "sample": sample,
    "linear_policy_loss": linear_policy_loss,
    "prefix_attention": prefix_attention,
    "linear_logprob": linear_logprob,
}


def implementation(name: str, device: str) -> str:
    """csrc for the sampler where it can be built, and Triton, where it compiles or is interpreted.

    On a CPU where neither is: plain torch, which leaves nothing to look at.
    """
    if name == "sample" and device == "cuda" and cuda_build.nvcc() is not None:
        return "cuda"
    obstacle = dispatch.triton_obstacle(torch.empty(0, device=device))
    return "triton" if obstacle is None else "torch"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.contact.targets", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("names", nargs="+", choices=tuple(TARGETS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--large", action="store_true", help="enough to fill a card")
    parser.add_argument("--profile", action="store_true", help="tell ncu where to look")
    args = parser.parse_args()
    torch.manual_seed(0)
    for name in args.names:
        run, impl = TARGETS[name](args.device, args.large), implementation(name, args.device)
        want: Any = run("torch")
        run(impl)  # compiles
        if args.profile:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        got = run(impl)
        if args.profile:
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=3e-2, atol=3e-2)
        print(f"{name} ran as {impl}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
