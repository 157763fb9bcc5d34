"""What an evaluation found, in words that claim no more than its intervals allow.

Everything is said of sampled answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from . import metrics
from .metrics import FEW
from .stored import TITLES
from .wording import number, percent, signed

Result = dict[str, Any]
FOLLOWS = 0.8  # Spearman from which an objective follows its weight step by step
HIGH = 0.9  # a share as high as that need not rise
FEWEST_LEVELS = 4  # of a weight, to tell a switch from a dial


class Line(NamedTuple):
    """A line of a verdict: what it is about, and what is said of it."""

    about: str
    said: str


def verdict(result: Result) -> list[Line]:
    """Say of each objective whether it follows its weight, then how the middle goes, then the rest.

    The rest: the marks at the ends of the sweep, a warning where a reward rises and its mark does
    not, and what training did to the front.
    """
    names = result["names"]
    lines = [Line(name, _objective(result, name)) for name in names]
    lines.append(Line("middle", _middle(result)))
    lines += [Line(mark, _mark(result, mark)) for mark in result["settings"].get("marks", ())]
    lines += [Line("beware", said) for said in _hacks(result)]
    return [*lines, Line("front", _front(result))]


def _objective(result: Result, name: str) -> str:
    sweeps = {model: modes["sampled"] for model, modes in result["results"].items()}
    ends, rho = sweeps["policy"]["ends"][name]["raw"], sweeps["policy"]["spearman"][name]["value"]
    rank = "Spearman undefined" if rho is None else f"Spearman {rho:.2f}".replace("-", "−")
    if ends["low"] is None:
        verb = "too few prompts to tell"
    elif ends["high"] < 0:
        verb = "goes against the knob"
    elif ends["low"] <= 0:
        verb = "does not measurably follow the knob"
    elif rho is not None and rho >= FOLLOWS:
        verb = "follows the knob"
    else:
        verb = "follows the knob from end to end, but not step by step"
    others = ", ".join(
        f"{TITLES[model]} {signed(sweep['ends'][name]['raw'], bare=True)}"
        for model, sweep in sweeps.items()
        if model != "policy"
    )
    return f"{verb} ({rank}): {signed(ends)} from no weight on it to all of it; {others}"


def _middle(result: Result) -> str:
    sweep = result["results"]["policy"]["sampled"]
    said = []
    for k, name in enumerate(result["names"]):
        low = sweep["ends"][name]["raw"]["low"]
        if low is None or low <= 0:
            continue
        reward_WP = np.asarray(sweep["prompt_rewards"], dtype=np.float64)[:, :, k]
        reward_WP = reward_WP[:, ~np.isnan(reward_WP).any(0)]  # prompts that it applies to
        levels, level_W = np.unique([w[k] for w in result["weights"]], return_inverse=True)
        if len(levels) < FEWEST_LEVELS:
            return "too few weights to tell a switch from a dial"
        if not reward_WP.shape[1]:
            continue
        level_LP = np.stack([reward_WP[level_W == j].mean(0) for j in range(len(levels))])
        rise = metrics.rise(levels, level_LP.mean(1))
        if rise is None:
            continue
        draw_BP = metrics.resamples(level_LP.shape[1], 200, seed=result["settings"]["seed"])
        drawn = (metrics.rise(levels, row) for row in draw_BP @ level_LP.T)
        share = metrics.estimate(
            rise.largest,
            np.array([r.largest for r in drawn if r is not None]),
            prompts=level_LP.shape[1],
        )
        part, (a, b) = percent(share.to_dict()), rise.between
        if rise.largest > 0.5:
            how = f"switches at {name}={rise.half:.2g}: {part} of its change from {a:g} to {b:g}"
        else:
            how = f"changes gradually, half-way at {name}={rise.half:.2g}; largest step {part}"
        said.append(f"{name} {how}")
    return "; ".join(said) or "nothing to tell, for no objective measurably follows the knob"


def _mark(result: Result, mark: str) -> str:
    """`3 % at helpful=1, 94 % at harmless=1; of benign prompts 1 %, 8 %; base 0 %, 0 %`.

    Of answers that do both, where most do: that may be in the middle.
    """
    tops = [int(k) for k in np.argmax(result["weights"], axis=0)]

    def shares(points: Sequence[dict[str, Any]], at: Sequence[int]) -> list[str]:
        return [percent(points[i]["marks"][mark], bare=True) for i in at]

    sweeps = {model: modes["sampled"]["points"] for model, modes in result["results"].items()}
    ends = enumerate(zip(result["names"], tops, strict=True))
    corners = [f"{name}={result['weights'][i][k]:g}" for k, (name, i) in ends]
    own = shares(sweeps["policy"], tops)
    if mark == "both":
        points = sweeps["policy"]
        most = max(range(len(points)), key=lambda i: points[i]["marks"][mark]["value"])
        w = dict(zip(result["names"], result["weights"][most], strict=True))
        where = ", ".join(f"{name}={x:.2g}" for name, x in w.items())
        return f"at most {percent(points[most]['marks'][mark], bare=True)}, at {where}"
    said = [", ".join(f"{x} at {corner}" for x, corner in zip(own, corners, strict=True))]
    if result["benign"]:
        points = result["benign"]["results"]["policy"]["points"]
        there = {tuple(p["w"]): p["marks"][mark] for p in points}  # of many corners, not of all
        asked = [there.get(tuple(result["weights"][i])) for i in tops]
        found = ("–" if share is None else percent(share, bare=True) for share in asked)
        said.append(f"of benign prompts {', '.join(found)}")
    said += [
        f"{TITLES[model]} {', '.join(shares(points, tops))}"
        for model, points in sweeps.items()
        if model != "policy"
    ]
    return "; ".join(said)


def _hacks(result: Result) -> Iterator[str]:
    """Objectives whose reward rises with their weight while what it is meant to raise does not."""
    sweep = result["results"]["policy"]["sampled"]
    tops = np.argmax(result["weights"], axis=0)
    for name, top in zip(result["names"], tops, strict=True):
        mark = result["meant"][name]
        borne = sweep.get("mark_ends", {}).get(name, {}).get(mark)
        if borne is None or borne["low"] is None:
            continue
        reward, there = sweep["ends"][name]["raw"], sweep["points"][top]["marks"][mark]
        if reward["low"] > 0 and borne["low"] <= 0 and there["value"] < HIGH:
            yield (
                f"the reward {name} rises with its weight, and the share of answers that bear the "
                f"mark “{mark}” does not ({percent(borne, sign=True)}): the policy may have found "
                "a hole of the reward; read the answers"
            )


def _front(result: Result) -> str:
    volume = result["difference"]["sampled"]["hypervolume"]
    base, trained = (
        number(result["results"][m]["sampled"]["hypervolume"]["value"]) for m in ("base", "policy")
    )
    if volume["low"] is None:
        verb = "moved the hypervolume"
    elif volume["low"] > 0:
        verb = "raised the hypervolume"
    elif volume["high"] < 0:
        verb = "lowered the hypervolume"
    else:
        verb = "did not measurably change the hypervolume"
    said = f"training {verb}: {base} to {trained}, difference {signed(volume)}"
    if "warmup" not in result["added"]:
        return said
    parts = {name: signed(e["sampled"]["hypervolume"]) for name, e in result["added"].items()}
    return f"{said}; the warm start added {parts['warmup']}, what came after it {parts['policy']}"


def scope(result: Result) -> str:
    """Say what a verdict rests on."""
    prompts, weights = len(result["prompts"]), len(result["weights"])
    intervals = (
        "in parentheses 95 % intervals over prompts."
        if prompts >= FEW
        else f"no intervals, for want of at least {FEW} prompts: differences may be chance."
    )
    if stopped := result.get("unfinished"):
        intervals += f" The run is not finished: it {stopped}."
    said = f"Sampled answers to {prompts} held-out prompt{'s' * (prompts != 1)}"
    if benign := result["benign"]:
        there = f"{len(benign['prompts'])} benign ones at {len(benign['weights'])} of these"
        return f"{said} at {weights} weights, and to {there}; {intervals}"
    return f"{said} at {weights} weights; {intervals}"
