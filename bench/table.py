"""The tables of measurements, from the rows in bench/results/: `make bench-table`.

    python -m bench.table [--check]

Of each bench and case the newest row counts. docs/results.md is written again between
`<!-- bench: DEVICE -->` and `<!-- /bench -->`, and docs/gpu-measured.md between
`<!-- gpu-check -->` and `<!-- /gpu-check -->` from what `make gpu-check` wrote; with --check they
are compared, and the exit status is 1 when one differs.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from bench import rows

OPS = rows.HERE.parent / "docs" / "results.md"
PLACE = re.compile(r"(<!-- bench: (?P<device>[\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
MEASURED = rows.HERE.parent / "docs" / "gpu-measured.md"
CHECKED = re.compile(r"(<!-- gpu-check -->\n).*?(<!-- /gpu-check -->)", re.DOTALL)
SHARE = "share of "  # of a kernel, in the time of a profile
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


def rendered_checked(text: str, results: Path = rows.RESULTS) -> str:
    return CHECKED.sub(lambda place: place[1] + checked(results) + place[2], text)


def checked(results: Path = rows.RESULTS) -> str:
    """What `make gpu-check` measured, a section for each card; rehearsals are left out."""
    made = []
    for path in sorted(results.glob("*.jsonl")):
        given = [row for row in rows.read(path) if "part" in row and not row.get("rehearsal")]
        if given:
            made.append(card(given))
    return "\n".join(made) or "Nothing has been measured on a card yet.\n"


def card(given: list[Row]) -> str:
    """One card's newest rows, a table for each part."""
    key = ("part", "case", "what", "who")
    found = list({tuple(row[k] for k in key): row for row in given}.values())
    last = found[-1]
    software = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    lines = [
        f"## {last['device']}",
        "",
        f"{last['date'][:10]}, commit {last['commit']}; {software}.",
    ]
    for part in dict.fromkeys(row["part"] for row in found):
        lines += ["", f"### {part}", "", "| case | what | measured | of the floor | others |"]
        lines.append("|---|---|---|---|---|")
        lines += part_lines([row for row in found if row["part"] == part])
    return "\n".join(lines) + "\n"


def part_lines(found: list[Row]) -> list[str]:
    """One line for each case and what was measured of it; the kernels of a profile in one."""
    lines = []
    kernels: dict[str, list[str]] = {}
    grouped: dict[tuple[str, str], list[Row]] = {}
    for row in found:
        if row["what"].startswith(SHARE):
            name = row["what"].removeprefix(SHARE)
            kernels.setdefault(row["case"], []).append(f"`{name}` {100 * row['figure']:.0f} %")
        else:
            grouped.setdefault((row["case"], row["what"]), []).append(row)
    for (case, what), same in grouped.items():
        ours = next((row for row in same if row["who"] == OURS), same[0])
        share = f"{100 * ours['share']:.3g} %" if "share" in ours else "–"
        others = "; ".join(f"{row['who']} {said(row)}" for row in same if row is not ours) or "–"
        lines.append(f"| {case} | {cell_text(what)} | {said(ours)} | {share} | {others} |")
    for case, names in kernels.items():
        lines.append(f"| {case} | time by kernel | {cell_text(', '.join(names))} | – | – |")
    return lines


def cell_text(text: str) -> str:
    """As a table's cell can hold it."""
    return text.replace("|", "\\|").replace("\n", " ")


def said(row: Row) -> str:
    """A row's figure with its unit, a duration in the unit that suits it, and a failure's mark."""
    figure, unit = row["figure"], row["unit"]
    if unit == "µs":
        text = duration(figure * 1e-6)
    else:
        text = f"{figure:.4g} {unit}" if isinstance(figure, float | int) else f"{figure} {unit}"
    failed = " **failed**" if row.get("ok") is False else ""
    return cell_text(text.strip()) + failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    differ = False
    for path, write in ((OPS, rendered), (MEASURED, rendered_checked)):
        text = path.read_text(encoding="utf-8")
        made = write(text)
        if not check:
            path.write_text(made, encoding="utf-8")
        elif made != text:
            print(f"{path.name}: its tables are not those of bench/results; run make bench-table")
            differ = True
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
