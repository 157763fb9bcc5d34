"""compute-sanitizer on csrc's sampler and on kernels in Triton, at sizes of a few blocks."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import time

from tools.contact.here import Cases, Here
from tools.contact.programs import program

TOOLS = {
    "memcheck": re.compile(r"ERROR SUMMARY: (\d+) error"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) error"),
}
NAMES = ("sample", "linear_policy_loss", "prefix_attention")
LAST = 2.0


def cases(here: Here) -> Cases:
    return {"memcheck and racecheck": functools.partial(run, here)}


def command(here: Here, path: str | None, tool: str, name: str) -> list[str]:
    names = name.split(", ")
    target = [sys.executable, "-m", "tools.contact.targets", "--device", here.device, *names]
    if path is None:
        return target
    # torch and Triton ask the driver for what it may not have: no error of a kernel's.
    only = ["--report-api-errors", "no"] if tool == "memcheck" else []
    return [path, "--tool", tool, "--print-limit", "20", *only, *target]


def errors(tool: str, said: str) -> int | None:
    """How many the tool's last line counts; None where it does not come to one."""
    found = TOOLS[tool].findall(said)
    return int(found[-1]) if found else None


def run(here: Here) -> None:
    """All at once: most of the time of each is Python's, and kernels are compiled on the CPU."""
    path = None if here.rehearsal else program("compute-sanitizer")
    if path is None:
        why = "a rehearsal: the programs run without it" if here.rehearsal else "not installed"
        here.row("compute-sanitizer", why, who="machine")
    tools, names = (TOOLS, NAMES) if path else (("no tool",), (", ".join(NAMES),))
    # Without a pool of its own torch gives every tensor its own end, which memcheck can see.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    begin = time.monotonic()
    running = {}
    for tool in tools:
        for name in names:
            log = here.folder / f"{tool}-{name}.txt"
            running[tool, name] = log, subprocess.Popen(
                command(here, path, tool, name), env=environment, stdout=log.open("w"),
                stderr=subprocess.STDOUT,
            )  # fmt: skip
    while running:
        for (tool, name), (log, process) in list(running.items()):
            late = here.left() < LAST
            if process.poll() is None and not late:
                continue
            process.kill()
            process.wait()
            del running[tool, name]
            report(here, tool, name, log.read_text(), process.returncode, late)
        time.sleep(0.2)
    here.row("all of them at once", time.monotonic() - begin, "s")


def report(here: Here, tool: str, name: str, said: str, status: int, late: bool) -> None:
    ran = re.search(r"ran as (\w+)", said)
    note = ran[0] if ran else ""
    if tool == "no tool":
        here.row(f"{name}, {tool}", status, "exit status", ok=status == 0 and not late, note=note)
    else:
        count = errors(tool, said)
        figure = "not finished in time" if late else "no summary" if count is None else count
        ok = not late and count == 0 and ran is not None
        here.row(f"{name}, {tool}", figure, "errors", ok=ok, note=note)
    if late or status != 0 or (tool != "no tool" and errors(tool, said) != 0):
        here.fail(f"{name}, {tool}: exit status {status}\n{said[-6000:]}")
