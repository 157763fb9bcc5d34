"""Kernels with the faults that `tools.sass` must find. Compiled by tests/ops/test_compile.py."""

import triton
import triton.language as tl
from meal_fast.kernels.cases import Case


@triton.jit
def _spilling(x, y, SIZE: tl.constexpr):
    """Holds the whole of x: with one warp, 512 registers a thread."""
    at = tl.arange(0, SIZE)
    value = tl.load(x + at)
    tl.store(y + at, value - tl.sum(value, 0))


@triton.jit
def _no_tensor_core(x, y, SIZE: tl.constexpr):
    """A float32 product with all its digits goes through the ordinary multipliers."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tile = tl.load(x + at)
    tl.store(y + at, tl.dot(tile, tile, input_precision="ieee"))


def compile_cases(capability: int = 90) -> list[Case]:
    pointers = {"x": "*fp32", "y": "*fp32"}
    return [
        Case("spilling", _spilling, pointers, {"SIZE": 16384}, 0, 131072, num_warps=1),
        Case("no tensor core", _no_tensor_core, pointers, {"SIZE": 16}, 8192, 2048, matrix=True),
    ]
