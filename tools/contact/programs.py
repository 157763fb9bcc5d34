"""The CUDA toolkit's programs, which need not be on the PATH."""

from __future__ import annotations

import os
import shutil


def program(name: str) -> str | None:
    """The path of `name`; None where it is not installed."""
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home and (found := shutil.which(os.path.join(home, "bin", name))):
            return found
    return shutil.which(name)
