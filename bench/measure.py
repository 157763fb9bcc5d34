"""Timing in turns: an op and its rivals, A B C A B C, medians, and how much memory each took."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Work = Callable[[], object]
ROUNDS = {"cpu": 3, "cuda": 9}
FLUSHED_BYTES = 512 << 20  # several times a GPU's level-2 cache


class Meter:
    """Seconds and peak memory of a piece of work on a device."""

    def __init__(self, device: str) -> None:
        self.device = device
        # Written before each call on a GPU, so that the call finds the cache cold.
        self.cache = torch.empty(FLUSHED_BYTES if device == "cuda" else 0, dtype=torch.int8)
        self.cache = self.cache.to(device)

    def seconds(self, work: Work) -> float:
        if self.device == "cpu":
            start = time.perf_counter()
            work()
            return time.perf_counter() - start
        self.cache.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def peak_mib(self, work: Work) -> float:
        """How far `work` raises the memory in use at its highest. On a CPU: Linux only."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            work()
            torch.cuda.synchronize()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        # Garbage and freed heap would hide what the work takes.
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = status_mib("VmRSS")
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # the high-water mark starts again from here
        work()
        return status_mib("VmHWM") - before

    def median(self, work: Work) -> float:
        work()
        return statistics.median(self.seconds(work) for _ in range(ROUNDS[self.device]))


class Turns:
    """Ours, the first of `given`, and the others, one after the other and again."""

    def __init__(self, given: dict[str, Work], device: str) -> None:
        self.given, self.meter = given, Meter(device)
        self.name = next(iter(given))
        self.peaks = {key: self.meter.peak_mib(work) for key, work in given.items()}  # warms up
        self.took: dict[str, list[float]] = {key: [] for key in given}

    def run(self) -> None:
        self.took[self.name].append(self.meter.seconds(self.given[self.name]))

    def run_others(self) -> None:
        for key in self.given:
            if key != self.name:
                self.took[key].append(self.meter.seconds(self.given[key]))

    def medians(self) -> dict[str, float]:
        return {key: statistics.median(times) for key, times in self.took.items()}


def status_mib(field: str) -> float:
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) / 1024


def compare(
    benchmark: Any,
    op: str,
    case: str,
    given: dict[str, Work],
    *,
    device: str = "cpu",
    floor: Callable[[Meter], float] | None = None,
    flops: float = 0,
    moved: float = 0,
) -> None:
    """Time the first of `given`, ours, and the others in turns, after a run for peak memory.

    Args:
        floor: seconds that no implementation of the op can do without, measured here.
        flops, moved: of matrix products, and bytes to and from memory, that the op must do.
    """
    turns = Turns(given, device)
    meter, name, peaks = turns.meter, turns.name, turns.peaks
    benchmark.pedantic(turns.run, setup=turns.run_others, rounds=ROUNDS[device])
    medians = turns.medians()
    info: dict[str, Any] = {
        "op": op,
        "case": case,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "seconds": {key: float(f"{value:.4g}") for key, value in medians.items()},
        "peak_mib": {key: round(peak) for key, peak in peaks.items()},
        "threads": torch.get_num_threads(),
    }
    if floor is not None:
        least = floor(meter)
        info |= {"floor_s": float(f"{least:.4g}"), "of_floor": round(least / medians[name], 3)}
    if flops:
        info["tflop_per_s"] = float(f"{flops / medians[name] / 1e12:.4g}")
    if moved:
        info["gb_per_s"] = float(f"{moved / medians[name] / 1e9:.4g}")
    benchmark.group = op
    benchmark.extra_info |= info
