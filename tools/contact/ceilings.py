"""What is here, and what it can do at most: a copy, a matrix product, a launch."""

from __future__ import annotations

import platform
import subprocess
import time

import torch

from bench.measure import Meter
from tools.contact.here import Cases, Here
from tools.contact.programs import program

CARD = "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem"
PROGRAMS = {
    "nvidia-smi": [CARD, "--format=csv,noheader"],
    "nvcc": ["--version"],
    "ncu": ["--version"],
    "compute-sanitizer": ["--version"],
}


def cases(here: Here) -> Cases:
    return {"versions": lambda: versions(here), "ceilings": lambda: measure(here)}


def versions(here: Here) -> None:
    """What is installed; a program's last line."""
    here.row("python", platform.python_version(), who="machine")
    for name, options in PROGRAMS.items():
        path = program(name)
        said = "not installed"
        if path:
            done = subprocess.run([path, *options], capture_output=True, text=True, timeout=20)
            said = (done.stdout.strip() or done.stderr.strip() or "says nothing").splitlines()[-1]
        here.row(name, said, who="machine")
    if here.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        said = f"{card.multi_processor_count} multiprocessors, {card.total_memory >> 20} MiB"
        here.row("card", said, who="machine")


def measure(here: Here) -> None:
    """Set `here.ceilings`, and say them. The bytes of a copy are those read and those written."""
    here.case = here.case or "ceilings"
    meter = Meter(here.device)
    size = 4 << 20 if here.rehearsal else 2 << 30
    copied = 2 * size / copy_s(meter, size)
    n = 256 if here.rehearsal else 8192
    a, b = (torch.randn(n, n, device=here.device, dtype=torch.bfloat16) for _ in range(2))
    product = 2.0 * n**3 / meter.median(lambda: a @ b)
    launch = launch_s(here.device, 100 if here.rehearsal else 2000)
    here.ceilings = {"bytes_per_s": copied, "flop_per_s": product, "launch_s": launch}
    here.tell(ceilings=here.ceilings)
    here.row("copy on the device, bytes read and written", copied / 1e9, "GB/s", who="machine")
    here.row(f"bfloat16 product of {n}³", product / 1e12, "TFLOP/s", who="machine")
    here.row("a launch, one after the other", launch * 1e6, "µs", who="machine")
    if here.device == "cuda":
        here.row("a kernel in a replayed graph", graph_s() * 1e6, "µs", who="machine")


def copy_s(meter: Meter, size: int) -> float:
    source = torch.ones(size, dtype=torch.int8, device=meter.device)
    target = torch.empty_like(source)
    return meter.median(lambda: target.copy_(source))


def launch_s(device: str, count: int) -> float:
    """Seconds of the host for a kernel that does nothing to speak of."""
    x = torch.zeros(1, device=device)
    for _ in range(2):  # the first round warms up
        begin = time.perf_counter()
        for _ in range(count):
            x.add_(1)
        if device == "cuda":
            torch.cuda.synchronize()
        took = time.perf_counter() - begin
    return took / count


def graph_s(kernels: int = 500) -> float:
    """Seconds that each of many such kernels takes where they are one graph."""
    x = torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(kernels):
            x.add_(1)
    graph.replay()
    return Meter("cuda").median(graph.replay) / kernels
