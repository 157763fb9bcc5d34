"""How many CPU threads a run computes with, and that they give the same sums each time.

A sum that is split over two threads is rounded otherwise than one that is not, a different last
digit is sooner or later another sampled token, and then another run. So the number is saved with a
run, and set again by whatever goes on with it. Importing this file imports no torch.
"""

from __future__ import annotations

import os
from pathlib import Path


def automatic() -> int:
    """Count the processor cores that this process may run on (their hyper-threads count once).

    Of the machine alone: neither its load nor OMP_NUM_THREADS changes it.
    """
    if not hasattr(os, "sched_getaffinity"):  # not Linux
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.is_file() else str(cpu))
    return len(cores)


def use_threads(threads: int) -> int:
    """Let torch compute with `threads` threads, 0: `automatic()`, whatever the load; the number.

    Raises ValueError under OMP_DYNAMIC, which would leave the number to the load of the machine,
    and under an OMP_THREAD_LIMIT below it: oneDNN's products would be wrong, not slow.
    """
    import torch

    if os.environ.get("OMP_DYNAMIC", "").strip().lower() in ("true", "1"):
        raise ValueError(
            f"OMP_DYNAMIC={os.environ['OMP_DYNAMIC']!r}: lets the load of the machine choose the "
            "number of threads, and so the last digits; unset it"
        )
    threads = threads or automatic()
    limit = os.environ.get("OMP_THREAD_LIMIT", "").strip()
    if limit.isdigit() and int(limit) < threads:
        raise ValueError(
            f"OMP_THREAD_LIMIT={limit!r}: fewer than the {threads} threads of this run; unset it, "
            f"or use --threads {limit}"
        )
    # Besides the number this switches off MKL's own choice of fewer threads, on until then.
    torch.set_num_threads(threads)
    return threads


def same_sums(on: bool) -> None:
    """Let torch take the CPU algorithms whose sums do not depend on which thread is first, or not.

    One that did: the gradient of `x[places]` where places repeat, which two threads and more add up
    in whatever order they come. In order it is quicker as well. On a GPU it would be slower, and
    what runs there needs it nowhere.
    """
    import torch

    torch.use_deterministic_algorithms(on, warn_only=True)
    # Nothing here reads memory that it has not written. (A property of the module's own class.)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
