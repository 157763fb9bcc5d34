"""What a run left, as pages and tables read it: held to its shape, also of an older version."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from meal_fast.config.run_dir import read_json, read_metrics
from meal_fast.config.shapes import NUMBER, TEXT, TRUTH, WHOLE, WORD, Each, Maybe, Shape, hold

# How the policies of a sweep are called in what a reader sees; each comes of the one before it.
TITLES = {"base": "base", "warmup": "warm start", "policy": "trained"}

_UNSURE = Maybe(NUMBER)
_ESTIMATE = {"value": _UNSURE, "low": _UNSURE, "high": _UNSURE}
_PROMPTS = [{"id": TEXT, "text": TEXT}]
_MARKED = {"w": [NUMBER], "marks": Each(_ESTIMATE)}
_SWEEP = {
    "points": [
        {
            "w": [NUMBER],
            "raw": Each(_ESTIMATE),
            "normalized": Each(_ESTIMATE),
            "pu": _ESTIMATE,
            "nondominated": TRUTH,
            "marks?": Each(_ESTIMATE),
        }
    ],
    **dict.fromkeys(("hypervolume", "pu", "expected_utility"), _ESTIMATE),
    **dict.fromkeys(("pu_seen", "pu_unseen"), Maybe(_ESTIMATE)),
    "spearman": Each(_ESTIMATE),
    "ends": Each({"raw": _ESTIMATE, "normalized": _ESTIMATE}),
    "largest_gap": {"value": _UNSURE},
    "violations": Each({"count": WHOLE, "of": WHOLE}),
    "prompt_rewards?": [[[_UNSURE]]],
    "prompt_normalized?": [[[_UNSURE]]],
    "prompt_pu?": [[NUMBER]],
    "prompt_marks?": Each([[NUMBER]]),
    "mark_ends?": Each(Each(_ESTIMATE)),
    **dict.fromkeys(("answers", "tokens", "prefill_tokens"), WHOLE),
    **dict.fromkeys(("length", "stopped", "tokens_per_second"), NUMBER),
}
_ADDED = {"sampled": Each(_ESTIMATE), "greedy": Each(_ESTIMATE)}
_EVALUATION: Shape = {
    "names": [WORD],
    "weights": [[NUMBER]],
    "seen": [TRUTH],
    "utopia": [NUMBER],
    "mu": NUMBER,
    "reference_point": [NUMBER],
    "prompts": _PROMPTS,
    "settings": {
        **dict.fromkeys(("grid", "samples", "max_new_tokens", "seed"), WHOLE),
        "temperature": NUMBER,
        "prompts?": WHOLE,
        "ask?": TEXT,
        "benign?": TEXT,
        "marks?": [WORD],
    },
    "results": Each({"sampled": _SWEEP, "greedy": _SWEEP}),
    "difference": _ADDED,
    "added": Each(_ADDED),
    "meant": Each(Maybe(WORD)),
    "benign": Maybe(
        {
            "prompts": _PROMPTS,
            "weights": [[NUMBER]],
            "results": Each({"points": [_MARKED], "prompt_marks?": Each([[NUMBER]])}),
        }
    ),
    "shown": [{"id": TEXT, "text": TEXT, "kind": TEXT}],
    "answers": [
        {"prompt": TEXT, "w": [NUMBER], "model": TEXT, "text": TEXT, "reward": Each(_UNSURE)}
    ],
    "seconds": {"all": NUMBER, "scoring": NUMBER},
    "versions": Each(TEXT),
}
_UPDATE: Shape = {
    "update?": WHOLE,
    "normalized?": Each(_UNSURE),
    "tokens?": WHOLE,
    "seconds?": Each(NUMBER),
    **dict.fromkeys(
        (
            "score?",
            "nll?",
            "kl?",
            "entropy?",
            "length?",
            "acceptance?",
            "net_entropy?",
            "delta_norm?",
            "delta_cosine?",
        ),
        _UNSURE,
    ),
}


def read_evaluation(run: Path) -> dict[str, Any]:
    """Read the evaluation in a run's folder.

    Raises ValueError where there is none, and for one that holds something else than it should.
    """
    file = str(run / "evaluation.json")
    with whole(file):
        result = upgraded(read_json(run, "evaluation.json"))
    hold(result, _EVALUATION, file)
    if result.get("asked") is not None:
        _hold_pairs(result["asked"], file)
    _hold_together(result, file)
    return result


def read_updates(run: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl as pages do: a number that is none in mathematics counts as missing.

    Raises ValueError for a line that holds something else than it should.
    """
    updates = [_finite(update) for update in read_metrics(run)]
    for number, update in enumerate(updates, 1):
        hold(update, _UPDATE, f"{run / 'metrics.jsonl'}, line {number}")
    return updates


@contextmanager
def whole(file: str, remedy: str = "evaluate the run again") -> Iterator[None]:
    """Make what does not fit together in a file, each part of which may be right, one line."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"{file}: does not hold together ({type(error).__name__}: {error}); it was changed, or "
            f"is of another version: {remedy}"
        ) from error


def upgraded(result: dict[str, Any]) -> dict[str, Any]:
    """Give what an older version wrote the names of today: "trained" was the policy.

    It had no warm start, and counted no marks.
    """
    if "policy" in result["results"]:
        return result
    prompts = {p["id"]: p["text"] for p in result["prompts"]}
    answers = [a | {"model": _renamed(a["model"])} for a in result["answers"]]
    return result | {
        "results": {_renamed(name): modes for name, modes in result["results"].items()},
        "added": {"policy": result["difference"]},
        "meant": dict.fromkeys(result["names"]),
        "benign": None,
        "shown": [
            {"id": prompt, "text": prompts[prompt], "kind": "evaluation"}
            for prompt in dict.fromkeys(a["prompt"] for a in answers)
        ],
        "answers": answers,
    }


def _renamed(policy: str) -> str:
    return "policy" if policy == "trained" else policy


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(v) for name, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _hold_pairs(asked: Any, file: str) -> None:
    pairs = isinstance(asked, list) and all(isinstance(p, list) and len(p) == 2 for p in asked)
    if not pairs:
        raise ValueError(f"{file}: asked: must be a list of pairs, a preference and a text")
    for i, (w, text) in enumerate(asked):
        hold(w, [NUMBER], file, f"asked[{i}][0]")
        hold(text, TEXT, file, f"asked[{i}][1]")


def _hold_together(result: dict[str, Any], file: str) -> None:
    """Raise ValueError where lists that go side by side are not of one length."""
    k, w = len(result["names"]), len(result["weights"])

    def same(field: str, values: Sequence[Any], length: int) -> None:
        if len(values) != length:
            raise ValueError(f"{file}: {field} has {len(values)} entries, not {length}")

    unknown = [name for name in result["results"] if name not in TITLES]
    if unknown or not {"base", "policy"} <= result["results"].keys():
        raise ValueError(f"{file}: results has other policies than {', '.join(TITLES)}")
    if k < 2 or len(set(result["names"])) < k:
        raise ValueError(f"{file}: names: two objectives or more, each once")
    for field in ("utopia", "reference_point"):
        same(field, result[field], k)
    same("seen", result["seen"], w)
    for i, weight in enumerate(result["weights"]):
        same(f"weights[{i}]", weight, k)
    for model, modes in result["results"].items():
        for mode in ("sampled", "greedy"):
            points = modes[mode]["points"]
            same(f"results.{model}.{mode}.points", points, w)
            for i, point in enumerate(points):
                same(f"results.{model}.{mode}.points[{i}].w", point["w"], k)
