"""front.png and report.html of a run, from its evaluation.json and metrics.jsonl.

What the page says is made here; how it is laid out stands in templates/report.html.j2.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meal_fast.common import write_atomic
from meal_fast.config.cli import require_packages
from meal_fast.config.config import to_dict
from meal_fast.config.run_dir import read_config
from meal_fast.data.markers import mild

from .html_page import figure, page
from .stored import TITLES, read_evaluation, read_updates, whole
from .tables import by_weight, measures, said_once
from .verdict import scope, verdict
from .wording import number

Result = dict[str, Any]


def write_report(run: Path, out: Path | None = None) -> Path:
    """Writes front.png and report.html into `out` (default: `run`), from the evaluation there.

    Raises ValueError where `run` is no run folder or has not been evaluated.
    """
    out = out or run
    config = to_dict(read_config(run))
    result, updates = read_evaluation(out), read_updates(run)
    again = f"python -m meal_fast.report {shlex.quote(str(run))}"
    require_packages("the report", "matplotlib", "jinja2", then=again)
    from . import plots, run_plots

    with whole(str(out / "evaluation.json")):
        said = render(result, config, updates, title=run.resolve().name)
        plots.save_png(run_plots.front_png(result), out / "front.png")
    write_atomic(out / "report.html", said)
    return out / "report.html"


def render(
    result: Result, config: dict[str, Any], metrics: Sequence[dict[str, Any]], *, title: str
) -> str:
    """Give the page."""
    from . import run_plots as plots

    names, first = result["names"], result["names"][0]
    of_two = f"Numbers: w of {first}."
    of_more = "Named points: the whole weight on that objective."
    small, large = (4.4, 2.9), (5.2, 4.3)
    steering = [
        figure(plots.steering(result, k), f"Mean reward of {name} against its weight", small)
        for k, name in enumerate(names)
    ]
    marks = [
        figure(plots.marked(result, mark, k), f"Answers marked {mark} against w", small)
        for mark, k in _marks(result)
    ]
    head, rows = by_weight(result)
    return page(
        "report.html.j2",
        script="knob.js",
        title=title,
        what_ran=_what_ran(result, config, metrics),
        verdict=verdict(result),
        scope=scope(result),
        knob=_knob(result),
        by_weight=(head, said_once(rows)),
        measures=[measures(result, mode) for mode in ("sampled", "greedy")],
        reference_point=", ".join(
            f"{n} {number(v)}" for n, v in zip(names, result["reference_point"], strict=True)
        ),
        fronts=[
            figure(draw, label, large)
            for mode in ("sampled", "greedy")
            for label, draw in plots.fronts(result, mode)
        ],
        numbers=of_two if len(names) == 2 else of_more,
        steering=[*steering, figure(plots.utility(result), "PU against w", small)],
        marks=marks,
        training=[figure(draw, label, small) for label, draw in plots.training(metrics, names)],
        method=_method(result, config),
        details=[
            ("Cost", list(_cost(result).items())),
            ("Versions", list(result["versions"].items())),
            ("Configuration", list(_flat(config).items())),
        ],
    )


def _marks(result: Result) -> list[tuple[str, int]]:
    """Each mark that was counted, and the objective by whose weight it is drawn: whom it is of."""
    names, meant = result["names"], result["meant"]
    return [
        (mark, next((k for k, name in enumerate(names) if meant[name] == mark), 0))
        for mark in result["settings"].get("marks", ())
    ]


def _knob(result: Result) -> dict[str, Any]:
    """What the slider shows: the weights, and of each prompt every policy's answer at each."""
    names = result["names"]
    weights = [tuple(w) for w in dict.fromkeys(tuple(a["w"]) for a in result["answers"])]
    said = {(a["prompt"], tuple(a["w"]), a["model"]): a for a in result["answers"]}
    models = [model for model in reversed(result["results"])]

    def answer(prompt: str, w: tuple[float, ...], model: str) -> tuple[str, str]:
        found = said[prompt, w, model]
        return ", ".join(f"{n} {number(found['reward'][n])}" for n in names), found["text"]

    return {
        "weights": [
            (", ".join(f"{n}={x:.2f}" for n, x in zip(names, w, strict=True)), max(w) == 1.0)
            for w in weights
        ],
        "left": names[0],
        "right": names[-1],
        "how": _chosen(result),
        "prompts": [
            (
                prompt["text"],
                [(m, TITLES[m], [answer(prompt["id"], w, m) for w in weights]) for m in models],
            )
            # Benign ones last: that no weight changes them is no start.
            for prompt in sorted(result["shown"], key=lambda p: p["kind"] == "benign")
        ],
    }


def _chosen(result: Result) -> str:
    """How the prompts were chosen whose answers are shown."""
    kinds = [p["kind"] for p in result["shown"]]
    said = []
    if "asked" in kinds:
        said.append("the prompt of evaluation.ask")
    if "evaluation" in kinds:
        rest = [p["text"] for p in result["shown"] if p["kind"] == "evaluation"]
        which = "that a list of words counts as mild" if all(map(mild, rest)) else "of the sweep"
        said.append(f"the first {len(rest)} of the prompts {which}")
    if (benign := kinds.count("benign")) > 0:
        which = f"the first {benign} of the held-out benign prompts"
        said.append(f"last {which}, which no weight is meant to change")
    return "; ".join(said)


def _what_ran(result: Result, config: dict[str, Any], metrics: Sequence[Any]) -> str:
    objectives = " against ".join(result["names"])
    steps = f", {len(metrics)} updates" if metrics else ""
    return f"{config['recipe']}: {objectives}, {config['policy']['path']}{steps}"


def _method(result: Result, config: dict[str, Any]) -> str:
    s, seconds = result["settings"], result["seconds"]
    reads = (
        "No model read a preference: another w is answered by other parameters."
        if config["policy"].get("preference_text") == "none"
        else "The base model read the same preference text."
    )
    return (
        f"{len(result['prompts'])} held-out prompts, {len(result['weights'])} weights, greedy "
        f"and {s['samples']} sampled answer(s) for each, of at most {s['max_new_tokens']} tokens "
        f"at temperature {s['temperature']:g}, seed {s['seed']}. {reads} "
        f"Smoothing μ {result['mu']:g}, utopia point "
        f"{', '.join(number(z) for z in result['utopia'])}; statistics fixed from the base "
        f"model before training. The evaluation took {seconds['all']:.0f} s, "
        f"{seconds['scoring']:.0f} s of it for the objectives."
    )


def _cost(result: Result) -> dict[str, str]:
    return {
        f"{TITLES[model]}, {mode}": (
            f"{e['answers']} answers, {e['tokens']} tokens, {e['tokens_per_second']:.0f} a second, "
            f"{e['prefill_tokens']} tokens of prompts, {e['stopped']:.0%} ended by themselves"
        )
        for model, modes in result["results"].items()
        for mode, e in modes.items()
    }


def _flat(values: dict[str, Any], where: str = "") -> dict[str, str]:
    out: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            out |= _flat(value, f"{where}{name}.")
        elif isinstance(value, list):
            out[where + name] = ", ".join(map(str, value)) or "–"
        else:
            out[where + name] = str(value) or "–"
    return out
