"""A pytest plugin: every test's outcome as a JSON line, at once, so that a cut-off loses none."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

VARIABLE = "FIRST_CONTACT_REPORTS"  # a folder
TEXT = 6000  # characters that are kept of a failure, its end


def tell(test: str, outcome: str, seconds: float, text: str) -> None:
    path = Path(os.environ[VARIABLE]) / f"{os.getpid()}.jsonl"
    line = {"test": test, "outcome": outcome, "seconds": seconds, "text": text[-TEXT:]}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # the process that sent it here tells it
        return
    skipped_before = report.when == "setup" and report.skipped
    if report.when == "call" or report.failed or skipped_before:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        tell(report.nodeid, report.outcome, report.duration, reason)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ and report.failed:
        tell(report.nodeid, "failed", 0.0, report.longreprtext)
