"""A run's checkpoints: written while the training goes on, read back only as they were written.

    ckpt/step-12/   all that the rest of the run depends on: see checkpoint_saved
    ckpt/step-10/   the one before, which is gone on with where the last one is damaged
    ckpt/LATEST     the name of the last one

One is written under another name, `step-12.tmp`, and has its own when it is whole and on the disk.
The training waits for a copy in the host's memory and for the checkpoint before, for no more.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from meal_fast import __version__
from meal_fast.common import first_line, write_atomic
from meal_fast.config.config import Config, to_dict
from meal_fast.config.recipes import spec_of
from meal_fast.config.run_dir import CHECKPOINTS, LATEST, OLD_CHECKPOINTS
from meal_fast.config.sealed import seal_policy
from meal_fast.data.preferences import Preference
from meal_fast.models.model_soup import FILE, Family
from meal_fast.models.policy import Policy

from . import checkpoint_store as store
from .checkpoint_files import check_logs, check_rest, sealed
from .checkpoint_saved import (
    COUNTS,
    FORMAT,
    MANIFEST,
    Saved,
    check_parts,
    is_name,
    manifest,
    names_in,
    read_folder,
    read_old,
)
from .checkpoint_state import copied, sound, taken_apart
from .distributed import ALONE, Mesh, ProcessLost, of_all


class Checkpoints:
    """The checkpoints of a run's folder, which all of the run's processes save together.

    All of them call `open`, `save` and `finish`, in the same order; what is raised in one is raised
    in all.
    """

    def __init__(self, out: Path, mesh: Mesh = ALONE) -> None:
        self.out, self.ckpt, self.mesh = out, out / CHECKPOINTS, mesh
        self.latest: int | None = None  # meta-steps that the last one has behind it
        self._good = ""  # the last one that is whole: opened, or written
        self._group = mesh.beside()
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._copies: dict[str, Tensor] = {}  # what is being written, or was

    # ---- reading

    def open(self, config: Config) -> Saved | None:
        """Find the checkpoint to go on from; None: there is none yet. `check_folder` has passed.

        One that is damaged is named in a warning, and the one before it is taken. Raises ValueError
        where none can be gone on from, or another file of the run is not what it was.
        """
        there, reasons = self.mesh.main_alone(self._there)
        if not there and not reasons:
            self._warn(f"{self.out} has no checkpoint yet: it starts from the first update")
            return None
        for name in there:
            try:
                saved = self._read(name)
            except ValueError as error:
                reasons.append(f"{name} {error}")
                continue
            self.mesh.agreed(partial(check_rest, config, self.out, saved.said))
            if reasons:
                why = "; ".join(reasons)
                self._warn(f"{self.out}: {why}; going on from {name}, meta-step {saved.step}")
            elif name in OLD_CHECKPOINTS and "digest" not in saved.said:
                version = saved.said.get("version", "?")
                said = f"{name} is of version {version}, without a digest: taken as it is"
                self._warn(f"{self.out}: {said}")
            self.latest, self._good = saved.step, name
            return saved
        raise ValueError(
            f"out={str(self.out)!r}: nothing to go on from: {'; '.join(reasons)}; restore one of "
            "these from a copy, or start anew in another --out"
        )

    def _there(self) -> tuple[list[str], list[str]]:
        """Name the checkpoints to try, the best first, and what is wrong with the names."""
        folders = names_in(self.ckpt)
        old = [name for name in OLD_CHECKPOINTS if os.path.lexists(self.out / name)]
        amiss, latest = [], self.ckpt / LATEST
        if folders or os.path.lexists(latest):
            try:
                name = latest.read_bytes().decode("ascii").removesuffix("\n")
            except (OSError, ValueError):
                name = ""
            if name in folders:
                folders = [name, *(other for other in folders if other != name)]
            elif is_name(name):
                amiss = [f"{CHECKPOINTS}/{name} is missing"]
            else:
                amiss = [f"{CHECKPOINTS}/{LATEST} names no checkpoint"]
        elif old and old[0] != OLD_CHECKPOINTS[0]:
            amiss = [f"{OLD_CHECKPOINTS[0]} is missing"]
        return [*(f"{CHECKPOINTS}/{name}" for name in folders), *old], amiss

    def _read(self, name: str) -> Saved:
        """Read one with all that it goes with; the processes share the work of its digests."""
        path = self.out / name

        def read() -> Saved:
            if name in OLD_CHECKPOINTS:
                saved = read_old(path)
            else:
                saved = read_folder(path, name)
                check_parts(path, saved, self.mesh.rank, self.mesh.world)
            if self.mesh.main:
                check_logs(self.out, saved.said)
            return saved

        return self.mesh.agreed(read)

    # ---- writing

    def save(self, state: Mapping[str, Any], config: Config) -> None:
        """Write everything that the rest of a run depends on, as soon as the last one is written.

        state: `step`, `tokens`, `metrics_bytes`, `completions_bytes` and `files`, the logs' digests
        (what the first process gives of these counts), `outer` and `experience`, which may have
        entries that other processes have not. It is copied: what it is of may change.

        Raises ValueError, in all processes, for parameters or an optimizer that are not finite: the
        checkpoints then stay as they are; and what the last one was not written for.
        """
        self.finish()
        said = {name: state[name] for name in (*COUNTS, "files") if name in state}
        rest = {name: value for name, value in state.items() if name not in said}
        structure, tensors = taken_apart(rest)
        named = ("outer/", "experience/net/")
        trained = [x for name, x in tensors.items() if name.startswith(named)]
        if self.mesh.any(not sound(trained)):
            raise of_all(
                ValueError(
                    f"meta-step {state['step']}: parameters or Adam's state are not finite; the "
                    "checkpoint before it is kept; start anew with a lower grpo.lr"
                )
            )
        copies = {name: copied(x, self._copies.get(name)) for name, x in tensors.items()}
        self._copies = copies
        # Of the originals only what is known without their values: nothing else is held on to.
        places = {name: torch.empty_like(x, device="meta") for name, x in tensors.items()}
        said["config"] = json.dumps(to_dict(config))
        self.latest = int(state["step"])
        self._writing = self._writer.submit(self._write, said, structure, places, copies)

    def finish(self) -> None:
        """Wait until what was saved is on the disk. Raises what kept it from that, once."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait as `finish` does where something else has gone wrong, which is what is said."""
        try:
            self.finish()
        except Exception as error:
            warnings.warn(f"{self.out}: a checkpoint is not written: {error}", stacklevel=2)
        finally:
            self._writer.shutdown()

    def _write(
        self,
        said: dict[str, Any],
        structure: Any,
        places: Mapping[str, Tensor],
        copies: Mapping[str, Tensor],
    ) -> None:
        """Write a folder, and make it the last one. In a thread of its own."""
        name = f"step-{said['step']}"
        folder, whole = self.ckpt / f"{name}.tmp", self.ckpt / name

        def finish(parts: dict[str, Any]) -> None:
            files = said["files"] | sealed(self.out)
            made = {"version": __version__, "format": FORMAT, "world": self.mesh.world}
            content = manifest(made | said | {"files": files} | parts)
            write_atomic(folder / MANIFEST, content)
            store.remove(whole)  # one that was damaged
            os.rename(folder, whole)
            write_atomic(self.ckpt / LATEST, f"{name}\n")
            self._forget(name)

        try:
            of_first = self._structure(structure)
            rank = self.mesh.rank
            store.save(places, copies, of_first, folder, finish, self._group, rank)
        except BaseException as error:
            self.latest = None
            if self.mesh.main:  # on a full disk its remains are in the way
                store.remove(folder)
            if isinstance(error, RuntimeError) and self.mesh.world > 1:
                raise ProcessLost(
                    f"rank {self.mesh.rank} of {self.mesh.world}: a checkpoint cannot be written "
                    f"with the other processes ({first_line(error)})"
                ) from error
            raise of_all(error) from None

    def _structure(self, structure: Any) -> Any:
        """Give None where the first process says the same: what all have travels once."""
        if self._group is None:
            return structure
        text = json.dumps(structure, separators=(",", ":")).encode()
        digests: list[Any] = [None] * self.mesh.world
        dist.all_gather_object(digests, hashlib.sha256(text).digest(), self._group)
        same = digests[self.mesh.rank] == digests[0] and not self.mesh.main
        return None if same else structure

    def _forget(self, name: str) -> None:
        """Keep this one and the good one before; remove all others."""
        kept, self._good = {name, Path(self._good).name}, f"{CHECKPOINTS}/{name}"
        for path in self.ckpt.iterdir():
            if path.name.startswith("step-") and path.name not in kept:
                store.remove(path)
        if not kept & set(OLD_CHECKPOINTS):
            for old in OLD_CHECKPOINTS:
                (self.out / old).unlink(missing_ok=True)

    def _warn(self, said: str) -> None:
        if self.mesh.main:
            warnings.warn(said, stacklevel=4)


def check_space(out: Path, policy: Policy, models: int) -> None:
    """Raise ValueError without room for three checkpoints: two are kept while one is written."""
    place = next(p for p in (out, *out.absolute().parents) if p.exists())
    trained = sum(p.numel() for p in policy.trainable) * models
    merged = 4 if policy.rank or policy.adapter is not None else 0  # float32, whatever the base is
    saved = sum(p.numel() * max(p.element_size(), merged) for p in policy.model.parameters())
    family = 4 * trained if models > 1 else 0
    need = 3 * 3 * 4 * trained + 2 * saved + family
    # What an earlier start has written takes the place of what is counted here.
    there = [p for name in (*OLD_CHECKPOINTS, FILE) if (p := out / name).is_file()]
    there += [p for name in ("policy", CHECKPOINTS) for p in (out / name).rglob("*") if p.is_file()]
    sizes = {(at := p.stat()).st_ino: at.st_size for p in there}  # linked ones once
    free = shutil.disk_usage(place).free + sum(sizes.values())
    if free < need:
        raise ValueError(
            f"out={str(out)!r}: {free / 1e6:,.1f} MB free, checkpoints and the policy need "
            f"{need / 1e6:,.1f} MB; make room, or name a folder with more space"
        )


def write_config(out: Path, config: Config) -> None:
    """Write config.json."""
    write_atomic(out / "config.json", json.dumps(to_dict(config), indent=1))


def note_threads(out: Path, saved: Config, threads: int) -> None:
    """Write into config.json how many threads a run has, where an older version did not."""
    if not saved.threads:
        write_config(out, dataclasses.replace(saved, threads=threads))


def write_policy(
    out: Path,
    policy: Policy,
    config: Config,
    models: Mapping[Preference, Sequence[Tensor]],
    progress: float,
) -> None:
    """Write `policy/`; of several models the one for equal weights, after a file with them all.

    Then `policy.json` says how far the run was, with digests of all that is served.
    """
    served: AbstractContextManager[None] = nullcontext()
    between = spec_of(config).between
    if between:
        named = [dict(zip(policy.named, theta, strict=True)) for theta in models.values()]
        family = Family(tuple(models), tuple(named), between)
        write_atomic(out / FILE, family.to_bytes(config.names))
        served = family.at(policy, (1.0 / len(config.names),) * len(config.names))
    with served:
        policy.save(out / "policy")
    seal_policy(out, progress)
