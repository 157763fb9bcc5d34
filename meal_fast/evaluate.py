"""Sweep the preferences of a finished run, the base model beside the trained policy.

python -m meal_fast.evaluate RUN
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meal_fast.common import folded, require_text, say, tell, write_atomic
from meal_fast.config.cli import (
    OneLineParser,
    add_trust,
    check_trust,
    one_line_errors,
    require_packages,
)
from meal_fast.config.config import Config
from meal_fast.config.run_dir import read_config, read_statistics
from meal_fast.config.run_lock import check_free, lock
from meal_fast.config.sealed import check_measuring, unfinished, warned_unfinished


def parser() -> OneLineParser:
    """Make the parser of the command line."""
    p = OneLineParser(
        prog="python -m meal_fast.evaluate",
        description="Sweep preferences over held-out prompts, the base model beside the trained "
        "policy; writes evaluation.json, front.png and report.html.",
    )
    p.add_argument("run", metavar="RUN", type=Path, help="the folder that meal_fast.train wrote")
    p.add_argument("--prompts", type=int, metavar="N", help="held-out prompts")
    p.add_argument("--samples", type=int, metavar="S", help="sampled answers a prompt and weight")
    p.add_argument("--grid", type=int, help="weights a side; 28 with K=2: BPS's Table 1")
    p.add_argument("--ask", metavar="TEXT", help="one more prompt, answered at four weights")
    p.add_argument("--benign", metavar="SOURCE", help="ordinary prompts, that must not be refused")
    p.add_argument("--marks", metavar="A,B", help="marks to count: of refuses, complies and both")
    p.add_argument(
        "--seed", type=int, help="of the sampling and the bootstrap (default: the run's)"
    )
    p.add_argument(
        "--device", help="of policy and reward models: cpu, cuda, … (default: the run's)"
    )
    p.add_argument(
        *("--objectives-timeout", "--objectives_timeout"),
        type=float,
        metavar="SECONDS",
        help="that a call of an objective may take; 0: no limit (default: the run's)",
    )
    p.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (default: RUN)")
    p.add_argument("--no-report", action="store_true", help="write evaluation.json alone")
    add_trust(p)
    return p


def asked(config: Config, args: argparse.Namespace) -> Config:
    """Give the run's configuration with what the command line asks for."""
    require_text(args.ask or "", "--ask")
    given = {k: getattr(args, k) for k in ("prompts", "samples", "grid", "ask", "benign")}
    if args.marks is not None:
        given["marks"] = tuple(mark for mark in args.marks.split(",") if mark)
    options = {k: v for k, v in given.items() if v is not None}
    config = dataclasses.replace(
        config,
        evaluation=dataclasses.replace(config.evaluation, **options),
        seed=config.seed if args.seed is None else args.seed,
    )
    if args.objectives_timeout is not None:
        config = dataclasses.replace(config, objectives_timeout=args.objectives_timeout)
    if args.device is None:
        return config
    policy = dataclasses.replace(config.policy, device=args.device)
    return dataclasses.replace(config, policy=policy, objectives_device="auto")


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate the run that is named, and print what was found."""
    args = parser().parse_args(argv)
    config = read_config(args.run)
    check_trust(args.run, config, trusted=args.trust_run, objectives=args.objectives)
    check_free(args.run)
    shared = config.evaluation.statistics
    statistics = read_statistics(Path(shared) if shared else args.run / "statistics.json")
    check_measuring(args.run)
    warned_unfinished(args.run, tell)
    again = f"python -m meal_fast.evaluate {shlex.quote(str(args.run))}"
    require_packages("evaluation", "moocore", then=again)
    out = args.out or args.run
    config = asked(config, args)
    with lock(out, "evaluation"):
        try:
            _evaluate(args.run, out, config, statistics, report=not args.no_report)
        except KeyboardInterrupt:
            tell("meal-fast: stopped; the same `python -m meal_fast.evaluate` goes on")
            sys.exit(130)


def _evaluate(
    run: Path,
    out: Path,
    config: Config,
    statistics: dict[str, Any],
    *,
    report: bool,
) -> None:
    """Evaluate into `out`, and print what was found."""
    from meal_fast.evaluation.evaluator import run_evaluation
    from meal_fast.evaluation.kept import FOLDER
    from meal_fast.evaluation.report import write_report
    from meal_fast.evaluation.tables import aligned, by_weight
    from meal_fast.evaluation.verdict import scope, verdict

    result = run_evaluation(run, config, statistics, tell, out)
    if stopped := unfinished(run):
        result["unfinished"] = stopped
    write_atomic(out / "evaluation.json", json.dumps(result, allow_nan=False))
    shutil.rmtree(out / FOLDER, ignore_errors=True)
    say(*aligned(*by_weight(result)), "")
    say(*(folded(f"{about}: {said}") for about, said in verdict(result)), folded(scope(result)))
    if report:
        say(write_report(run, out))


if __name__ == "__main__":
    main()
