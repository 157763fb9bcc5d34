"""Sweeps, metrics, reports, comparisons. What it exports is imported when it is asked for."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .evaluator import evaluate, run_evaluation
    from .report import write_report

__all__ = ["evaluate", "run_evaluation", "write_report"]

_HOMES = {"evaluate": "evaluator", "run_evaluation": "evaluator", "write_report": "report"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
