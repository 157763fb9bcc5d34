"""The rules of the house that a reader could check by eye, and would not."""

import ast
import graphlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import meal_fast

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "meal_fast"

# A module imports from its own row (without cycles) and the rows above; a package counts as one.
LAYERS = (
    ("common", "data_types"),
    ("config",),
    ("ops",),
    ("data",),
    ("models",),
    ("rollout",),
    ("training",),
    ("evaluation",),
    ("serving",),
    (
        "__main__",
        "train",
        "evaluate",
        "chat",
        "serve",
        "compare",
        "report",
        "assets",
        "demo",
        "export",
        "plan",
    ),
    ("integrations",),  # for other trainers: no part of ours
)
ROW = {name: row for row, names in enumerate(LAYERS) for name in names}

Imports = dict[str, set[str]]


def imported(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Dotted names that a source imports anywhere in it, relative ones made absolute.

    `from a import b` gives both `a.b`, in case b is a module, and `a`.
    """
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1])
                origin = f"{base}.{origin}".rstrip(".")
            yield from (f"{origin}.{alias.name}" for alias in node.names)
            yield origin


def unit(name: str) -> str:
    """`ops` for `meal_fast.ops.reference`; empty for what is not ours."""
    head, _, rest = name.partition(".")
    return rest.partition(".")[0] if head == "meal_fast" else ""


def house_imports(package: Path) -> Imports:
    """For each top-level module or subpackage of the package, those that it imports."""
    units = {p.stem for p in package.glob("*.py")} | {
        p.name for p in package.iterdir() if (p / "__init__.py").exists()
    }
    units.discard("__init__")
    found: Imports = {name: set() for name in units}
    for path in package.rglob("*.py"):
        parts = ("meal_fast", *path.relative_to(package).with_suffix("").parts)
        is_package = parts[-1] == "__init__"
        module = ".".join(parts[:-1] if is_package else parts)
        if not unit(module):
            names = {n.partition(".")[0] for n in imported(path.read_text(), module, True)}
            assert names <= set(sys.stdlib_module_names)
            continue
        names = {unit(name) for name in imported(path.read_text(), module, is_package)}
        found[unit(module)] |= (names & units) - {unit(module)}
    return found


def wrong_way(imports: Imports) -> list[str]:
    """What breaks the direction: a module without a row, an import from a later row, a cycle."""
    wrong = [f"{name} has no row in LAYERS" for name in sorted(imports) if name not in ROW]
    wrong += [
        f"{name} imports {other}"
        for name, others in sorted(imports.items())
        for other in sorted(others)
        if ROW.get(other, 0) > ROW.get(name, len(LAYERS))
    ]
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        wrong.append("cycle: " + " -> ".join(error.args[1]))
    return wrong


def test_imports_go_one_way():
    imports = house_imports(PACKAGE)
    assert {"config", "ops", "models", "training"} <= set(imports)
    assert "config" in imports["training"] and "ops" in imports["rollout"]
    assert wrong_way(imports) == []


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("common.py", "from .config.config import Config", "common imports config"),
        ("config/rules.py", "import meal_fast.training.trainer", "config imports training"),
        ("config/cli.py", "from meal_fast import models", "config imports models"),
        ("ops/deep.py", "def f():\n    from ..models.policy import Policy", "ops imports models"),
        ("ops/__init__.py", "from .. import models", "ops imports models"),
        (
            "rollout/engine.py",
            "from meal_fast.training.losses.grpo import grpo",
            "rollout imports train",
        ),
        ("stray.py", "", "stray has no row"),
        ("common.py", "from . import data_types", "cycle: "),
    ],
)
def test_the_checker_catches_a_planted_violation(tmp_path, path, source, complaint):
    (tmp_path / "common.py").write_text("from __future__ import annotations\nimport os\n")
    (tmp_path / "data_types.py").write_text("from .common import quiet\n")
    for name in ("config", "ops", "models", "rollout", "training"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    assert wrong_way(house_imports(tmp_path)) == []
    (tmp_path / path).write_text(source)
    wrong = wrong_way(house_imports(tmp_path))
    assert len(wrong) == 1 and wrong[0].startswith(complaint)


def test_the_package_has_few_doors():
    assert len(LAYERS) <= 11
    # A module a command, and four: what a run costs is asked without starting one.
    assert len(list(PACKAGE.glob("*.py"))) <= 14


def outside(folder: str) -> set[str]:
    """Top-level packages, neither ours nor Python's, that the sources at `folder` import."""
    paths = [PACKAGE / folder] if folder.endswith(".py") else list((PACKAGE / folder).rglob("*.py"))
    module = "meal_fast.x" if folder.endswith(".py") else "meal_fast.x.y"
    names = {n.partition(".")[0] for p in paths for n in imported(p.read_text(), module, False)}
    return names - sys.stdlib_module_names - {"meal_fast"}


def test_ops_need_torch_alone_and_the_command_line_nothing():
    assert {"torch"} <= outside("ops") <= {"torch", "triton"}
    assert outside("config") == set()


def test_integrations_know_the_ops_alone_and_no_framework_at_import_time():
    assert house_imports(PACKAGE)["integrations"] == {"ops"}
    assert outside("integrations") == {"torch"}


def run_python(code: str, *flags: str, cwd: Path = ROOT) -> str:
    command = [sys.executable, *flags, "-c", code]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


def test_importing_ops_loads_no_model_library():
    code = "import sys, meal_fast.ops; print(*sys.modules)"
    loaded = set(run_python(code).split())
    assert "meal_fast.ops" in loaded
    assert not {"transformers", "datasets", "accelerate", "peft", "triton"} & loaded


def test_the_kernels_folder_does_not_shadow_huggingface_kernels():
    assert (ROOT / "kernels").is_dir()
    assert not list((ROOT / "kernels").rglob("__init__.py"))
    # `-c` puts the working folder first on sys.path, as a user in a checkout has it.
    code = (
        "import sys, os; assert sys.path[0] == '' and os.path.isdir('kernels')\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8,\n"
        "    num_hidden_layers=1, num_attention_heads=1)\n"
        "print(LlamaForCausalLM(config).num_parameters())"
    )
    assert int(run_python(code)) > 0


def test_kernels_and_csrc_have_their_names_in_a_checkout():
    code = (
        "from importlib.resources import files; from meal_fast import csrc, kernels\n"
        "print([files(m).joinpath('README.md').is_file() for m in (csrc, kernels)])"
    )
    assert run_python(code).strip() == "[True, True]"


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file()]


# Written apart, so that this file does not contain what it looks for.
FORBIDDEN = re.compile(
    "|".join(
        [
            r"(?<![\w.])/(?:"
            + "|".join(["ho" + "me", "ro" + "ot", "wo" + "rk", "o" + "pt"])
            + r")/\w",
            r"py" + r"pi\.org",
            r"python" + r"hosted",
            r"registry\.n" + r"pmjs",
            r"download\.py" + r"torch",
        ]
    )
)


def test_no_machine_path_or_registry_host_in_tracked_files():
    texts = [p for p in tracked() if p.suffix not in {".png", ".pt", ".safetensors", ".gguf"}]
    assert ROOT / "pyproject.toml" in texts
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if FORBIDDEN.search(line)
    ]
    assert found == []
    for planted in ("cd /ho" + "me/ann/x", "--index-url https://py" + "pi.org/simple"):
        assert FORBIDDEN.search(planted)


def test_source_files_stay_readable_in_one_sitting():
    sources = [p for p in tracked() if p.suffix in {".py", ".cu", ".cuh", ".cpp"}]
    assert PACKAGE / "config" / "config.py" in sources
    lengths = {
        str(p.relative_to(ROOT)): len(p.read_text().splitlines())
        for p in sources
        if "tests" not in p.relative_to(ROOT).parts
    }
    assert {name: n for name, n in lengths.items() if n > 400} == {}


def test_every_package_is_listed_for_the_wheel():
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {
        ".".join(("meal_fast", *p.parent.relative_to(PACKAGE).parts))
        for p in PACKAGE.rglob("__init__.py")
    }
    assert set(listed) == there | {"meal_fast.kernels", "meal_fast.csrc"}


def test_the_version_is_one_number_and_in_the_changelog():
    assert re.fullmatch(r"\d+\.\d+\.\d+", meal_fast.__version__)
    assert re.search(r"^## \[(Unreleased|0\.1\.0)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)


@pytest.mark.slow
def test_the_tests_are_the_same_in_every_process():
    """Workers that collect in other orders (a set's, say) run nothing at all."""
    collect = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider"]
    orders = [
        subprocess.run(
            [*collect, "tests", "-m", "slow or not slow"],
            cwd=ROOT,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=300,
        ).stdout.splitlines()[:-1]
        for seed in ("1", "2")
    ]
    assert orders[0] == orders[1] and len(orders[0]) > 1000
