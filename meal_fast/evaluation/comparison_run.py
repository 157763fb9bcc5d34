"""A comparison's runs: which are finished, what made them, and compare.json of them all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from meal_fast import __version__
from meal_fast.common import write_atomic
from meal_fast.config.run_dir import read_json, read_statistics
from meal_fast.config.shapes import TEXT, TRUTH, WHOLE, Each, Maybe, hold

from .comparison import Finished, compare
from .comparison_spec import Plan, Run
from .runner import Outcome, run_all
from .stored import read_evaluation, read_updates, whole


def code_version() -> str:
    """Give the version and a digest of the package's sources: what a run was made by."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:8]}"


_RECORD = {"runs": Each({"code": [TEXT], "failed": Maybe(TEXT), "alone": TRUTH})}


class Record:
    """OUT/runs.json: what was asked for, which code made each run, and how each ended."""

    def __init__(self, plan: Plan) -> None:
        self.path = plan.out / "runs.json"
        self.values: dict[str, Any] = {"preset": plan.preset, "tokens": plan.tokens, "runs": {}}
        if self.path.exists():
            self.values = read_json(plan.out, "runs.json")
            hold(self.values, _RECORD, str(self.path))
            for what, asked in (("preset", plan.preset), ("tokens", plan.tokens)):
                if self.values.get(what) != asked:
                    raise ValueError(
                        f"out={str(plan.out)!r}: a comparison with {what} "
                        f"{self.values.get(what)!r}, not {asked!r}; name another folder"
                    )
        elif plan.out.exists() and (not plan.out.is_dir() or any(plan.out.iterdir())):
            raise ValueError(f"out={str(plan.out)!r}: holds no comparison; name another folder")

    def of(self, run: str) -> dict[str, Any]:
        return self.values["runs"].setdefault(run, {"code": [], "failed": None, "alone": True})

    def started(self, run: str, code: str, alone: bool) -> None:
        entry = self.of(run)
        entry["code"] = list(dict.fromkeys([*entry["code"], code]))
        entry["alone"] = entry["alone"] and alone
        self.save()

    def ended(self, run: str, failed: str | None) -> None:
        self.of(run)["failed"] = failed
        self.save()

    def save(self) -> None:
        write_atomic(self.path, json.dumps(self.values, indent=1))


def collect(plan: Plan, runs: Sequence[Run], record: Record) -> list[Finished]:
    """Give the runs that are finished, in the plan's order of methods and seeds."""
    found = []
    for run in sorted(runs, key=lambda r: (plan.methods.index(r.method), plan.seeds.index(r.seed))):
        if run.stage() != "finished":
            continue
        scales = read_statistics(run.folder / "statistics.json")
        common = read_statistics(plan.statistics)
        if not run.own_scale and any(scales[k] != common[k] for k in ("normalizer", "utopia")):
            raise ValueError(f"{run.folder}: its statistics are not {plan.statistics}; remove it")
        held = None
        if (run.folder / "cost.json").exists():
            cost = read_json(run.folder, "cost.json")
            hold(cost, {"peak_bytes": WHOLE}, str(run.folder / "cost.json"))
            # A process that trains several runs holds at its peak the largest of them.
            held = cost["peak_bytes"] if record.of(run.name)["alone"] else None
        evaluation = read_evaluation(run.folder)
        found.append(Finished(run.method, run.seed, evaluation, read_updates(run.folder), held))
    return found


def notes(plan: Plan, runs: Sequence[Run], record: Record, result: dict[str, Any]) -> list[str]:
    """Say what a reader must know before believing the figures."""
    said = []
    made: dict[str, list[str]] = {}
    for run in runs:
        made.setdefault(" and then ".join(record.of(run.name)["code"]), []).append(run.name)
    if len(made) > 1 or any(" and " in code for code in made):
        each = "; ".join(f"{code or 'unknown'}: {', '.join(names)}" for code, names in made.items())
        said.append(f"Not all runs were made by one version of the code. {each}.")
    for method in (m for m in result["methods"] if m["recipe"]):
        spent = method["cost"]["tokens"]
        if abs(spent - plan.tokens) > 0.05 * plan.tokens:
            said.append(
                f"{method['name']} generated {spent:,.0f} tokens a run, not {plan.tokens:,}."
            )
        if len(method["seeds"]) < len(plan.seeds):
            said.append(f"{method['name']} has {len(method['seeds'])} of {len(plan.seeds)} seeds.")
    if len(plan.seeds) < 3:
        said.append("Fewer than three seeds: no intervals, and no claim is judged.")
    return said


def run_comparison(
    plan: Plan, jobs: int, command: str, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """Train and evaluate what is not finished yet, write compare.json, and give its values.

    None where it was asked to stop. Raises ValueError for a folder or a run of something else,
    before any run is started, and where no run finished.
    """
    record = Record(plan)
    # seed by seed, so that a comparison that is stopped has something to compare
    runs = [Run(plan, method, seed) for seed in plan.seeds for method in plan.methods]
    for run in runs:
        run.stage()  # a run of another configuration is refused before any is started
    plan.out.mkdir(parents=True, exist_ok=True)
    record.save()
    code = code_version()

    def share() -> bool:
        """Whether there are statistics for all; the first run that has some gives them."""
        if not plan.statistics.exists():
            for run in runs:
                made = run.folder / "statistics.json"
                if made.exists() and not run.own_scale:
                    write_atomic(plan.statistics, made.read_bytes())
                    break
        return plan.statistics.exists()

    def ended(name: str, outcome: Outcome) -> None:
        record.ended(name, outcome.failed)
        say(f"{name}: {outcome.failed or 'done'}")

    stopped = run_all(
        {run.name: run.job for run in runs},
        jobs=jobs,
        logs=plan.out / "logs",
        ready=share,
        started=lambda name, job: record.started(name, code, jobs > 0 or job.program == "evaluate"),
        ended=ended,
        say=say,
    )
    if stopped:
        return None
    result = _result(plan, runs, record) | {"command": command, "code": code}
    write_atomic(plan.out / "compare.json", json.dumps(result, allow_nan=False))
    return result


def _result(plan: Plan, runs: Sequence[Run], record: Record) -> dict[str, Any]:
    finished = collect(plan, runs, record)
    failed = [
        {"run": run.name, "reason": record.of(run.name)["failed"]}
        for run in runs
        if record.of(run.name)["failed"] and run.stage() != "finished"
    ]
    if not finished:
        raise ValueError(f"no run finished; the first: {failed[0]['reason']}")
    distance = None
    if plan.preset == "concave-front":
        from meal_fast.data.toy import truth

        distance = truth().distance
    with whole(str(plan.out / "runs")):
        result = compare(finished, plan.base, plan.tokens, distance)
    there = [run for run in runs if run.stage() == "finished"]
    return result | {
        "preset": plan.preset,
        "policy": plan.base.policy.path,
        "seeds": plan.seeds,
        "failed": failed,
        "notes": notes(plan, there, record, result),
        "ablations": [
            {"options": a.options, "methods": [m.name for m in a.methods]} for a in plan.ablations
        ],
    }
