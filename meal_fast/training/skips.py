"""Updates that are left out because a loss or a gradient is not finite: counted, and when to stop.

The step itself is left out by `outer.Joint.advance`, on the device. Here it is told, and a run that
has nothing but such updates any more is ended.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

from meal_fast.config.config import GRPOConfig

from .batch import Task

NOT_FINITE = "not finite"  # what metrics.jsonl has under "skipped"


class Skips:
    """Count the updates in a row that were left out.

    by_model: each preference has a model of its own, whose updates are counted by themselves.
    """

    def __init__(self, options: GRPOConfig, *, by_model: bool = False) -> None:
        self._options, self._by_model = options, by_model
        self._in_a_row: dict[Any, int] = {}
        self.too_many = ""  # why the run cannot go on

    def check(self) -> None:
        """Raise ValueError where the run cannot go on; a checkpoint has been written."""
        if self.too_many:
            raise ValueError(f"{self.too_many}; what was learnt before is saved")

    def said(self, task: Task, metrics: dict[str, float]) -> dict[str, Any]:
        """Give an update's metrics for metrics.jsonl; warn where it was left out.

        Such an update has none but `skipped`, the values that are not finite, as text, since JSON
        has no number for them, and how many steps of its `grpo.epochs` were left out.
        """
        model = task.preference if self._by_model else None
        learned = {name: value for name, value in metrics.items() if name != "left_out"}
        if not metrics.get("left_out"):
            if metrics:  # without a response there was nothing to learn from, good or bad
                self._in_a_row[model] = 0
            return learned
        bad = {name: f"{x:g}" for name, x in learned.items() if not math.isfinite(x)}
        values = ", ".join(f"{name} {x}" for name, x in bad.items()) or "a step's gradient"
        row = self._in_a_row[model] = self._in_a_row.get(model, 0) + 1
        what = f"update {task.update}: {values} is not finite"
        warnings.warn(f"{what}; it is skipped", stacklevel=3)
        if row >= self._options.skip_limit and not self.too_many:
            self.too_many = (
                f"{what}, and so were the {row} updates up to it (grpo.skip_limit="
                f"{self._options.skip_limit}): the policy learns nothing any more; start anew with "
                f"a lower grpo.lr than {self._options.lr:g}, or a lower grpo.max_grad_norm"
            )
        return {"skipped": NOT_FINITE, "not_finite": bad, "left_out": int(metrics["left_out"])}
