"""A run's state taken apart: its tensors by name, and what is none as JSON that gives it back.

A structure says everything but the tensors' values. None, true, false, whole numbers, texts and
finite numbers stand for themselves, a list for a list; all else is a table of one entry:

    {"dict": [[key, value], …]}   {"tuple": [value, …]}   {"float": "nan"}
    {"tensor": name}              {"empty": [dtype, shape]}, a tensor without a value
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Where = tuple[Any, ...]  # the keys, and places in lists, that lead to a value
DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}  # torch's names, and those of safetensors


def taken_apart(state: Mapping[Any, Any]) -> tuple[Any, dict[str, Tensor]]:
    """Give a state's structure, and its tensors by name: the very ones, not copied.

    Raises TypeError for a value of a kind that cannot be given back as it was.
    """
    tensors: dict[str, Tensor] = {}

    def take(value: Any, where: Where) -> Any:
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else {"float": repr(value)}
        if isinstance(value, Tensor):
            dtype = name_of(value.dtype)
            if not value.numel():
                return {"empty": [dtype, list(value.shape)]}
            name = "/".join(map(_written, where))
            tensors[name] = value.detach()
            return {"tensor": name}
        if isinstance(value, Mapping):
            pairs = value.items()
            return {"dict": [[take(k, (*where, "key")), take(v, (*where, k))] for k, v in pairs]}
        if type(value) in (list, tuple):
            parts = [take(part, (*where, i)) for i, part in enumerate(value)]
            return parts if type(value) is list else {"tuple": parts}
        at = "/".join(map(_written, where))
        raise TypeError(f"{at}: a {type(value).__name__} cannot be kept in a checkpoint")

    return take(state, ()), tensors


def put_together(
    structure: Any,
    tensors: Callable[[str, Where], Any],
    wanted: Callable[[Where], bool] = lambda where: True,
) -> Any:
    """Give back what `taken_apart` took apart; `tensors` gives one by name and place.

    Entries of tables that are not wanted are left out, and their tensors not asked for. Raises
    ValueError for a structure that is none.
    """

    def put(part: Any, where: Where) -> Any:
        if isinstance(part, list):
            return [put(value, (*where, i)) for i, value in enumerate(part)]
        if not isinstance(part, dict):
            return part
        kind: str
        held: Any
        kind, held = next(iter(part.items()), ("", None))
        if kind == "dict":
            keys = [put(key, (*where, "key")) for key, _ in held]
            places = [(*where, key) for key in keys]
            entries = zip(keys, places, held, strict=True)
            return {k: put(value, at) for k, at, (_, value) in entries if wanted(at)}
        if kind == "tuple":
            return tuple(put(value, (*where, i)) for i, value in enumerate(held))
        if kind == "tensor":
            return tensors(held, where)
        if kind == "empty":
            if 0 not in held[1]:
                raise ValueError("has a tensor without a value that is not empty")
            return torch.empty(held[1], dtype=dtype_of(held[0]))
        if kind == "float":
            return float(held)
        raise ValueError(f"is of an unknown kind, {kind!r:.40}")

    return put(structure, ())


def united(structures: Sequence[Any]) -> Any:
    """Make one structure of those of all processes: tables have the entries of all.

    Raises ValueError where what two processes both have is not the same.
    """
    first, *others = structures
    for other in others:
        first = _united(first, other, ())
    return first


def _united(one: Any, other: Any, where: Where) -> Any:
    if one == other and type(one) is type(other):
        return one
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [_united(a, b, (*where, i)) for i, (a, b) in enumerate(zip(one, other, strict=True))]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        if "dict" in one:
            found = {json.dumps(key): [key, value] for key, value in one["dict"]}
            for key, value in other["dict"]:
                name = json.dumps(key)
                held = found.get(name)
                within = value if held is None else _united(held[1], value, (*where, key))
                found[name] = [key, within]
            return {"dict": list(found.values())}
        if "tuple" in one:
            return {"tuple": _united(one["tuple"], other["tuple"], where)}
    at = "/".join(map(str, where))
    raise ValueError(f"the processes do not agree on {at}: {one!r:.60} and {other!r:.60}")


def sound(tensors: Iterable[Tensor]) -> bool:
    """Say whether all values that this process holds are finite."""
    held = [local(x) for x in tensors if x.is_floating_point()]
    # A sum of finite values may be too large: only then is each of them looked at.
    sums = [x.sum(dtype=torch.float32) for x in held]
    good = [bool(total.isfinite()) for total in sums]
    return all(fine or bool(x.isfinite().all()) for fine, x in zip(good, held, strict=True))


def local(tensor: Tensor) -> Tensor:
    """Give a tensor, or this process's part of one that several hold together."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copied(tensor: Tensor, into: Tensor | None) -> Tensor:
    """Copy what this process holds of a tensor into the host's memory, in its plain order.

    into: a copy that is needed no more. Where it is of the same shape its memory is taken: new
    memory, which the system has to clear first, took seven times as long.
    """
    held = local(tensor)
    if into is None or into.shape != held.shape or into.dtype != held.dtype:
        into = torch.empty(held.shape, dtype=held.dtype, device="cpu")
    return into.copy_(held)


def name_of(dtype: torch.dtype) -> str:
    """Give torch's name of a type of number. Raises TypeError for one that is not kept."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise TypeError(f"a tensor of {name} cannot be kept in a checkpoint")
    return name


def dtype_of(name: Any) -> torch.dtype:
    """Give the type of number of that name. Raises ValueError for none that is kept."""
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"is of an unknown type of number, {name!r:.40}")
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def _written(key: Any) -> str:
    """Write a key so that no two are written alike, and without a slash."""
    if type(key) is int:  # a place in a list: no table has both
        return str(key)
    return quote(key, safe="") if isinstance(key, str) else "=" + quote(repr(key), safe="(), .")
