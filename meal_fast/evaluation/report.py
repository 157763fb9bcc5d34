"""front.png and report.html of a run, from its evaluation.json and metrics.jsonl.

What the page says is made here; how it is laid out stands in templates/report.html.j2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from meal_fast.common import write_atomic
from meal_fast.config.cli import require_packages
from meal_fast.config.run_dir import read_config, read_json, read_metrics

from .html_page import figure, page
from .metrics import FEW

Result = dict[str, Any]


def write_report(run: Path, out: Path | None = None) -> Path:
    """Writes front.png and report.html into `out` (default: `run`), from the evaluation there.

    Raises ValueError where `run` is no run folder or has not been evaluated.
    """
    out = out or run
    read_config(run)  # a clear error for a folder that is not a run
    config = read_json(run, "config.json")
    result = read_json(out, "evaluation.json")
    require_packages("the report", "matplotlib", "jinja2", then=f"python -m meal_fast.report {run}")
    from . import plots

    plots.save_png(plots.front_png(result), out / "front.png")
    said = render(result, config, read_metrics(run), title=run.resolve().name)
    write_atomic(out / "report.html", said)
    return out / "report.html"


def headline(result: Result) -> str:
    """What the evaluation found, in a few sentences that claim no more than the intervals allow."""
    difference = result["difference"]["sampled"]["hypervolume"]
    base, trained = (
        number(result["results"][m]["sampled"]["hypervolume"]["value"]) for m in ("base", "trained")
    )
    if difference["low"] is None:
        verb = "moved"
    elif difference["low"] > 0:
        verb = "raised"
    elif difference["high"] < 0:
        verb = "lowered"
    else:
        verb = "did not measurably change"
    before, after = (result["results"][m]["sampled"] for m in ("base", "trained"))
    steers = ", ".join(
        f"{name} {_follows(after['spearman'][name], after['ends'][name]['raw'])} "
        f"(base model {signed(before['ends'][name]['raw'], bare=True)})"
        for name in result["names"]
    )
    return (
        f"Training {verb} the hypervolume of the front: {base} to {trained}, difference "
        f"{signed(difference)}. From the least to the most weight on it, {steers}."
    )


def scope(result: Result) -> str:
    """What a headline rests on."""
    prompts, weights = len(result["prompts"]), len(result["weights"])
    intervals = (
        "in parentheses 95 % bootstrap intervals over prompts."
        if prompts >= FEW
        else f"no intervals, for want of at least {FEW} prompts: differences may be chance."
    )
    return (
        f"Sampled answers to {prompts} held-out prompt{'s' * (prompts != 1)} at {weights} weights; "
        f"{intervals}"
    )


def _follows(rank: dict[str, Any], ends: dict[str, Any]) -> str:
    rho = "undefined" if rank["value"] is None else f"{rank['value']:.2f}".replace("-", "−")
    low, high = ends["low"], ends["high"]
    if low is None:
        verb = "changes by"
    elif low > 0:
        return f"rises by {interval(ends)} with Spearman {rho}"
    elif high < 0:
        verb = "falls by"
    else:
        verb = "does not measurably change:"
    return f"{verb} {signed(ends)} with Spearman {rho}"


def number(x: float | None) -> str:
    return "–" if x is None else f"{x:.3g}".replace("-", "−")


def interval(e: dict[str, Any] | None) -> str:
    """`0.41 (0.30 to 0.52)`: two digits of the interval's width decide where all are rounded."""
    if e is None or e["value"] is None:
        return "–"
    if e["low"] is None:
        return number(e["value"])
    width = e["high"] - e["low"]
    digits = max(0, 1 - math.floor(math.log10(width))) if width > 0 else 3
    # adding 0.0 makes a rounded minus zero a zero
    rounded = (round(e[k], digits) + 0.0 for k in ("value", "low", "high"))
    value, low, high = (f"{x:.{digits}f}".replace("-", "−") for x in rounded)
    return f"{value} ({low} to {high})"


def signed(e: dict[str, Any] | None, *, bare: bool = False) -> str:
    """The same with a plus sign where it is one; `bare`: without the interval."""
    positive = e is not None and e["value"] is not None and e["value"] > 0
    text = interval(e)
    return "+" * positive + (text.partition(" ")[0] if bare else text)


def render(
    result: Result, config: dict[str, Any], metrics: Sequence[dict[str, Any]], *, title: str
) -> str:
    """Give the page."""
    from . import plots

    names, first = result["names"], result["names"][0]
    of_two = f"Numbers: w of {first}."
    of_more = "Named points: the whole weight on that objective."
    small, large = (4.4, 2.9), (5.2, 4.3)
    steering = [
        figure(plots.steering(result, k), f"Mean reward of {name} against its weight", small)
        for k, name in enumerate(names)
    ]
    return page(
        "report.html.j2",
        title=title,
        what_ran=_what_ran(result, config, metrics),
        headline=headline(result),
        scope=scope(result),
        tables=[
            ("Sampled answers", list(_rows(result, "sampled"))),
            ("Greedy answers", list(_rows(result, "greedy"))),
        ],
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
        training=[figure(draw, label, small) for label, draw in plots.training(metrics, names)],
        answers=list(_answers(result)),
        method=_method(result, config),
        details=[
            ("Cost", list(_cost(result).items())),
            ("Versions", list(result["versions"].items())),
            ("Configuration", list(_flat(config).items())),
        ],
    )


def _what_ran(result: Result, config: dict[str, Any], metrics: Sequence[Any]) -> str:
    objectives = " against ".join(result["names"])
    steps = f", {len(metrics)} updates" if metrics else ""
    return f"{config['recipe']}: {objectives}, {config['policy']['path']}{steps}"


def _rows(result: Result, mode: str) -> Iterator[tuple[str, ...]]:
    """(measure, base, trained, trained − base) of one mode."""
    base, trained = (result["results"][m][mode] for m in ("base", "trained"))
    difference = result["difference"][mode]
    for key, label in (
        ("hypervolume", "Hypervolume ↑"),
        ("pu", "PU, mean shortfall ↓"),
        ("expected_utility", "Expected utility ↑"),
    ):
        yield label, interval(base[key]), interval(trained[key]), signed(difference[key])
    if trained["pu_seen"] and trained["pu_unseen"]:
        for key, label in (
            ("pu_seen", "PU, weights of the training grid ↓"),
            ("pu_unseen", "PU, other weights ↓"),
        ):
            yield label, interval(base[key]), interval(trained[key]), ""
    for name in result["names"]:
        label = f"Spearman of w and reward: {name} ↑"
        yield label, interval(base["spearman"][name]), interval(trained["spearman"][name]), ""
    for name in result["names"]:
        yield (
            f"Reward between the ends of the sweep: {name} ↑",
            signed(base["ends"][name]["raw"]),
            signed(trained["ends"][name]["raw"]),
            "",
        )
    for name in result["names"]:
        counts = [e["violations"][name] for e in (base, trained)]
        label = f"Steps where more w gave less: {name} ↓"
        yield (label, *(f"{c['count']} of {c['of']}" for c in counts), "")
    gaps = [number(e["largest_gap"]["value"]) for e in (base, trained)]
    yield ("Largest gap between neighbours", *gaps, "")
    yield ("Tokens an answer", *(number(e["length"]) for e in (base, trained)), "")


def _answers(result: Result) -> Iterator[tuple[str, list[tuple[str, list[tuple[str, ...]]]]]]:
    """(prompt, [(w, [(model, rewards, answer)])]) of the prompts that have answers to show."""
    names = result["names"]
    for prompt in result["prompts"]:
        shown = [a for a in result["answers"] if a["prompt"] == prompt["id"]]
        weights = []
        for w in dict.fromkeys(tuple(a["w"]) for a in shown):
            said = " ".join(f"{n}={x:.2f}" for n, x in zip(names, w, strict=True))
            models: list[tuple[str, ...]] = []
            for model in ("trained", "base"):
                a = next(a for a in shown if tuple(a["w"]) == w and a["model"] == model)
                rewards = ", ".join(f"{n} {number(a['reward'][n])}" for n in names)
                models.append((model, rewards, a["text"]))
            weights.append((said, models))
        if shown:
            yield prompt["text"], weights


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
        f"{model}, {mode}": (
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
