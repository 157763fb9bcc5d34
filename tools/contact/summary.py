"""The table that comes last: what passed, what failed, where the most time is lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tools.first_contact import Check

WIDTH = 80
WORST = 8
SHOWN = 12  # failures


def fit(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def text(check: Check, names: Sequence[str], stopped: str) -> str:
    """Lines of at most 80 columns; the paths of the files alone may be longer."""
    lines = [fit(f"{check.common['device']}, commit {check.common['commit']}", WIDTH)]
    if check.rehearse:
        lines.append("A rehearsal on the CPU: tiny sizes, and no figure means anything.")
    if stopped:
        lines.append(f"Stopped by {stopped}: what follows is what there is.")
    lines.append(f"{'part':<12}{'cases':>7}{'failed':>8}{'left out':>10}{'rows':>7}{'seconds':>9}")
    for name in names:
        failed = sum(part == name for part, *_ in check.failures)
        out = len(check.unreached.get(name, ()))
        made = sum(row["part"] == name for row in check.measured)
        took = f"{check.took[name]:.0f}" if name in check.took else "–"
        lines.append(
            f"{name:<12}{check.passed.get(name, 0):>7}{failed:>8}{out:>10}{made:>7}{took:>9}"
        )
    if not check.rehearse:
        lines += worst(check.measured)
    if check.failures:
        lines.append(f"Failures ({len(check.failures)}):")
        lines += [fit(f"  {part}, {case}: {what}", WIDTH) for part, case, what in
                  check.failures[:SHOWN]]  # fmt: skip
        if len(check.failures) > SHOWN:
            lines.append(f"  and {len(check.failures) - SHOWN} more")
    for part, cases in check.unreached.items():
        lines.append(fit(f"Not reached: {part}: {', '.join(cases)}", WIDTH))
    lines.append(f"{len(check.measured)} rows: {check.path}")
    if check.failures:
        lines.append(f"what failed: {check.log}")
    return "\n".join(lines)


def worst(measured: Sequence[dict[str, Any]]) -> list[str]:
    """Where most is lost: our own figures that are furthest from their floors."""
    ours = [row for row in measured if "share" in row and row["who"].startswith("meal-fast")]
    if not ours:
        return []
    lines = ["Furthest from the floor that the measured ceilings set (share reached):"]
    for row in sorted(ours, key=lambda row: row["share"])[:WORST]:
        name = f"{row['part']}, {row['case']}: {row['what']}"
        name += f" ({row['who']})" if row["who"] != "meal-fast" else ""
        figure = f"{row['figure']:.3g} {row['unit']}"
        lines.append(f"  {fit(name, 52):<52}{figure:>16}{100 * row['share']:>8.2f} %")
    return lines
