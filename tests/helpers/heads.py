"""A small head and what goes into it, for the tests of the ops that have one."""

import torch

F64 = torch.float64


def head(n=17, d=6, v=11, dtype=F64, seed=0):
    torch.manual_seed(seed)
    hidden = torch.randn(n, d, dtype=dtype, requires_grad=True)
    weight = torch.randn(v, d, dtype=dtype, requires_grad=True)
    bias = torch.randn(v, dtype=dtype, requires_grad=True)
    return hidden, weight, bias, torch.randint(0, v, (n,))
