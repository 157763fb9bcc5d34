"""Checks of what the caller passed: a `ValueError` names the argument, the value, the remedy.

Checks of shapes and options are free and always made. Checks of *values* read the tensor, which on
a GPU would stall the queue; `values_are_checked` says where they are made.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from meal_fast.common import require


def choice(argument: str, value: object, allowed: tuple[str, ...]) -> None:
    require(value in allowed, argument, value, f"choose from {', '.join(allowed)}")


def shape(argument: str, tensor: Tensor, *allowed: tuple[int, ...]) -> None:
    """Require that `tensor` has one of the shapes `allowed`."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{argument}: must be a tensor, got {type(tensor).__name__}")
    if tuple(tensor.shape) not in allowed:
        wanted = " or ".join(str(s) for s in allowed)
        raise ValueError(f"{argument}: shape {tuple(tensor.shape)}, expected {wanted}")


def floating(argument: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{argument}: dtype {tensor.dtype}, expected a floating point tensor")


def integer(argument: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{argument}: dtype {tensor.dtype}, expected int64")


def same_device(first: str, reference: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != reference.device:
            raise ValueError(
                f"{name}: on {tensor.device}, but {first} is on {reference.device}; move one"
            )


def positive(argument: str, value: float) -> None:
    require(math.isfinite(value) and value > 0, argument, value, "must be positive and finite")


def values_are_checked(tensor: Tensor, check: bool | None = None) -> bool:
    """Say whether values are looked at: on the CPU always, elsewhere, where it waits, if asked."""
    return bool(check) or tensor.device.type == "cpu"


def targets_in_range(target: Tensor, live: Tensor | None, vocabulary: int) -> None:
    """Require that every live target is a column of the head (CPU only: reads the values).

    live: None where the op counts every token, so that no mask can be advised.
    """
    bad = (target < 0) | (target >= vocabulary)
    remedy = "mask it or give ignore_index"
    if live is None:
        remedy = "no token is left out here: pick those that count, target[target >= 0], beforehand"
    else:
        bad &= live
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"target: row {row} is {int(target[row])}, outside [0, {vocabulary}); {remedy}"
        )


def finite_where(argument: str, values: Tensor, live: Tensor | None, remedy: str) -> None:
    """Require finite values where `live` (None: everywhere); CPU only: reads them.

    live: of the values' shape, or with more dimensions behind it.
    """
    bad = ~values.isfinite()
    if live is not None and bool(bad.any()):
        bad &= live if live.dim() == bad.dim() else live.any(-1)
    if bool(bad.any()):
        row = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{argument}: row {', '.join(map(str, row))} is {values[tuple(row)].item()}; {remedy}"
        )


IMPLEMENTATIONS = ("torch", "triton", "cuda")


def implementation(op: str, impl: str | None, available: tuple[str, ...] = ("torch",)) -> str:
    """Give the implementation to call; `available` is what `op` has here, best first."""
    if impl is None:
        return available[0]
    choice("impl", impl, IMPLEMENTATIONS)
    known = ", ".join(available)
    require(impl in available, "impl", impl, f"{op} has none such here; use None or one of {known}")
    return impl
