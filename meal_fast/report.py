"""Render front.png and report.html of a run again, from its evaluation.json and metrics.jsonl.

python -m meal_fast.report RUN
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from meal_fast.common import say
from meal_fast.config.cli import OneLineParser, one_line_errors


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Write the report of the run that is named, and print where it is."""
    parser = OneLineParser(
        prog="python -m meal_fast.report",
        description="Render front.png and report.html of a run again, from its evaluation.json.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run that has been evaluated")
    args = parser.parse_args(argv)
    from meal_fast.evaluation.report import write_report

    say(write_report(args.run))


if __name__ == "__main__":
    main()
