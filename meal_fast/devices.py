"""Devices by name: what an option's text stands for on this machine."""

from __future__ import annotations

from dataclasses import replace

import torch

from .config import Dtype, PolicyConfig

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
