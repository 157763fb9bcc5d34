"""What one inner update is asked for, and what it learns from: `Task` -> `Batch`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from meal_fast.data.preferences import Preference
from meal_fast.data_types import Prompt, Rollout, Scored, Weighted

RngKey = tuple[int | str, ...]


@dataclass(frozen=True)
class Task:
    """Hold one inner update of one preference, before anything is sampled."""

    update: int  # its number in the run
    step: int  # the meta-step
    number: int  # of the task in its meta-step
    inner: int  # of the inner update in its task
    preference: Preference
    prompts: tuple[Prompt, ...]
    rng_key: RngKey  # keys what is drawn, with the prompt, the preference and the sample
    progress: float  # the share of the run that is done before it
    lr: float


@dataclass(frozen=True)
class Hindsight:
    """Hold what Meal's preference net learns from: the preferences that responses realised."""

    prompts: tuple[Prompt, ...]  # B, of the update
    w_star_RK: Tensor  # of each response that passed, the preference it is to be learnt under
    group_R: Tensor  # int64, into prompts
    asked_R: Tensor  # int64, into prompts: of the batch's rows, which are in another order


@dataclass(frozen=True)
class Batch:
    """Hold what one policy update learns from."""

    rolled: Rollout  # what the learner sees; it may hold no row
    scored: Scored | Weighted
    reward_RK: Tensor  # raw, of all responses that were sampled, kept or not
    tokens: int  # generated, for all of them
    log: dict[str, Any] = field(default_factory=dict)
    hindsight: Hindsight | None = None  # Meal's
    asked_RK: Tensor | None = None  # what its rows were asked for, where they are learnt otherwise
    counts: dict[str, Any] = field(default_factory=dict)  # of rows that a reward model's limit cut

    def parts(self) -> list[Batch]:
        """Give what each task learns from, where it holds that of several."""
        if not self.rolled.task_id:
            return [self]
        parts: list[Batch] = []
        for rows in self.rolled.tasks:
            rolled, scored = self.rolled.of_task(rows), self.scored.of_rows(rows)
            tokens = sum(rolled.lengths)
            parts.append(
                replace(
                    self,
                    rolled=rolled,
                    scored=scored,
                    tokens=tokens,
                    reward_RK=self.reward_RK[rows],
                    counts={} if parts else self.counts,  # which are of all tasks: said once
                )
            )
        return parts
