"""evaluation.json as it is read: also one that an older version wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meal_fast.config.run_dir import read_json

# How the policies of a sweep are called in what a reader sees; each comes of the one before it.
TITLES = {"base": "base", "warmup": "warm start", "policy": "trained"}


def read_evaluation(run: Path) -> dict[str, Any]:
    """Read the evaluation in a run's folder. Raises ValueError where there is none."""
    return upgraded(read_json(run, "evaluation.json"))


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
