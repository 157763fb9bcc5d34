"""The README's tables of measurements, from the rows in bench/results/: `make bench-table`.

    python bench/table.py [--check]

Of each bench and case the newest row counts. Between `<!-- bench: DEVICE -->` and `<!-- /bench -->`
the README is written again; with --check it is compared, and the exit status is 1 when it differs.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

import rows

README = rows.HERE.parent / "README.md"
PLACE = re.compile(r"(<!-- bench: (?P<device>\w+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
OURS = "meal-fast"
Row = dict[str, Any]


def newest(given: list[Row]) -> list[Row]:
    """One row a case, in the order in which the cases first came."""
    return list({(row["op"], row["case"]): row for row in given if "op" in row}.values())


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def memory(mib: float) -> str:
    return f"{mib / 1024:.2g} GiB" if mib >= 1000 else f"{mib} MiB"


def cell(row: Row, name: str) -> str:
    """Time and memory; a rival's time also as a multiple of ours."""
    if name not in row["seconds"]:
        return "–"
    seconds = row["seconds"][name]
    times = f" (×{seconds / row['seconds'][OURS]:.2g})" if name != OURS else ""
    return f"{duration(seconds)}{times}, {memory(row['peak_mib'][name])}"


def table(given: list[Row]) -> str:
    found = newest(given)
    if not found:
        return "Nothing measured yet.\n"
    names = list(dict.fromkeys(name for row in found for name in row["seconds"]))
    lines = [
        "| " + " | ".join(["op", "case", *names]) + " |",
        "|---" * (2 + len(names)) + "|",
    ]
    for row in found:
        cells = [f"`{row['op']}`", row["case"], *(cell(row, name) for name in names)]
        lines.append("| " + " | ".join(cells) + " |")
    last = found[-1]
    machine, versions = last["machine"], last["versions"]
    where = last["device"] if last["device"] != "cpu" else f"{machine['cores']} cores"
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines += ["", f"`{last['command']}` on {where} of {machine['cpu']}; {software}."]
    return "\n".join(lines) + "\n"


def rendered(text: str, results: Path = rows.RESULTS) -> str:
    def write(place: re.Match[str]) -> str:
        path = results / f"{place['device']}.jsonl"
        made = table(rows.read(path) if path.exists() else [])
        return place[1] + made + place[3]

    return PLACE.sub(write, text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python bench/table.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    text = README.read_text(encoding="utf-8")
    made = rendered(text)
    if check and made != text:
        print("README.md: its tables are not those of bench/results; run make bench-table")
        return 1
    README.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
