"""How torch.distributed.checkpoint writes a run's tensors: safetensors files, and JSON about them.

Its own storages describe what they hold by a pickle; this one by a manifest, so that reading a
checkpoint runs nothing. Each process writes one file, as fast as the disk takes it: with a digest
made on the way, no copy, and the interpreter free for the training. What several processes have
alike is written by one of them; of what they hold together each writes its own part.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from .checkpoint_state import DTYPES, dtype_of, name_of, united

BLOCK = 4 << 20  # bytes that are digested and written at once


def save(
    tensors: Mapping[str, Tensor],
    copies: Mapping[str, Tensor],
    structure: Any,
    folder: Path,
    finish: Callable[[dict[str, Any]], None],
    group: ProcessGroup | None,
    rank: int,
) -> None:
    """Write the copies of tensors; then the first process calls `finish` with what was written.

    tensors: as they are spread over processes; their values are not looked at. structure: of the
    state that they are from; None: what the first process says. Raises what was raised in any
    process, in all of them.
    """
    # It says so whenever there is only one process.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    try:
        dcp.save(
            dict(tensors),
            storage_writer=_Writer(folder, finish, rank),
            planner=_Planner(copies, structure),
            process_group=group,
            no_dist=group is None,
        )
    except dcp.CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        found = next((x for x in causes if isinstance(x, OSError)), causes[0])
        raise found from None


def load(tensors: dict[str, Tensor], folder: Path, tables: Mapping[str, Any]) -> None:
    """Fill tensors, or a process's parts of them, with the values of a checkpoint.

    Each process reads what it asks for, without the others. Raises ValueError for what does not
    fit, and what the libraries raise for a damaged file.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp.load(tensors, storage_reader=_Reader(folder, tables), planner=planner, no_dist=True)
    except dcp.CheckpointException as error:
        raise next(cause for cause, _ in error.failures.values()) from None


class _Planner(dcp.DefaultSavePlanner):
    """Write copies in the places of tensors that go on changing, and bring along the structure."""

    def __init__(self, copies: Mapping[str, Tensor], structure: Any) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.copies, self.structure = copies, structure

    def create_local_plan(self) -> dcp.SavePlan:
        return dataclasses.replace(super().create_local_plan(), planner_data=self.structure)

    def create_global_plan(
        self, all_plans: list[dcp.SavePlan]
    ) -> tuple[list[dcp.SavePlan], Metadata]:
        structures = [plan.planner_data for plan in all_plans if plan.planner_data is not None]
        plans, metadata = super().create_global_plan(
            [dataclasses.replace(plan, planner_data=None) for plan in all_plans]
        )
        return plans, dataclasses.replace(metadata, planner_data=united(structures))

    def resolve_data(self, write_item: Any) -> Tensor:
        return self.copies[write_item.index.fqn]


class _Writer(dcp.StorageWriter):
    def __init__(self, folder: Path, done: Callable[[dict[str, Any]], None], rank: int) -> None:
        self.folder, self.done, self.rank = folder, done, rank

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            remove(self.folder)  # what a killed process left
            self.folder.mkdir(parents=True)

    def prepare_local_plan(self, plan: dcp.SavePlan) -> dcp.SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[dcp.SavePlan]) -> list[dcp.SavePlan]:
        return plans

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future[list[WriteResult]]:
        name = f"rank-{self.rank:05}.safetensors"
        parts: dict[str, Tensor] = {}
        for item in plan.items:
            part = planner.resolve_data(item)
            assert isinstance(part, Tensor)
            if part.numel():
                parts[_part_name(item.index)] = part
        written = _written(self.folder / name, parts) if parts else (0, "")
        future: Future[list[WriteResult]] = Future()
        results = [WriteResult(x.index, 0, (name, *written)) for x in plan.items]
        future.set_result([x for x in results if _part_name(x.index) in parts])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        place = {x.index: x.storage_data for of_rank in results for x in of_rank}
        files = {name: [size, digest] for name, size, digest in sorted(set(place.values()))}
        tables = {}
        for name, held in metadata.state_dict_metadata.items():
            assert isinstance(held, TensorStorageMetadata)
            chunks = [
                [place[at][0], list(chunk.offsets), list(chunk.sizes)]
                for chunk in held.chunks
                if (at := MetadataIndex(name, chunk.offsets)) in place
            ]
            dtype = name_of(held.properties.dtype)
            tables[name] = {"dtype": dtype, "shape": list(held.size), "chunks": chunks}
        self.done({"parts": files, "tensors": tables, "state": metadata.planner_data})

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class _Reader(dcp.StorageReader):
    def __init__(self, folder: Path, tables: Mapping[str, Any]) -> None:
        self.folder, self.tables = folder, tables

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None: ...

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        held: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        place = {}
        for name, table in self.tables.items():
            chunks = []
            for file, offsets, sizes in table["chunks"]:
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                place[MetadataIndex(name, torch.Size(offsets))] = file
            kind = TensorProperties(dtype=dtype_of(table["dtype"]))
            held[name] = TensorStorageMetadata(kind, torch.Size(table["shape"]), chunks)
        return Metadata(held, storage_data=place)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        self.place = metadata.storage_data

    def prepare_local_plan(self, plan: dcp.LoadPlan) -> dcp.LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[dcp.LoadPlan]) -> list[dcp.LoadPlan]:
        return plans

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> Future[None]:
        from safetensors import safe_open

        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            by_file.setdefault(self.place[item.storage_index], []).append(item)
        for name, items in by_file.items():
            with safe_open(self.folder / name, framework="pt") as file:
                for item in items:
                    key = _part_name(item.storage_index)
                    within = zip(item.storage_offsets, item.lengths, strict=True)
                    cut = tuple(slice(start, start + length) for start, length in within)
                    found = file.get_slice(key)[cut] if cut else file.get_tensor(key)
                    to = planner.resolve_tensor(item).detach()
                    if to.shape != found.shape or to.dtype != found.dtype:
                        raise ValueError(f"{item.storage_index.fqn} is of another shape or type")
                    to.copy_(found)
                    planner.commit_tensor(item, to)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def remove(path: Path) -> None:
    """Remove a folder with all in it, or a file; of a link, the link."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _part_name(index: MetadataIndex) -> str:
    """Name a part of a tensor within a file: by where it begins, unless it is the first."""
    offsets = index.offset or ()
    return index.fqn + ("@" + ",".join(map(str, offsets)) if any(offsets) else "")


def _written(path: Path, parts: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write tensors as a safetensors file, onto the disk; give its size and SHA-256."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # The largest numbers first: each tensor then begins where its type of number may.
    parts = dict(sorted(parts.items(), key=lambda named: -named[1].element_size()))
    for name, part in parts.items():
        start, end = end, end + part.numel() * part.element_size()
        header[name] = {
            "dtype": DTYPES[name_of(part.dtype)],
            "shape": list(part.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # what follows is read in place
    digest = hashlib.sha256()
    with open(path, "xb", buffering=0) as file:

        def write(data: memoryview) -> None:
            for start in range(0, len(data), BLOCK):
                block = data[start : start + BLOCK]
                digest.update(block)
                while len(block):  # the system may take less than it is given
                    block = block[file.write(block) :]

        write(memoryview(len(text).to_bytes(8, "little") + text))
        for part in parts.values():
            write(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        os.fsync(file.fileno())
    return 8 + len(text) + end, digest.hexdigest()
