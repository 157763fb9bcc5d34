"""A frozen copy whose weights stay in their file: in memory only while they are read."""

from __future__ import annotations

import copy
import ctypes
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh

from .network import Network, cut
from .sharded import Company, Sharded

_MADV_DONTNEED = 4


class FrozenCopy:
    """`model` as it is now, for inference.

    Where the safetensors files of `folder` hold exactly its weights (dtype and values, on a CPU),
    the copy's weights are mapped from there, and `release` gives their memory back; the next read
    finds them in the file again. Otherwise it is an ordinary copy, and `release` does nothing.

    A mapped file must stay as it is while the copy is in use: written over in place, it would
    change the copy.
    """

    def __init__(self, model: Any, folder: str | None = None) -> None:
        self.model: Any = copy.deepcopy(model).requires_grad_(False).eval()
        self.sharded: Sharded | None = None
        self._ranges: list[tuple[int, int]] = []
        held = dict(self.model.named_parameters())
        here = folder is not None and all(p.device.type == "cpu" for p in held.values())
        files = sorted(Path(folder or "").glob("*.safetensors")) if here else []
        stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
        if not stored or not all(_same(p, stored.get(name)) for name, p in held.items()):
            return
        for name, parameter in held.items():
            parameter.data = stored[name]
        ours = [p.data_ptr() for p in held.values()]
        others = [p.data_ptr() for p in model.parameters()]
        # Never a range in which the model that trains has a weight: its changes would be lost.
        self._ranges = [
            (start, end)
            for start, end in _mappings(files)
            if any(start <= p < end for p in ours) and not any(start <= p < end for p in others)
        ]
        self.release()

    @property
    def network(self) -> Network:
        return cut(self.model) if self.sharded is None else self.sharded.network

    def share(self, mesh: DeviceMesh, company: Company) -> None:
        """Share its weights out among the processes of `mesh`, which then leave the file alone."""
        self._ranges = []  # what lies there later is somebody else's
        self.sharded = Sharded(self.model, mesh, company)

    def release(self) -> None:
        """Give back the memory of weights that are mapped from a file.

        Of one that is shared, embedding and head stay gathered: the exact KL reads that head later.
        """
        for start, end in self._ranges:  # found on Linux alone
            size = ctypes.c_size_t(end - start)
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), size, _MADV_DONTNEED)


def _same(parameter: torch.Tensor, stored: torch.Tensor | None) -> bool:
    return stored is not None and parameter.dtype == stored.dtype and torch.equal(parameter, stored)


def _mappings(files: list[Path]) -> list[tuple[int, int]]:
    """Address ranges of this process that the kernel itself says are these files (Linux)."""
    table = Path("/proc/self/maps")
    if not table.exists():
        return []
    names = {str(file.resolve()) for file in files}
    ranges = []
    for line in table.read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] in names:
            start, _, end = fields[0].partition("-")
            ranges.append((int(start, 16), int(end, 16)))
    return ranges
