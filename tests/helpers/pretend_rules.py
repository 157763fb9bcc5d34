"""What a pretended CUDA device is made of: its tensors, the rules of ops, the counts; see pretend.

To autograd and the rest of C++ these tensors are the CPU's: their device is Python's view alone,
which is why `to` and its like are put right by hand.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import meal_fast

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
ROOT = str(Path(meal_fast.__file__).parents[1])
OURS = (f"{ROOT}/meal_fast/", f"{ROOT}/kernels/")

VIEWS = set(
    "view _unsafe_view t transpose permute expand slice select unsqueeze squeeze detach alias "
    "as_strided split split_with_sizes chunk unbind _reshape_alias diagonal unfold lift_fresh "
    "empty empty_like new_empty empty_strided new_empty_strided".split()
)  # and allocations: nothing is launched
VALUES = set(
    "_local_scalar_dense nonzero masked_select _unique _unique2 unique_dim unique_consecutive "
    "equal bincount is_nonzero allclose".split()
)  # the host has to know a value
INDEXED = set("index index_put index_put_ _index_put_impl_ _unsafe_index _unsafe_index_put".split())
COPIES, PRODUCTS = {"_to_copy", "copy_"}, {"mm", "addmm", "bmm", "baddbmm"}


class Cuda:
    """The counts, and the device's state."""

    def __init__(self, kernels: str) -> None:
        self.kernels = kernels
        self.launches: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.where: Counter[tuple[str, str, str]] = Counter()
        self.graphs: list[Graph] = []
        self.pinned: dict[int, torch.Tensor] = {}  # by address; kept, so that none is used again
        self.capturing: Graph | None = None
        self._paused = False

    def reset(self) -> None:
        for counts in (self.launches, self.syncs, self.where):
            counts.clear()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def launch(self, name: str) -> None:
        if self.capturing is not None:
            self.capturing.launches[name] += 1
        elif not self._paused:
            self.launches[name] += 1
        if not self._paused:
            self.where["launch", name, place()] += 1

    def sync(self, kind: str) -> None:
        if self.capturing is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {kind} {at()}")
        if not self._paused:
            self.syncs[kind] += 1
            self.where["sync", kind, place()] += 1

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self.pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor


Call = tuple[Callable[..., Any], Any, Any, Any]  # function, arguments, keywords, result
NOW = Cuda("torch")  # the device that is installed


class Graph:
    """`torch.cuda.CUDAGraph`: the calls of a capture, done again on the same memory."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.calls: list[Call] = []

    def replay(self) -> None:
        NOW.launch("graph")
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def pool(self) -> tuple[int, int]:
        return (0, id(self))


@contextlib.contextmanager
def capture(graph: Graph, *_: Any, **__: Any) -> Iterator[None]:
    """`torch.cuda.graph`."""
    NOW.sync("capture")
    NOW.capturing = graph
    try:
        yield
    finally:
        NOW.capturing = None
    NOW.graphs.append(graph)


def place() -> str:
    """The innermost line of ours that is being run."""
    frame: Any = sys._getframe(1)
    while frame and not frame.f_code.co_filename.startswith(OURS):
        frame = frame.f_back
    return f"{frame.f_code.co_filename[len(ROOT) + 1 :]}:{frame.f_lineno}" if frame else "?"


def at() -> str:
    return f"(at {place()})"


class CudaTensor(torch.Tensor):
    """`inner`, a tensor on the CPU, as one on cuda:0."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> CudaTensor:
        t = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=CPU,
        )  # fmt: skip
        t.inner = inner
        return t

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        assert isinstance(value, CudaTensor), f"data: a CPU tensor set to one on cuda {at()}"
        self.inner = value.inner

    def __repr__(self) -> str:
        return f"cuda:{self.inner!r}"

    def cpu(self, *_: Any) -> torch.Tensor:
        return self.to(CPU)

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        (device, dtype), rest = destination(args, kwargs)
        if device is None or device.type == "cuda":
            return torch.Tensor.to(self, dtype or self.dtype, **rest)
        rest.pop("copy", None)
        return torch.ops.aten._to_copy(self, device=CPU, dtype=dtype or self.dtype, **rest)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert cuda:0 device type tensor to numpy {at()}")

    __array__ = numpy

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def __deepcopy__(self, memo: Any) -> Any:
        copied = CudaTensor(self.inner.detach().clone())
        if isinstance(self, nn.Parameter):
            return nn.Parameter(copied, requires_grad=self.requires_grad)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def destination(args: Any, kwargs: Any) -> tuple[tuple[Any, Any], dict[str, Any]]:
    """Device and dtype that `Tensor.to` is asked for, and the other keywords."""
    device = dtype = None
    for value in (*args, *(kwargs.pop(k, None) for k in ("device", "dtype", "other"))):
        if isinstance(value, torch.Tensor):
            device, dtype = value.device, value.dtype
        elif isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, (str, torch.device)):
            device = CUDA if torch.device(value).type == "cuda" else torch.device(value)
    flags = [v for v in args if isinstance(v, bool)]
    return (device, dtype), dict(zip(("non_blocking", "copy"), flags, strict=False)) | kwargs


def inner(x: Any) -> Any:
    return x.inner if isinstance(x, CudaTensor) else x


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """An op: CUDA's rules and the counts, then its values on the CPU."""
    name = func._schema.name.removeprefix("aten::")
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    cuda = [t for t in tensors if isinstance(t, CudaTensor)]
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    if asked == CPU and cuda and torch._C._current_autograd_node() is not None:
        asked = CUDA  # what C++ takes for the device of a gradient
    on_cuda = bool(cuda) if asked is None else asked.type == "cuda"
    if cuda or on_cuda:
        if name in COPIES and (copied := _copied(name, args, kwargs, on_cuda)):
            if copied != "nothing waits":
                NOW.sync(copied)
        else:
            host = [t for t in tensors if not isinstance(t, CudaTensor)]
            kind = _indexed(args) if name in INDEXED else _waits(name, kwargs)
            if kind:
                NOW.sync(kind)
            elif name not in INDEXED:
                _check_devices(name, cuda, host)
            if name not in VIEWS:
                NOW.launch(name)
    given = {k: v for k, v in kwargs.items() if k != "pin_memory"}
    if asked is not None and asked.type == "cuda":
        given["device"] = CPU
    same = {id(t.inner): t for t in cuda}  # what an op in place returns
    a, k = tree_map(inner, (args, given))
    if name == "is_pinned":
        return NOW.is_pinned(a[0])
    if name == "_pin_memory":
        return NOW.pin(a[0].clone())
    if name in PRODUCTS and func._overloadname.startswith("dtype"):
        func, a = _wide(func, a)
    out = func(*a, **k)
    if kwargs.get("pin_memory") or (name == "_to_copy" and cuda and kwargs.get("non_blocking")):
        NOW.pin(out)
    if not on_cuda or not isinstance(out, (torch.Tensor, tuple, list)):
        return out
    if NOW.capturing is not None:
        NOW.capturing.calls.append((func, a, k, out))

    def wrapped(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return same[id(x)] if id(x) in same else CudaTensor(x)

    return tree_map(wrapped, out)


def _wide(func: Any, args: Any) -> tuple[Any, Any]:
    """A product (…, out_dtype), which a GPU alone has, as one of wide factors."""
    *factors, dtype = args
    plain = func.overloadpacket.out if func._overloadname == "dtype_out" else func.overloadpacket
    return (lambda *x, **k: plain(*(f.to(dtype) for f in x), **k)), factors


def _copied(name: str, args: Any, kwargs: Any, on_cuda: bool) -> str | None:
    """Of a copy from device to device: how the host waits for it; None for any other copy."""
    if name == "_to_copy":
        to_cuda, source, free = on_cuda, args[0], kwargs.get("non_blocking")
        pinned = isinstance(source, CudaTensor) or NOW.is_pinned(source)  # made so on the way out
    else:
        to_cuda, source = isinstance(args[0], CudaTensor), args[1]
        free = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        pinned = NOW.is_pinned(source if to_cuda else args[0])
    if to_cuda == isinstance(source, CudaTensor):
        return None
    if free and pinned:
        return "nothing waits"
    return "host to device" if to_cuda else "device to host"


def _waits(name: str, kwargs: Any) -> str | None:
    """What makes the host wait for the device in this op; None where nothing does."""
    if name == "repeat_interleave":
        return None if isinstance(kwargs.get("output_size"), int) else name
    return name if name in VALUES else None


def _indexed(args: Any) -> str | None:
    """The same, of indexing, where devices have rules of their own."""
    on_cuda, kind = isinstance(args[0], CudaTensor), None
    value = args[2] if len(args) > 2 else None
    for index in args[1]:
        if isinstance(index, CudaTensor) and not on_cuda:
            raise RuntimeError(
                f"indices should be on the same device as the indexed tensor (cpu) {at()}"
            )
        if index is None or not on_cuda:
            continue
        if not isinstance(index, CudaTensor):
            kind = "host to device"
        elif index.dtype == torch.bool and (value is None or value.numel() != 1):
            kind = "index by a mask"  # a single value goes in without
    if value is not None and value.dim() and isinstance(value, CudaTensor) != on_cuda:
        raise RuntimeError(f"index_put: the value is on another device than self {at()}")
    return kind


def _check_devices(name: str, cuda: list[Any], host: list[Any]) -> None:
    """On the CPU only a number, a tensor of no dimension, may meet what is on the device."""
    if cuda and (any(t.dim() for t in host) or (host and name in ("cat", "stack"))):
        shapes = [f"{tuple(t.shape)} on {t.device}" for t in (*cuda, *host)]
        raise RuntimeError(
            f"Expected all tensors to be on the same device: {name} of {', '.join(shapes)} {at()}"
        )


class Stream:
    """`torch.cuda.Stream` and `torch.cuda.Event`."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0

    def synchronize(self) -> None:
        NOW.sync("synchronize")

    def query(self) -> bool:
        return True

    def nothing(self, *_: Any, **__: Any) -> None:
        pass

    wait_stream = wait_event = record_event = record = wait = nothing
