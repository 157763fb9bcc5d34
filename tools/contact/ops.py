"""The ops beside what they replace, as a share of what the card can do: bench/op_cases.py."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch._dynamo

from bench import op_cases
from bench.measure import ROUNDS, Turns
from bench.op_cases import COMPILED, OpCase
from tools.contact.here import Cases, Here

PEERS = {"liger": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}


def cases(here: Here) -> Cases:
    """First all that is quick to start, then ours beside what compiles for half a minute."""
    sizes = op_cases.TINY if here.rehearsal else op_cases.Sizes()
    built = op_cases.build(sizes)
    made: Cases = {"peers": functools.partial(peers, here)}
    for late in (False, True):
        for name, build in built.items():
            if late and name.startswith(("sample", "prefix_attention")):
                continue
            if late and here.rehearsal and not name.startswith("linear_logprob"):
                continue
            what = f"{name}, compiled rivals" if late else name
            made[what] = functools.partial(measure, here, build, late)
    return made


def peers(here: Here) -> None:
    for name, module in PEERS.items():
        there = importlib.util.find_spec(module) is not None
        here.row(name, "installed" if there else "not installed", who=name)


def measure(here: Here, build: Callable[[], OpCase], late: bool) -> None:
    """Time the works in turns: medians, peak memory, and the floor over the median."""
    torch._dynamo.reset()
    if here.device == "cuda":
        torch.cuda.empty_cache()
    case = build()
    works = {
        name: work
        for name, work in case.works.items()
        if name == "meal-fast" or (name in COMPILED) == late
    }
    turns = Turns(works, here.device)
    for _ in range(1 if here.rehearsal else ROUNDS[here.device]):
        turns.run()
        turns.run_others()
    floor = here.floor_s(case.flops, case.moved, launches=1)
    if not late:
        here.row(f"{case.op}, measured floor", case.floor(turns.meter) * 1e6, "µs", who="floor")
    for name, seconds in turns.medians().items():
        note = f"peak {turns.peaks[name]:.0f} MiB"
        here.row(case.op, seconds * 1e6, "µs", floor=floor * 1e6, who=name, note=note)
