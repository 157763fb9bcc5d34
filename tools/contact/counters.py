"""What ncu counts in four kernels: how near each comes to the memory's rate and the units'."""

from __future__ import annotations

import csv
import functools
import subprocess
import sys
from collections.abc import Iterator

from tools.contact.here import Cases, Here
from tools.contact.programs import program

METRICS = {
    "gpu__time_duration.sum": "duration",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory's rate",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "multiprocessors' rate",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps in flight",
    "launch__registers_per_thread": "registers a thread",
}
NAMES = ("linear_logprob", "linear_policy_loss", "prefix_attention", "sample")
# Of a target's kernels those that are ours; the products and copies around them are not.
OURS = "regex:_parts_kernel|_stats|_gradient|_prefix_kernel|_tail_kernel|sample"
SECONDS = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "s": 1.0}  # by how the unit's name begins


def cases(here: Here) -> Cases:
    names = (", ".join(NAMES),) if here.rehearsal else NAMES
    return {name: functools.partial(run, here, name) for name in names}


def command(path: str | None, name: str, device: str) -> list[str]:
    names = name.split(", ")
    target = [sys.executable, "-m", "tools.contact.targets", "--device", device, *names]
    if path is None:
        return target
    # The clocks are left as they are: they belong to everybody on the machine.
    options = ["--clock-control", "none", "--profile-from-start", "off", "--csv"]
    options += ["--kernel-name", OURS, "--launch-count", "6", "--metrics", ",".join(METRICS)]
    return [path, *options, *target, "--large", "--profile"]


def rows(said: str) -> Iterator[tuple[str, str, float, str]]:
    """Kernel, what, figure and unit of `ncu --csv`, whose lines before the header are its own.

    A duration is given in microseconds. What ncu could not count ("n/a") is left out.
    """
    text = said.splitlines()
    start = next((i for i, line in enumerate(text) if line.startswith('"ID",')), len(text))
    for row in csv.DictReader(text[start:]):
        what, value = METRICS.get(row["Metric Name"] or ""), row["Metric Value"] or ""
        try:
            figure = float(value.replace(",", ""))
        except ValueError:
            continue
        if what is None:
            continue
        unit = row["Metric Unit"]
        if what == "duration":
            figure, unit = figure * SECONDS[unit[0]] * 1e6, "µs"
        yield row["Kernel Name"].partition("(")[0], what, figure, unit


def run(here: Here, name: str) -> None:
    path = None if here.rehearsal else program("ncu")
    if path is None:
        why = "a rehearsal: the program runs without it" if here.rehearsal else "not installed"
        here.row("ncu", why, who="machine")
        if not here.rehearsal:
            return
    done = subprocess.run(
        command(path, name, here.device), capture_output=True, text=True, timeout=here.left()
    )
    said = done.stdout + done.stderr
    found = list(rows(done.stdout))
    for kernel, what, figure, unit in found:
        here.row(f"{kernel}, {what}", figure, unit)
    ok = done.returncode == 0 and (bool(found) or path is None)
    here.row("figures that ncu gave", len(found), ok=ok)
    if not ok:
        here.fail(f"{name}: exit status {done.returncode}\n{said[-6000:]}")
