"""Compare methods under an equal budget of generated tokens, on the same scales.

    python -m meal_fast.compare concave-front --recipes weighted-meta-grpo,weighted-grpo \\
        --seeds 0,1,2,3,4 --tokens 200000 --jobs 2 --out runs/concave

Every recipe and seed is a run of its own, `OUT/runs/RECIPE/seed-N`, trained and evaluated by
meal_fast.train. The same command again keeps what is finished and goes on with the rest. The first
run's statistics and z*, taken from the base model, are those of all. With two objectives the sweep
is of BPS's 28 weights, unless --evaluation.grid says otherwise. Writes compare.json,
compare.html and front.png; exit code 1 where a run failed, which costs the others nothing. A run's
own report is drawn by `python -m meal_fast.report OUT/runs/RECIPE/seed-N`.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from meal_fast.common import folded, say, tell
from meal_fast.config.cli import one_line_errors, require_packages
from meal_fast.evaluation.comparison_run import run_comparison
from meal_fast.evaluation.comparison_spec import parse, threaded


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison that is asked for, and print its headline and where its page is."""
    argv = list(sys.argv[1:] if argv is None else argv)
    plan, jobs = parse(argv, __doc__)
    plan = threaded(plan, jobs)
    needed = ("moocore", "scipy", "matplotlib", "jinja2")
    require_packages("a comparison", *needed, then="the same command")
    command = f"python -m meal_fast.compare {shlex.join(argv)}"

    def told(line: str) -> None:
        tell(f"meal-fast: {line}")

    result = run_comparison(plan, jobs, command, told)
    if result is None:
        told(f"stopped; the same command goes on: {command}")
        sys.exit(130)
    from meal_fast.evaluation.comparison_report import headline, write_page

    say(*map(folded, headline(result)))
    say(write_page(result, plan.out))
    for entry in result["failed"]:
        told(f"failed: {entry['run']}: {entry['reason']}")
    if result["failed"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
