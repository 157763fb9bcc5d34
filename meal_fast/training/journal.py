"""What a run says of its updates, in one order, whichever group of processes made them.

Every process knows the updates of all groups, counts their tokens and those that were left out; the
main one writes metrics.jsonl and completions.jsonl, and tells whoever listens.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .batch import Batch, Task
from .completions import Completions, Row
from .metrics import MetricsLog
from .skips import Skips


@dataclass(frozen=True)
class Done:
    """Hold what one inner update of a task was, ready for another process."""

    task: Task  # without its prompts
    learned: dict[str, float]  # the loss's metrics; empty: there was no response
    more: dict[str, Any]  # what responses were like, and what the preference net learnt
    rows: tuple[Row, ...]
    tokens: int
    seconds: dict[str, float]


class Journal:
    """Take the updates of a meta-step, and tell of them.

    Args:
        tokens: generated so far, by all groups.
        progress: (updates done, tokens generated) -> the share of the run.
        files: metrics.jsonl and completions.jsonl, on the main process alone.
        wait: for the updates of other groups, at the end of a meta-step.
    """

    def __init__(
        self,
        skips: Skips,
        tokens: int,
        progress: Callable[[int, int], float],
        files: tuple[MetricsLog, Completions] | None,
        *,
        wait: bool = False,
    ) -> None:
        self.skips, self.tokens, self._progress, self._files = skips, tokens, progress, files
        self._wait = wait
        self.held: list[Done] = []  # of this group, not told yet

    def add(self, updates: Sequence[Done]) -> None:
        """Take what was done: told now, where there is one group; else with all the others'."""
        if self._wait:
            self.held += updates
        else:
            self.tell(updates)

    def tell(self, updates: Sequence[Done]) -> None:
        """Tell of updates, in their order."""
        for update in updates:
            task = update.task
            if not update.learned:  # no step: Adam's state stays as it is
                said = f"update {task.update}: no response was kept; it is skipped"
                warnings.warn(said, stacklevel=2)
            learned = self.skips.said(task, update.learned) or {"skipped": True}
            self.tokens += update.tokens
            if self._files is None:
                continue
            line = {
                "update": task.update,
                "meta_step": task.step,
                "task": task.number,
                "inner": task.inner,
                "progress": self._progress(task.update + 1, self.tokens),
                "w": task.preference,
                **learned,
                "lr": task.lr,
                **update.more,
            }
            log, completions = self._files
            line = completions.add(update.rows, line)
            log.add([line | {"seconds": update.seconds}])

    def told_of(self, all_groups: Sequence[Sequence[Done]], *, at_once: bool) -> None:
        """Tell of a meta-step's updates of all groups, as one group that made them all would.

        at_once: whether a group's tasks are learnt together, inner update by inner update.
        """

        def place(update: Done) -> tuple[int, int]:
            number, inner = update.task.number, update.task.inner
            return (inner, number) if at_once else (number, inner)

        self.tell(sorted((u for group in all_groups for u in group), key=place))
        self.held = []

    def end_step(self, metrics: dict[str, float]) -> None:
        """Tell what the meta-step itself has to say."""
        if self._files is not None:
            self._files[0].end_step(metrics)

    def sync(self) -> dict[str, Any]:
        """Bring the files to the disk; give their lengths and digests, for a checkpoint."""
        if self._files is None:
            return {"metrics_bytes": 0, "completions_bytes": 0, "files": {}}
        log, completions = self._files
        return {
            "metrics_bytes": log.sync(),
            "completions_bytes": completions.sync(),
            "files": log.digest | completions.digest,
        }

    def close(self) -> None:
        """Close the files."""
        for file in self._files or ():
            file.close()


def done(
    tasks: Sequence[Task],
    parts: Sequence[Batch],
    learned: Sequence[dict[str, float]],
    more: Sequence[dict[str, Any]],
    rows: Sequence[Sequence[Row]],
    *,
    rollout: float,
    collecting: float,
    learning: float,
) -> list[Done]:
    """Put together what tasks that go at once did; of their seconds, equal shares."""
    n = len(tasks)
    seconds = {
        "rollout": rollout / n,
        "reward": max(collecting / n - rollout / n, 0.0),
        "learn": learning / n,
    }
    return [
        Done(dataclasses.replace(task, prompts=()), of_loss, of_rows, tuple(own), p.tokens, seconds)
        for task, p, of_loss, of_rows, own in zip(tasks, parts, learned, more, rows, strict=True)
    ]
