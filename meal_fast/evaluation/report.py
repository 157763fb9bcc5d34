"""front.png and one self-contained report.html of a run: no script, nothing fetched.

python -m meal_fast.report RUN        renders again from evaluation.json and metrics.jsonl
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from meal_fast.common import write_atomic
from meal_fast.config.cli import OneLineParser, one_line_errors, require_packages
from meal_fast.config.run_dir import read_config, read_json, read_metrics

from .html_page import page
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
    require_packages("the report", "matplotlib", then=f"python -m meal_fast.report {run}")
    from . import plots

    plots.save_png(plots.front_png(result), out / "front.png")
    page = render(result, config, read_metrics(run), title=run.resolve().name)
    write_atomic(out / "report.html", page)
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
    """The page. Every text that came from a model, a prompt or a file is escaped."""
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="sub">{escape(_what_ran(result, config, metrics))}</p>',
        f'<p class="headline">{escape(headline(result))}</p>',
        f'<p class="note">{escape(scope(result))}</p>',
        "<h2>Base model and trained policy</h2>",
        *_table(result),
        "<h2>Fronts</h2>",
        *_front_figures(result),
        "<h2>What a weight buys</h2>",
        *_steering_figures(result),
        *_training_figures(metrics, result["names"]),
        "<h2>Answers at five weights</h2>",
        *_answers(result),
        "<h2>How this was measured</h2>",
        *_method(result, config),
    ]
    return page(title, "\n".join(parts))


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


def _table(result: Result) -> Iterator[str]:
    yield '<div class="scroll"><table class="key">'
    for mode, title in (("sampled", "Sampled answers"), ("greedy", "Greedy answers")):
        yield (
            f"<thead><tr><th>{title}</th><th>base</th><th>trained</th><th>trained − base</th></tr>"
            "</thead><tbody>"
        )
        for label, *cells in _rows(result, mode):
            values = "".join(f"<td>{escape(c)}</td>" for c in cells)
            yield f'<tr><th scope="row">{escape(label)}</th>{values}</tr>'
        yield "</tbody>"
    yield "</table></div>"
    point = ", ".join(
        f"{n} {number(v)}" for n, v in zip(result["names"], result["reference_point"], strict=True)
    )
    yield (
        '<p class="note">Hypervolume, PU, '
        "utility and gaps are in normalised rewards; the rewards between the ends are raw. One "
        f"hypervolume reference point for all: {escape(point)}. The largest gap shows a hollow "
        "front only where the ends of the sweep lie apart.</p>"
    )


def _figure(draw: Any, label: str, *, wide: bool = False) -> str:
    from . import plots

    drawn = plots.panels([draw], columns=1, size=(5.2, 4.3) if wide else (4.4, 2.9))
    return f"<figure>{plots.svg(drawn, escape(label, quote=True))}</figure>"


def _front_figures(result: Result) -> Iterator[str]:
    from . import plots

    yield '<div class="grid wide">'
    for mode in ("sampled", "greedy"):
        for label, draw in plots.fronts(result, mode):
            yield _figure(draw, label, wide=True)
    yield "</div>"
    which = (
        f"Numbers: w of {result['names'][0]}."
        if len(result["names"]) == 2
        else "Named points: the whole weight on that objective."
    )
    yield (
        f'<p class="note">{escape(which)} Up and right is better. Solid points are dominated by no '
        "point of their panel, hollow ones are. Labels that would cover something are left out.</p>"
    )


def _steering_figures(result: Result) -> Iterator[str]:
    from . import plots

    yield '<div class="grid">'
    for k, name in enumerate(result["names"]):
        yield _figure(plots.steering(result, k), f"Mean reward of {name} against its weight")
    yield _figure(plots.utility(result), "PU against w")
    yield "</div>"
    yield '<p class="note">Sampled answers; bands are 95 % bootstrap intervals over prompts.</p>'


def _training_figures(metrics: Sequence[dict[str, Any]], names: Sequence[str]) -> Iterator[str]:
    from . import plots

    panels = plots.training(metrics, names)
    if not panels:
        return
    yield "<h2>Training</h2>"
    yield '<div class="grid small">'
    for title, draw in panels:
        yield _figure(draw, title)
    yield "</div>"
    yield (
        '<p class="note">Dots are updates, lines running means. The weight w changes from task to '
        "task, so rewards jump between updates whatever is learnt.</p>"
    )


def _answers(result: Result) -> Iterator[str]:
    yield (
        '<p class="note">Greedy answers to the first held-out prompts, unedited. A prompt set '
        "about safety asks for harmful things, and a small model may comply.</p>"
    )
    names = result["names"]
    for prompt in result["prompts"]:
        shown = [a for a in result["answers"] if a["prompt"] == prompt["id"]]
        if not shown:
            continue
        yield f'<section class="prompt"><h3>{escape(prompt["text"])}</h3><div class="answers">'
        for w in dict.fromkeys(tuple(a["w"]) for a in shown):
            said = " ".join(f"{n}={x:.2f}" for n, x in zip(names, w, strict=True))
            yield f'<div class="answer"><p class="w">{escape(said)}</p>'
            for model in ("trained", "base"):
                a = next(a for a in shown if tuple(a["w"]) == w and a["model"] == model)
                rewards = ", ".join(f"{n} {number(a['reward'][n])}" for n in names)
                text = escape(a["text"].strip()) or "<em>(empty)</em>"
                yield (
                    f'<div class="{model}"><p class="who">{model} '
                    f"<span>{escape(rewards)}</span></p><blockquote>{text}</blockquote></div>"
                )
            yield "</div>"
        yield "</div></section>"


def _method(result: Result, config: dict[str, Any]) -> Iterator[str]:
    s, seconds = result["settings"], result["seconds"]
    reads = (
        "No model read a preference: another w is answered by other parameters."
        if config["policy"].get("preference_text") == "none"
        else "The base model read the same preference text."
    )
    yield (
        f"<p>{len(result['prompts'])} held-out prompts, {len(result['weights'])} weights, greedy "
        f"and {s['samples']} sampled answer(s) for each, of at most {s['max_new_tokens']} tokens "
        f"at temperature {s['temperature']:g}, seed {s['seed']}. {reads} "
        f"Smoothing μ {result['mu']:g}, utopia point "
        f"{escape(', '.join(number(z) for z in result['utopia']))}; statistics fixed from the base "
        f"model before training. The evaluation took {seconds['all']:.0f} s, "
        f"{seconds['scoring']:.0f} s of it for the objectives.</p>"
    )
    cost = {
        f"{model}, {mode}": (
            f"{e['answers']} answers, {e['tokens']} tokens, {e['tokens_per_second']:.0f} a second, "
            f"{e['prefill_tokens']} tokens of prompts, {e['stopped']:.0%} ended by themselves"
        )
        for model, modes in result["results"].items()
        for mode, e in modes.items()
    }
    for label, values in (
        ("Cost", cost),
        ("Versions", result["versions"]),
        ("Configuration", _flat(config)),
    ):
        yield f'<details><summary>{label}</summary><div class="scroll"><table>'
        for key, value in values.items():
            yield f'<tr><th scope="row">{escape(key)}</th><td>{escape(str(value))}</td></tr>'
        yield "</table></div></details>"


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


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    parser = OneLineParser(
        prog="python -m meal_fast.report",
        description="Render front.png and report.html of a run again, from its evaluation.json.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run that has been evaluated")
    args = parser.parse_args(argv)
    print(write_report(args.run))
