"""The ops on a GPU beside what they replace: pytest bench/test_ops_gpu.py --benchmark-only --rows

As bench/test_ops.py, at the shapes of larger models (bench/op_cases.py), and beside torch.compile,
TRL, liger-kernel and Cut Cross-Entropy where they are installed. The floor is measured in the same
process: a bare product of the same shape for what multiplies, a copy for what moves.

Never run on a GPU so far.
"""

from __future__ import annotations

import pytest
import torch

from bench import op_cases
from bench.measure import compare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CASES = op_cases.build(op_cases.Sizes())


@pytest.mark.parametrize("name", CASES)
def test_op(benchmark, name):
    case = CASES[name]()
    compare(
        benchmark,
        case.op,
        case.case,
        case.works,
        device="cuda",
        floor=case.floor,
        flops=case.flops,
        moved=case.moved,
    )
