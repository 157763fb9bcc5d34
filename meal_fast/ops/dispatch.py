"""Which implementation of an op runs: one decision, made from the tensors and the caller's `impl`.

    tensors          impl=None                     impl="triton"
    on CUDA          triton where it is installed  triton
    on the CPU       torch                         triton's interpreter, when TRITON_INTERPRET=1
    any is float64   torch                         ValueError: the kernels compute in float32

An op that csrc/ has too (`choose_with_cuda`) runs that on CUDA where nvcc is found to build it.

The kernels in `meal_fast.kernels` import triton, so they are imported where "triton" was chosen and
nowhere else: `import meal_fast.ops` needs torch alone.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

from . import checks, cuda_build


@functools.cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Say whether Triton interprets its kernels, on the CPU, instead of compiling them."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def triton_obstacle(tensor: Tensor, *others: Tensor | None) -> str | None:
    """Say why Triton cannot take these tensors, with the remedy; None when it can."""
    if any(t is not None and t.dtype == torch.float64 for t in (tensor, *others)):
        return "computes in float32; pass no float64, or use impl='torch'"
    if not triton_installed():
        return "needs the package triton; install it, or use impl='torch'"
    if tensor.device.type == "cpu" and not interpreted():
        return "needs a CUDA tensor, or TRITON_INTERPRET=1 set before Python starts"
    if tensor.device.type not in ("cpu", "cuda"):
        return f"does not run on {tensor.device.type}; use impl='torch'"
    return None


def choose(op: str, impl: str | None, tensor: Tensor, *others: Tensor | None) -> str:
    """Give the name, "torch" or "triton", of what `op` runs on these tensors, which share a device.

    Raises:
        ValueError: `impl` is no name, or cannot be met for these tensors.
    """
    obstacle = triton_obstacle(tensor, *others)
    if obstacle is None:
        available = ("triton", "torch") if tensor.device.type == "cuda" else ("torch", "triton")
        return checks.implementation(op, impl, available)
    if impl == "triton":
        raise ValueError(f"impl='triton': {op} in Triton {obstacle}")
    return checks.implementation(op, impl, ("torch",))


def cuda_obstacle(tensor: Tensor) -> str | None:
    """Say why what csrc/ has cannot take this tensor, with the remedy; None when it can."""
    if tensor.device.type != "cuda":
        return "needs a CUDA tensor"
    if torch.version.cuda is None:
        return "needs a torch built for CUDA"
    if tensor.dtype == torch.float64:
        return "computes in float32; pass no float64, or use impl='torch'"
    if cuda_build.nvcc() is None:
        return "needs nvcc, to be built; set CUDA_HOME, or use impl='triton'"
    return None


def choose_with_cuda(op: str, impl: str | None, tensor: Tensor) -> str:
    """Choose for an op that csrc/ has too: "cuda" is the default where it can be built."""
    if impl not in (None, "cuda"):
        return choose(op, impl, tensor)
    obstacle = cuda_obstacle(tensor)
    if obstacle is None:
        return "cuda"
    if impl == "cuda":
        raise ValueError(f"impl='cuda': {op} in CUDA C++ {obstacle}")
    return choose(op, None, tensor)
