"""What csrc/ holds, built on first use where nvcc is found, and loaded: `torch.ops.meal_fast_cuda`.

A build is kept in a cache folder ($MEAL_FAST_CACHE, or meal-fast in $XDG_CACHE_HOME or ~/.cache)
under a name made of all that it depends on: the sources, the command, nvcc's version and torch's.
One process builds and others wait for it; a file is whole or not there, its digest beside it. What
another user could have written there is not loaded. A compile that fails is an error, with what the
compiler said.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

import meal_fast
from meal_fast.common import cache_folder, own, own_folder, write_atomic

log = logging.getLogger(__name__)

# The oldest torch whose stable ABI the sources keep to: 2.11.
ABI = "0x020b000000000000ull"
LINKED = (f"-L{Path(torch.__path__[0], 'lib')}", "-ltorch_cpu")  # where the stable ABI's names are


def csrc() -> Path:
    """Find the folder of the sources: beside the package in a checkout, inside it in a wheel."""
    inside = Path(meal_fast.__path__[0], "csrc")
    return inside if inside.is_dir() else Path(meal_fast.__path__[0]).parent / "csrc"


@functools.cache
def nvcc() -> str | None:
    """Find the compiler: $CUDA_HOME's, the one on PATH, or that of /usr/local/cuda."""
    if home := os.environ.get("CUDA_HOME"):
        found = shutil.which(str(Path(home, "bin", "nvcc")))
    else:
        found = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if found is None:
        log.warning("nvcc is not here: what csrc/ has in CUDA C++ runs in Triton instead")
    return found


def architecture(capability: tuple[int, int]) -> str:
    """Give nvcc's name for a compute capability; Hopper's has its own instructions with an `a`."""
    major, minor = capability
    return f"{major}{minor}a" if capability == (9, 0) else f"{major}{minor}"


def command(compiler: str, source: Path, arch: str, *options: str) -> list[str]:
    include = Path(torch.__path__[0], "include")
    return [
        compiler, "-O3", "-std=c++20", f"-gencode=arch=compute_{arch},code=sm_{arch}",
        "-Xcompiler=-fPIC", "-Xptxas=-v", f"-DTORCH_TARGET_VERSION={ABI}", f"-I{include}",
        *options, str(source),
    ]  # fmt: skip


def run(compile: list[str]) -> str:
    """Run the compiler and give what it printed; raise RuntimeError with that when it fails."""
    done = subprocess.run(compile, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{' '.join(compile)}: exit status {done.returncode}\n{said}")
    return said


def build(name: str, arch: str, compiler: str) -> Path:
    """Give the library made of csrc/NAME.cu, from the cache or compiled now.

    Raises:
        RuntimeError: the compile failed; the message holds what the compiler said.
        ValueError: others may write in the cache folder.
    """
    source = csrc() / f"{name}.cu"
    compile = command(compiler, source, arch, "-shared", *LINKED)
    parts = [path.read_bytes() for path in sorted(csrc().glob("*.cu*"))]
    parts += [
        " ".join(compile).encode(),
        torch.__version__.encode(),
        run([compiler, "-V"]).encode(),
    ]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folder = own_folder(cache_folder())
    library = folder / f"{name}-sm{arch}-{digest}.so"
    if intact(library):
        return library
    import fcntl  # which Windows does not have

    with open(folder / f"{library.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not intact(library):
            log.warning("building csrc/%s.cu for sm_%s, once", name, arch)
            with tempfile.TemporaryDirectory(dir=folder) as here:
                made = Path(here, library.name)
                log.info("%s", run([*compile, "-o", str(made)]))
                made.chmod(0o700)
                write_atomic(noted(library), sha256_of(made))
                os.replace(made, library)
    return library


def noted(library: Path) -> Path:
    """Name the file beside a library that holds its digest."""
    return library.with_name(f"{library.name}.sha256")


def intact(library: Path) -> bool:
    """Tell whether a library is there, whole. Raises ValueError where it may be another user's.

    The digest is against damage; whoever could write the library could write that as well.
    """
    if not (library.is_file() and noted(library).is_file()):
        return False
    for path in (library, noted(library)):
        own(path)
    return noted(library).read_text(encoding="ascii", errors="replace") == sha256_of(library)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache
def load(name: str, capability: tuple[int, int]) -> None:
    """Make the ops of csrc/NAME.cu known to torch, for a GPU of this compute capability."""
    compiler = nvcc()
    assert compiler is not None
    torch.ops.load_library(str(build(name, architecture(capability), compiler)))
