"""What runs by itself: .ci/run, the workflow that calls it, the hooks before a commit."""

import os
import re
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]


def test_continuous_integration_runs_what_a_developer_runs():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    (listed,) = re.findall(
        r"^for target in ([\w -]+); do$", (ROOT / ".ci" / "run").read_text(), re.M
    )
    assert {"lint", "test", "docs"} <= set(listed.split()) <= targets
    assert subprocess.run(["bash", "-n", ROOT / ".ci" / "run"]).returncode == 0


def test_the_workflow_gives_ci_run_a_machine_and_decides_nothing():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert set(workflow[True]) == {"pull_request", "push"}  # YAML reads the key `on` as true
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_hooks_are_the_tools_of_make_lint():
    settings = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (repository,) = settings["repos"]
    assert repository["repo"] == "local"
    tools = {hook["entry"].split()[0] for hook in repository["hooks"]}
    assert tools == {".venv/bin/ruff", ".venv/bin/mypy"}
    for hook in repository["hooks"]:
        assert {"id", "name", "entry", "language"} <= hook.keys() and hook["language"] == "system"
