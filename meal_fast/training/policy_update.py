"""One update of the policy: its loss's gradient, part by part, and Adam's steps along it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from meal_fast.config.config import Config
from meal_fast.models.policy import Policy

from .batch import Batch, Task
from .distributed import Mesh
from .outer import Joint


class PolicyUpdate:
    """Learn from batches, on every process of a group alike.

    loss: of the recipe: (policy, rollout, scored, config.grpo, temperature, part) -> metrics.
    """

    def __init__(
        self, policy: Policy, outer: Joint, loss: Callable, config: Config, mesh: Mesh
    ) -> None:
        self.policy, self.outer, self.loss = policy, outer, loss
        self.config, self.mesh = config, mesh

    def __call__(self, batch: Batch, tasks: Sequence[Task]) -> list[dict[str, float]]:
        """Take Adam's steps along the loss's gradient, `grpo.epochs` of them, for every task.

        Give the last one's metrics, task by task; empty, and no step, where there is no response.
        """
        if not len(batch.rolled.group_R):
            return [{} for _ in tasks]
        options = self.config.grpo
        lanes = self.outer.lanes[: len(tasks)]
        left_out = torch.zeros(len(tasks), device=self.policy.device)
        for _ in range(options.epochs):
            learned = self._gradients(batch)
            norms = []
            for lane, task, loss in zip(lanes, tasks, learned["loss"].reshape(-1), strict=True):
                lane.watch(loss)
                norms.append(lane.advance(task.lr, options.max_grad_norm))
            learned["grad_norm"] = torch.stack(norms)
            left_out = left_out + torch.stack([lane.left_out for lane in lanes])
        learned["left_out"] = left_out  # steps whose loss or gradient was not finite
        values = torch.stack([v.detach().double().reshape(-1) for v in learned.values()])
        found = [dict(zip(learned, of_task, strict=True)) for of_task in values.T.tolist()]
        for lane, metrics in zip(lanes, found, strict=True):
            if metrics["left_out"]:
                lane.settle()
        return found

    def _gradients(self, batch: Batch) -> dict[str, Tensor]:
        """Leave the loss's gradient in the parameters; give its metrics.

        Of several parts each is differentiated by itself, and they are added up in one order.
        """
        options, temperature = self.config.grpo, self.config.rollout.temperature
        of = self.policy, batch.rolled, batch.scored, options, temperature
        if self.mesh.layout.virtual == 1:
            with self.policy.stacked(self.outer.stack):
                return self.loss(*of)
        trained = [p for lane in self.outer.lanes for p in lane.parameters]
        parts: dict[int, list[Tensor]] = {}
        learned: dict[str, Tensor] = {}
        for part in self.mesh.parts:
            with self.policy.stacked(self.outer.stack):  # whose end leaves the tasks' gradients
                learned = self.loss(*of, part)
            told = torch.stack([value.detach().double() for value in learned.values()])
            if self.policy.in_parts:  # gradients are added up going back, over all processes
                parts[part.number] = [told]
                continue
            # A part without a row has no gradient.
            parts[part.number] = [
                told, *(torch.zeros_like(p) if p.grad is None else p.grad for p in trained)
            ]  # fmt: skip
            for p in trained:
                p.grad = None
        self.policy.end_update()
        told, *gradients = self.mesh.summed(parts)
        if self.policy.in_parts:
            self.outer.held.take_gradients()
            gradients = [p.grad for p in trained if p.grad is not None]
        learned = {name: x.to(learned[name].dtype) for name, x in zip(learned, told, strict=True)}
        # Without an ordered pair there is no gradient, as in one part: zeros would be a step of
        # Adam's, along its momentum.
        nothing = "pairs" in learned and not bool(learned["pairs"].any())
        for p, gradient in zip(trained, gradients, strict=True):
            p.grad = None if nothing else gradient
        return learned
