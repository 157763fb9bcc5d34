"""`ops.sample` in CUDA C++ (csrc/sample.cu): the checked arguments in, three tensors out.

Never run on a GPU so far: it compiles, and its arithmetic runs on the CPU in the tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cuda_build

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def sample(
    logits: Tensor,  # (R, V) on CUDA, of any strides
    seed: int,
    row: Tensor,  # (R,) int64
    position: Tensor,  # (R,) int64
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(token, logp, truncated_logp), each (R,)."""
    r, v = logits.shape
    token = torch.empty(r, dtype=torch.int64, device=logits.device)
    logp, truncated = (logits.new_empty(r, dtype=torch.float32) for _ in range(2))
    with torch.cuda.device_of(logits):  # a launch goes to the current device
        cuda_build.load("sample", torch.cuda.get_device_capability(logits.device))
        torch.ops.meal_fast_cuda.sample(
            logits,
            row.contiguous(),
            position.contiguous(),
            token,
            logp,
            truncated,
            KINDS[logits.dtype],
            (seed + 2**63) % 2**64 - 2**63,
            1 / temperature if temperature else 1.0,
            temperature == 0,
            min(top_k, v),
            top_p,
            min_p,
            torch.cuda.current_stream(logits.device).cuda_stream,
        )
    return token, logp, truncated
