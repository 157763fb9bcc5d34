"""docs/reliability.md, written by the test run: `make reliability`.

A test that shows how a fault ends is marked `@pytest.mark.reliability(KIND, WHAT)`; figures that it
takes are recorded by pytest's own `record_property(NAME, VALUE)`.
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import pytest

MARK = "reliability"
KINDS = {
    "silent": "A wrong number that nobody would have seen",
    "lost": "Work or time lost",
    "fault": "Kills, full disks, damaged folders",
    "attack": "Hostile input",
    "message": "Messages: the value and the remedy",
    "hour": "A first hour",
}

HEAD = """\
# Reliability

What goes wrong in this trade, and how it ends here: right, or refused in one line that names the
value and the remedy. Written by `make reliability`, which runs the tests below (minutes; they are
part of `make test` and `make test-slow` too); a test with several inputs counts once for each.
"""


def note_mark(item: pytest.Item) -> None:
    """Put a test's mark where its report carries it, across processes too."""
    mark = item.get_closest_marker(MARK)
    if mark is None:
        return
    kind, what = mark.args
    if kind not in KINDS:
        raise ValueError(f"{item.nodeid}: reliability({kind!r}, …); choose from {', '.join(KINDS)}")
    item.user_properties.append((MARK, (kind, what)))


@dataclass
class Row:
    """One test: what it tries, and how its inputs ended."""

    kind: str
    what: str
    test: str
    ended: Counter[str] = field(default_factory=Counter)

    @property
    def run(self) -> int:
        return self.ended["passed"] + self.ended["failed"]


class Page:
    """Collect the reports of marked tests, and write the page when the run is over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[str, str, str], Row] = {}
        self.figures: list[tuple[str, str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        given = [value for name, value in report.user_properties if name == MARK]
        counts = report.when == "call" or report.outcome != "passed"  # a failing fixture, too
        if not given or not counts:
            return
        kind, what = given[0]
        test = report.nodeid.partition("[")[0]
        row = self.rows.setdefault((kind, what, test), Row(kind, what, test))
        row.ended[report.outcome] += 1
        for name, value in report.user_properties:
            if name != MARK:
                self.figures.append((name, str(value), test))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not hasattr(session.config, "workerinput"):
            self.path.write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """Give the page."""
        lines = [HEAD, "| kind | passed | of |", "|---|---|---|"]
        for kind, title in KINDS.items():
            rows = [row for row in self.rows.values() if row.kind == kind]
            passed = sum(row.ended["passed"] for row in rows)
            lines.append(f"| {title} | {passed} | {sum(row.run for row in rows)} |")
        if self.figures:
            lines += ["", "## Figures", "", "| what | measured | by |", "|---|---|---|"]
            lines += [
                f"| {cell(n)} | {cell(v)} | `{test}` |" for n, v, test in sorted(self.figures)
            ]
        for kind, title in KINDS.items():
            lines += ["", f"## {title}", "", "| what was tried | passed | test |", "|---|---|---|"]
            for row in sorted(self.rows.values(), key=lambda row: (row.test, row.what)):
                if row.kind == kind:
                    ended = f"{row.ended['passed']} of {row.run}" if row.run else "not run here"
                    lines.append(f"| {cell(row.what)} | {ended} | `{row.test}` |")
        return "\n".join([*lines, "", machine(), ""])


def cell(text: str) -> str:
    """Make a text one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def machine() -> str:
    """Say where it ran."""
    names = ("torch", "transformers", "peft", "tokenizers", "numpy")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    return (
        f"Run on {os.cpu_count()} cores ({platform.machine()}), Python "
        f"{platform.python_version()}, {versions}."
    )
