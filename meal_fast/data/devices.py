"""Devices by name: what an option's text stands for on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from meal_fast.config.sections import Dtype, PolicyConfig

DTYPES = {"float32": torch.float32, "tfloat32": torch.float32, "bfloat16": torch.bfloat16}


def device_of(name: str, option: str = "policy.device") -> torch.device:
    """The device called `name`; `auto`: cuda where there is one, else cpu.

    Raises ValueError, naming `option`, for a name that is none, and for a CUDA device that is not
    there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"{option}={name!r}: no device; use cpu, cuda, cuda:N or auto") from None
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"{option}={name!r}: no CUDA device here; use cpu or auto")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise ValueError(f"{option}={name!r}: CUDA devices here: {count}, counted from cuda:0")
    return device


def settled(config: PolicyConfig) -> PolicyConfig:
    """The options with `dtype=auto` as what it means on this machine: what a run saves and keeps.

    On a GPU bfloat16, but where all parameters are trained: those are float32, and with products of
    10 bits whose sums are float32, and nothing else rounded, sampler and learner share them and
    agree without a cast. bfloat16 products, of 8 bits, would be up to twice as fast.
    """
    if config.dtype != "auto":
        return config
    on_a_gpu: Dtype = "tfloat32" if config.tuning == "full" else "bfloat16"
    on_a_cpu = device_of(config.device).type == "cpu"
    return replace(config, dtype="float32" if on_a_cpu else on_a_gpu)


def prepare(device: torch.device, dtype: Dtype) -> None:
    """Sets what of torch is the whole process's, for a policy on `device`."""
    if device.type != "cuda":
        return
    # cuDNN's attention, torch's first choice on Hopper, is built anew for every shape, which takes
    # longer than a pass, and with a mask its gradient can be NaN (torch 2.11).
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tfloat32"


@contextmanager
def full_products() -> Iterator[None]:
    """Keeps products of matrices out of TF32, whatever the process has chosen."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def exact_angles(model: nn.Module) -> None:
    """Keeps the angles of rotary positions out of TF32, where they are a product of matrices.

    Rounded to 10 bits, the angle of position 500 is off by a fifth of a radian.
    """
    before: list[bool] = []

    def exact(*_: object) -> None:
        before.append(torch.backends.cuda.matmul.allow_tf32)
        torch.backends.cuda.matmul.allow_tf32 = False

    def as_before(*_: object) -> None:
        torch.backends.cuda.matmul.allow_tf32 = before.pop()

    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.register_forward_pre_hook(exact)
            module.register_forward_hook(as_before, always_call=True)
