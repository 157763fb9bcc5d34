"""Compile every kernel for GPUs that need not be here, and say what came out: `make sass`.

    python -m tools.sass [--arch 80 90 100] [--model NAME] [--json] [module ...]

For each case of each module's `compile_cases()`: registers a thread, bytes spilled, shared memory,
tensor-core and bulk-copy instructions in the machine code, programs that fit a multiprocessor, and
the floor of the running time on an H200, from bytes and operations. A floor is no measurement:
nothing runs here. Exit status 1 when a kernel misses its tensor cores, takes more shared memory
than there is, or spills on Hopper, for which the tiles are chosen.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from meal_fast.kernels.cases import Case

KERNELS = Path(__file__).resolve().parent.parent / "kernels"
# H200, both measured: a copy, and a bfloat16 product of 8192³.
BYTES_PER_SECOND, FLOPS_PER_SECOND = 4.3e12, 790e12

TENSOR_CORE = {80: r"HMMA", 90: r"HGMMA", 100: r"UTC\w*MMA"}
BULK_COPY = r"UTMALDG|UTMASTG|UTMAREDG|UBLKCP"
LOCAL_MEMORY = r"LDL|STL"
KIB = 1024
SHARED_A_BLOCK = {80: 163 * KIB, 90: 227 * KIB, 100: 227 * KIB}
SHARED_RESERVED = KIB  # by the system, in every block
WARPS_A_MULTIPROCESSOR, BLOCKS_A_MULTIPROCESSOR = 64, 32
REGISTERS_A_QUARTER = 16384


@dataclasses.dataclass(frozen=True)
class Row:
    """What one kernel became on one architecture."""

    name: str
    arch: int
    registers: int
    spilled: int  # bytes of stack, or the loads and stores that reach it
    shared: int  # bytes a program
    tensor_core: int  # instructions
    bulk_copy: int  # instructions
    warps: int  # a program
    programs: int  # a multiprocessor
    floor_us: float
    bound: str
    matrix: bool

    def problems(self) -> list[str]:
        found = []
        # Tiles are chosen for Hopper; what spills elsewhere is in the table, and no fault.
        if self.spilled and self.arch == 90:
            found.append("spills")
        if self.matrix and not self.tensor_core:
            found.append(f"no {TENSOR_CORE[self.arch]}")
        if self.shared > SHARED_A_BLOCK[self.arch]:
            found.append(f"shared memory over {SHARED_A_BLOCK[self.arch] // KIB} KB")
        return found


def programs_a_multiprocessor(registers: int, warps: int, shared: int, arch: int) -> int:
    """How many programs fit at once, by registers, shared memory and warps."""
    # Registers are given to a warp in blocks of 256, from a quarter of the multiprocessor.
    warp = math.ceil(registers * 32 / 256) * 256
    by_registers = 4 * (REGISTERS_A_QUARTER // warp) // warps
    by_shared = (SHARED_A_BLOCK[arch] + SHARED_RESERVED) // (shared + SHARED_RESERVED)
    by_warps = WARPS_A_MULTIPROCESSOR // warps
    return min(by_registers, by_shared, by_warps, BLOCKS_A_MULTIPROCESSOR)


def compile_case(case: Case, arch: int) -> Row:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.fn.arg_names
    given = [*case.signature, *case.constexprs]
    if len(set(given)) < len(given) or not set(given) <= set(names):
        raise ValueError(f"{case.name}: {given} are not distinct arguments of {names}")
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    constexprs = {n: case.constexprs.get(n) for n in names if n not in case.signature}
    aligned = [n for n in names if signature[n].startswith("*") or n in case.divisible]
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    compiled = triton.compile(
        ASTSource(case.fn, signature, constexprs, attrs),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": case.num_warps, "num_stages": case.num_stages},
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])

        def dump(option: str) -> str:
            command = [triton.knobs.nvidia.cuobjdump.path, option, str(cubin)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", dump("--dump-resource-usage"))}
        # A line of machine code: /*0a10*/ [@!P0] OPCODE.MODIFIERS operands
        opcodes = Counter(re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z]\w*)", dump("-sass")))

    def count(pattern: str) -> int:
        return sum(n for opcode, n in opcodes.items() if re.fullmatch(pattern, opcode))

    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    memory, matrix = case.bytes / BYTES_PER_SECOND, case.flops / FLOPS_PER_SECOND
    return Row(
        case.name,
        arch,
        usage["REG"],
        usage["STACK"] + usage["LOCAL"] or count(LOCAL_MEMORY),
        shared,
        count(TENSOR_CORE[arch]),
        count(BULK_COPY),
        warps,
        programs_a_multiprocessor(usage["REG"], warps, shared, arch),
        1e6 * max(memory, matrix),
        "matrix" if matrix > memory else "memory",
        case.matrix,
    )


def kernel_modules() -> list[str]:
    """The modules of kernels/ that define a Triton kernel."""
    paths = sorted(KERNELS.glob("*.py"))
    return [f"meal_fast.kernels.{p.stem}" for p in paths if "\n@triton.jit" in p.read_text()]


HEADER = "arch  regs  spill  shared KB  MMA  TMA  warps  per SM  floor us          kernel"


def line(row: Row) -> str:
    said = f"  <- {', '.join(row.problems())}" if row.problems() else ""
    return (
        f"sm_{row.arch:<3}{row.registers:4d}{row.spilled:7d}{row.shared / KIB:11.1f}"
        f"{row.tensor_core:5d}{row.bulk_copy:5d}{row.warps:7d}{row.programs:8d}"
        f"{row.floor_us:10.1f} {row.bound:7s} {row.name}{said}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.sass", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("module", nargs="*", help="default: every module of kernels/")
    parser.add_argument("--arch", type=int, nargs="+", default=[90], choices=sorted(TENSOR_CORE))
    parser.add_argument("--model", help="leave out the cases that name another model")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, no table")
    options = parser.parse_args()

    # With the interpreter on, @triton.jit gives Python functions, which nothing can compile.
    os.environ.pop("TRITON_INTERPRET", None)
    from meal_fast.kernels.cases import HEADS

    if options.model not in (None, *HEADS):
        parser.error(f"--model {options.model}: choose from {', '.join(HEADS)}")
    left_out = set(HEADS) - {options.model} if options.model else set()
    failed = False
    if not options.json:
        print(HEADER)
    for name in options.module or kernel_modules():
        module = importlib.import_module(name)
        for arch in options.arch:
            for case in module.compile_cases(arch):
                if any(model in case.name for model in left_out):
                    continue
                row = compile_case(case, arch)
                failed |= bool(row.problems())
                said = dataclasses.asdict(row) | {"problems": row.problems()}
                print(json.dumps(said) if options.json else line(row), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
