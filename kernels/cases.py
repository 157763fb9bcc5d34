"""What `make sass` compiles: each kernel module lists its own configurations as `Case`s.

A module of kernels defines `compile_cases(capability=90) -> list[Case]`, with every configuration
that its heuristics choose for the models in `HEADS` on a GPU of that compute capability.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Hidden width and vocabulary.
HEADS = {
    "SmolLM2-135M": (576, 49_152),
    "Qwen2-0.5B": (896, 151_936),
    "Llama-3-8B": (4096, 128_256),
}


@dataclass(frozen=True)
class Case:
    """One kernel at one configuration, and the work that a launch of it does."""

    name: str
    fn: Any  # what @triton.jit returned
    signature: dict[str, str]  # run-time arguments: "*bf16", "i32", "tensordesc<bf16[128, 64]>", …
    constexprs: dict[str, Any]  # arguments in neither are optional ones, not given: None
    flops: float  # of matrix products
    bytes: float  # that must cross the memory bus at least once
    num_warps: int = 4
    num_stages: int = 3
    matrix: bool = False  # whether it must use the tensor cores
    # Integers known to be multiples of 16, which Triton compiles for; pointers always are.
    divisible: tuple[str, ...] = ()
