"""Every kernel compiles for GPUs that are not here, and keeps to registers and tensor cores."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton has no build for this platform")

from tools import sass

ROOT = Path(__file__).resolve().parents[2]


def compiled(*arguments: str) -> tuple[int, list[dict]]:
    """(exit status, rows) of the tool, in a process of its own: this one may have the interpreter
    on, which is decided where a kernel is defined."""
    command = [sys.executable, "-m", "tools.sass", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1) and not done.stderr.count("Traceback"), done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def is_sound(arch: int, *options: str) -> None:
    status, rows = compiled("--arch", str(arch), *options)
    assert {row["name"]: row["problems"] for row in rows if row["problems"]} == {}
    assert status == 0
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names) and {row["arch"] for row in rows} == {arch}
    assert any(row["matrix"] for row in rows)
    for row in rows:
        assert row["programs"] >= 1 and row["registers"] > 0 and row["floor_us"] > 0, row
        if row["name"].startswith("linear parts") and arch >= 90:
            assert row["bulk_copy"] > 0, row  # both operands come through the copy engine


def test_every_kernel_is_sound_on_hopper():
    is_sound(90, "--model", "Qwen2-0.5B")


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_is_sound_for_every_model(arch):
    is_sound(arch)


def test_every_module_of_kernels_lists_its_cases():
    modules = sass.kernel_modules()
    assert "meal_fast.kernels.linear_logprob" in modules
    for name in modules:
        source = (ROOT / "kernels" / f"{name.rpartition('.')[2]}.py").read_text()
        assert "\ndef compile_cases(capability: int = 90) -> list[Case]:" in source, name


def test_planted_faults_are_found():
    status, rows = compiled("tests.helpers.planted_kernels")
    assert status == 1
    assert {row["name"]: row["problems"] for row in rows} == {
        "spilling": ["spills"],
        "no tensor core": ["no HGMMA"],
    }
    assert all(row["spilled"] for row in rows if row["name"] == "spilling")


ROW = sass.Row("k", 90, 168, 0, 200_000, 4, 8, 8, 1, 12.5, "matrix", True)


def test_the_judgement_and_the_line_of_the_table():
    assert ROW.problems() == []
    assert len(sass.line(ROW).split()) == len(sass.HEADER.replace("KB", "").split()) - 1
    large = dataclasses.replace(ROW, shared=227 * 1024 + 1)
    assert large.problems() == ["shared memory over 227 KB"]
    assert sass.line(large).endswith("<- shared memory over 227 KB")
    assert dataclasses.replace(ROW, spilled=8).problems() == ["spills"]
    assert dataclasses.replace(ROW, arch=100, spilled=8).problems() == []
    assert dataclasses.replace(ROW, arch=80, shared=164 * 1024).problems() == [
        "shared memory over 163 KB"
    ]


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "arch", "programs"),
    [
        (32, 4, 0, 90, 16),  # 64 warps
        (32, 1, 0, 90, 32),  # 32 blocks
        (255, 8, 0, 90, 1),  # two warps of 8192 registers a quarter
        (245, 4, 0, 90, 2),
        (129, 4, 0, 90, 3),  # 136 once rounded up, so 3 warps a quarter
        (32, 4, 113 * 1024, 90, 2),
        (32, 4, 114 * 1024, 90, 1),
        (32, 4, 82 * 1024, 80, 1),
    ],
)
def test_occupancy(registers, warps, shared, arch, programs):
    assert sass.programs_a_multiprocessor(registers, warps, shared, arch) == programs
