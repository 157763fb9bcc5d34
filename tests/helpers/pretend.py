"""A pretended CUDA device: values on the CPU, the rules of a device; what it would cost is counted.

    with pretend.device() as cuda:                      # or device(kernels="interpreted")
        policy = load_policy(PolicyConfig(..., device="cuda"), names)
        ...                                             # tensors say cuda:0
        cuda.reset()                                    # counts from here
        engine.generate(...)
    cuda.launches     Counter: op or kernel -> launches; a replayed graph is one launch, "graph"
    cuda.syncs        Counter: kind -> how often the host waited for the device
    cuda.where        Counter: ("launch" or "sync", name, file:line of ours) -> times
    cuda.graphs       captured graphs; graphs[-1].launches: Counter of what its capture launched
    with cuda.paused(): ...                             # counts nothing in here

It raises what CUDA would: a `RuntimeError` where an op's tensors are on two devices, and where a
captured step makes the host wait. A captured graph is replayed from what was recorded, on the
memory it was captured on, so a Python value that the capture baked in is baked in here too.

What counts as a wait: `item`, `tolist`, `cpu`, copies between host and device (but from or to
pinned memory with non_blocking), ops whose result's size hangs on values (`nonzero`, an index by a
bool mask, `unique`, …), and an event, stream or device that is synchronised. A launch is an op that
is neither a view nor an allocation: the real number of kernels of a library call may differ.

The ops' kernels, by `kernels`: "torch" runs the torch implementations; those that a captured step
holds count as their kernels' launches. "interpreted" launches the Triton kernels, in Triton's
interpreter. "counted" launches them without running them: counts are right, values are not.

Everything patched is put back at the end. The rules themselves are in pretend_rules.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves, tree_map

from tests.helpers import pretend_rules as rules
from tests.helpers.pretend_rules import (
    Cuda,
    CudaTensor,
    Graph,
    Mode,
    Stream,
    at,
    capture,
    destination,
    inner,
)

# Ops that run as these kernels of ours: (module, function in torch) -> what it launches.
STAND_INS = {
    ("meal_fast.ops.prefix_attention", "_in_torch"): ("_prefix_kernel", "_tail_kernel"),
    ("meal_fast.ops.sampling", "_sample"): ("sample_kernel",),
    ("torch.nn.functional", "rms_norm"): ("_fused_rms_norm",),  # torch's own; without a gradient
}


def _stand_in(real: Callable[..., Any], kernels: tuple[str, ...]) -> Callable[..., Any]:
    """An op of ours in torch, on the values: it counts as its kernels."""

    def run_as_kernels(*args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(t, CudaTensor) for t in tree_leaves((args, kwargs))):
            return real(*args, **kwargs)
        for kernel in kernels:
            rules.NOW.launch(kernel)
        a, k = tree_map(_inside, (args, kwargs))
        out = real(*a, **k)
        if rules.NOW.capturing is not None:
            again = lambda: real(*tree_map(_inside, a), **k)  # noqa: E731
            rules.NOW.capturing.calls.append((again, (), {}, out))
        return tree_map(CudaTensor, out)

    return run_as_kernels


def _inside(x: Any) -> Any:
    """`inner`, of the tensors in a dataclass too; it then has forgotten what it had worked out."""
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return type(x)(*(inner(getattr(x, f.name)) for f in dataclasses.fields(x)))
    return inner(x)


def _launcher(real: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel[grid](...)` of Triton's interpreter."""

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        for x in (*args, *kwargs.values()):
            if isinstance(x, torch.Tensor) and not isinstance(x, CudaTensor) and x.dim():
                raise RuntimeError(f"Pointer argument (cpu tensor?) of {self.fn.__name__} {at()}")
        rules.NOW.launch(self.fn.__name__)
        if rules.NOW.kernels == "counted":
            return
        a, k = tree_map(inner, (args, kwargs))
        real(self, *a, **k)
        if rules.NOW.capturing is not None:
            rules.NOW.capturing.calls.append((lambda: real(self, *a, **k), (), {}, None))

    return launch


def _module_to(real: Callable[..., Any]) -> Callable[..., Any]:
    """`nn.Module.to`: shared parameters stay shared."""

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        (device, dtype), _ = destination(args, dict(kwargs))
        if device is None or device.type != "cuda":
            return real(self, *args, **kwargs)
        moved: dict[int, Any] = {}

        def on_cuda(t: torch.Tensor) -> torch.Tensor:
            if id(t) not in moved:
                copied = t.detach().to(
                    device, dtype if dtype and t.is_floating_point() else t.dtype
                )
                if isinstance(t, nn.Parameter):
                    copied = nn.Parameter(copied, requires_grad=t.requires_grad)
                moved[id(t)] = copied
            return moved[id(t)]

        for module in self.modules():
            for held in (module._parameters, module._buffers):
                held.update({n: on_cuda(t) for n, t in held.items() if t is not None})
        return self

    return to


def _made(real: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.tensor` and `torch.as_tensor`: made on the host, then copied."""

    def make(data: Any, dtype: Any = None, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if isinstance(data, torch.Tensor) and real.__name__ == "as_tensor":
            return data.to(device=device or data.device, dtype=dtype or data.dtype)
        made = real(data, dtype=dtype, **kwargs)
        return made if device is None else made.to(device)

    return make


def _plain_to(real: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.to` of one on the CPU, to where another tensor is."""

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        (device, dtype), rest = destination(args, dict(kwargs))
        return real(self, device=device, dtype=dtype or self.dtype, **rest)

    return to


@contextlib.contextmanager
def device(kernels: str = "torch") -> Iterator[Cuda]:
    """Within it there is a CUDA device, cuda:0; see the head of this file."""
    if kernels not in ("torch", "interpreted", "counted"):
        raise ValueError(f"kernels={kernels!r}: torch, interpreted or counted")
    from triton.runtime.interpreter import GridExecutor

    from meal_fast.ops import checks
    from meal_fast.rollout import reward_worker

    properties = types.SimpleNamespace(
        multi_processor_count=132, major=9, minor=0, name="pretended", total_memory=80 << 30
    )
    implementation, scores = checks.implementation, reward_worker._scores

    def choose(op: str, impl: str | None, available: tuple[str, ...] = ("torch",)) -> str:
        if impl is None and rules.NOW.kernels == "torch":
            return "torch"
        return implementation(op, impl, available)

    def in_a_thread(*args: Any) -> Any:  # modes are a thread's own
        with Mode():
            return scores(*args)

    there = {
        "is_available": lambda: True, "_lazy_init": lambda: None, "device_count": lambda: 1,
        "current_device": lambda: 0, "set_device": lambda _: None,
        "device": contextlib.nullcontext, "device_of": contextlib.nullcontext,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (9, 0),
        "get_rng_state": lambda *_: torch.get_rng_state(), "set_rng_state": lambda *_: None,
        "mem_get_info": lambda *_: (8 << 30, 80 << 30), "memory_reserved": lambda *_: 0,
        "memory_allocated": lambda *_: 0, "max_memory_allocated": lambda *_: 0,
        "Stream": Stream, "Event": Stream, "current_stream": Stream,
        "stream": contextlib.nullcontext, "synchronize": lambda *_: rules.NOW.sync("synchronize"),
        "CUDAGraph": Graph, "graph": capture, "graph_pool_handle": lambda: (0, 0),
        "is_current_stream_capturing": lambda: rules.NOW.capturing is not None,
    }  # fmt: skip
    patches: list[tuple[Any, str, Any]] = [
        *((torch.cuda, name, value) for name, value in there.items()),
        (torch, "tensor", _made(torch.tensor)),
        (torch, "as_tensor", _made(torch.as_tensor)),
        (torch.Tensor, "to", _plain_to(torch.Tensor.to)),
        (nn.Module, "to", _module_to(nn.Module.to)),
        (GridExecutor, "__call__", _launcher(GridExecutor.__call__)),
        (checks, "implementation", choose),
        (reward_worker, "_scores", in_a_thread),
    ]
    for (module, name), launched in STAND_INS.items():
        holder = sys.modules[module]
        patches.append((holder, name, _stand_in(getattr(holder, name), launched)))
    _device_constructors()  # remembers torch.tensor for good: the real one
    before, rules.NOW = rules.NOW, Cuda(kernels)
    try:
        with contextlib.ExitStack() as stack:
            for holder, name, value in patches:
                stack.enter_context(mock.patch.object(holder, name, value))
            stack.enter_context(Mode())
            yield rules.NOW
    finally:
        rules.NOW = before
