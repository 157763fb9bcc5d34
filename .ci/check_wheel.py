"""Install a wheel into an empty folder and use it from there: `check_wheel.py WHEEL`.

The dependencies come from the environment that runs this; the package must come from the wheel.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

PROBE = """
import pathlib, sys
import meal_fast, meal_fast.ops, meal_fast.kernels, meal_fast.csrc
root = pathlib.Path(sys.argv[1]).resolve()
for module in (meal_fast, meal_fast.ops, meal_fast.kernels, meal_fast.csrc):
    for place in module.__path__:
        assert root in pathlib.Path(place).resolve().parents, f"{module.__name__} from {place}"
heavy = {"transformers", "datasets", "accelerate"} & set(sys.modules)
assert not heavy, heavy
print("meal_fast", meal_fast.__version__, "from the wheel;", len(meal_fast.ops.__all__), "ops")
"""


def main() -> None:
    wheel = Path(sys.argv[1]).resolve()
    checkout = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "site")
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target]
        subprocess.run([*install, wheel], check=True)
        package = target / "meal_fast"
        for name in ("kernels", "csrc"):
            here = {p.name for p in (checkout / name).iterdir() if p.is_file()}
            there = {p.name for p in (package / name).iterdir() if p.is_file()}
            if missing := here - there:
                sys.exit(f"not in the wheel: {name}/{', '.join(sorted(missing))}")
        if found := list(package.rglob("kernels/__init__.py")) or list(target.glob("kernels*")):
            sys.exit(f"in the wheel, but shadows HuggingFace's kernels: {found[0]}")
        env = os.environ | {"PYTHONPATH": str(target)}
        subprocess.run([sys.executable, "-P", "-c", PROBE, target], check=True, cwd=folder, env=env)
        script = [sys.executable, target / "bin" / "meal-fast"]
        subprocess.run([*script, "--version"], check=True, cwd=folder, env=env)
        # A run with its report: what the package needs of its own files is in the wheel.
        tiny = ["train", "tiny", "--out", "run", "--meta.steps", "1", "--evaluation.grid", "3"]
        subprocess.run([*script, *tiny], check=True, cwd=folder, env=env)
        if not Path(folder, "run", "report.html").is_file():
            sys.exit("the wheel's own run left no report")


if __name__ == "__main__":
    main()
