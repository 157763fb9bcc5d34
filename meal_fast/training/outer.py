"""The outer loops: Reptile over preferences (BPS A.4 [P]), none, and a model a preference.

For each preference of a meta-step the inner updates start from the same theta_t; then

    theta_{t+1} = theta_t + epsilon_t * mean_j(theta_{t,j} - theta_t)

with epsilon_t falling linearly from epsilon_0 to 0. With LoRA, theta are the factors A and B:
averaging factors is not averaging their product [R].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from meal_fast.config.config import GRPOConfig, MetaConfig
from meal_fast.data.preferences import Preference
from meal_fast.models.shards import Held

from .distributed import ALONE, Drawn, Mesh
from .parts import moved
from .tree_sum import TreeSum

AdamState = dict[str, list[Tensor]]  # step, exp_avg, exp_avg_sq: one tensor a parameter


class Joint:
    """Run no outer loop: every inner update moves the policy, Adam's state goes on."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        meta: MetaConfig,
        inner: GRPOConfig,
        mesh: Mesh = ALONE,
    ) -> None:
        self.held = Held(parameters)
        self.parameters: list[Tensor] = list(self.held.local)  # of this process: mostly all of them
        self.meta, self.inner, self.mesh = meta, inner, mesh
        betas = (0.0, 0.999) if self._momentum_free() else (0.9, 0.999)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=inner.lr, betas=betas, weight_decay=inner.weight_decay, fused=True
        )
        self.left_out = torch.zeros((), device=self.parameters[0].device)
        self._loss: Tensor | None = None
        self._prepare()

    def _prepare(self) -> None:
        """Make what a kind of outer loop has beside these."""

    def _momentum_free(self) -> bool:
        return False

    @property
    def lanes(self) -> Sequence[Joint]:
        """Give what takes the inner updates of a task, for as many tasks as go at once."""
        return [self]

    @property
    def stack(self) -> Sequence[Sequence[Tensor]]:
        """Give the factors of tasks that go at once; empty where the policy's own are trained."""
        return ()

    def begin(self, shares: Sequence[Drawn]) -> None:
        """Prepare for the tasks of a meta-step, as the groups share them."""

    def in_batches(self, drawn: Drawn) -> Iterator[Drawn]:
        """Give tasks of a meta-step, as many together as go at once."""
        n = len(self.lanes)
        return (drawn[first : first + n] for first in range(0, len(drawn), n))

    @contextmanager
    def tasks(self, drawn: Drawn) -> Iterator[None]:
        """Put each task's parameters and Adam state in place, and take up what became of them."""
        lanes = self.lanes[: len(drawn)]
        for lane, (_, w) in zip(lanes, drawn, strict=True):
            lane.begin_task(w)
        yield
        for lane, (number, w) in zip(lanes, drawn, strict=True):
            lane.end_task(number, w)

    def begin_task(self, w: Preference) -> None:
        """Prepare for the inner updates of one preference."""

    def watch(self, loss: Tensor) -> None:
        """Leave out the next step where this loss, whose gradient it follows, is not finite."""
        self._loss = loss.detach()

    def advance(self, lr: float, max_grad_norm: float) -> Tensor:
        """Take Adam's step along the gradients, drop them; give their norm before any clipping.

        Where that norm, or the loss that is watched, is not finite, parameters and Adam's state
        stay as they are, and `left_out` is 1 instead of 0. It is decided where the parameters are:
        nothing waits for it.
        """
        norm = self.held.clip(max_grad_norm or float("inf"))
        # Unclipped, Adam squares it.
        sound = (norm if max_grad_norm else norm * norm).isfinite()
        if self._loss is not None:
            sound, self._loss = sound & self._loss.isfinite(), None
        self.left_out = (~sound).float()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # What a gradient scaler sets: the fused step then reads it beside the gradients.
        self.optimizer.found_inf = self.left_out  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def settle(self) -> None:
        """After a step that was left out: drop an Adam state that no step has made yet.

        The optimizer makes one of zeros, and it would be averaged with those of other tasks.
        """
        state = self.optimizer.state[self.parameters[0]]
        if state and float(state["step"]) == 0:
            self.optimizer.state.clear()

    def end_task(self, number: int, w: Preference) -> None:
        """Take up what became of them."""

    def end(self, progress: float) -> dict[str, float]:
        """Make a meta-step's tasks one update, and give metrics.

        progress: the share of the run that was done before the meta-step.
        """
        return {}

    def models(self) -> dict[Preference, list[Tensor]]:
        """Give the parameters by preference; empty where one model serves all preferences."""
        return {}

    def state(self, *, copies: bool = True) -> dict[str, Any]:
        """Give everything that the next meta-step depends on.

        copies: for later; else what is given changes with the next step. Of parameters that several
        processes hold together these are DTensors; `load_state` takes such as are whole.
        """
        theta = [p.detach() for p in self.parameters]
        if copies:
            theta = [p.clone() for p in theta]
        adam = self._of_all(self._adam(copies=copies), self.held.assembled)
        return {"theta": self.held.assembled(theta), "adam": adam}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        with torch.no_grad():
            theta = self.held.parts(state["theta"])
            for parameter, value in zip(self.parameters, theta, strict=True):
                parameter.copy_(value)
        self._set_adam(self._of_all(state["adam"], self.held.parts))

    @staticmethod
    def _of_all(adam: AdamState, change: Callable[[list[Tensor]], list[Tensor]]) -> AdamState:
        """Change the moments, which are shaped as parameters are."""
        return {name: x if name == "step" else change(x) for name, x in adam.items()}

    def _adam(self, *, copies: bool = True) -> AdamState:
        held = [self.optimizer.state[p] for p in self.parameters]
        if not held[0]:
            return {}
        found = {n: [s[n] for s in held] for n in ("step", "exp_avg", "exp_avg_sq")}
        return {n: [x.clone() for x in xs] for n, xs in found.items()} if copies else found

    def _set_adam(self, adam: AdamState) -> None:
        self.optimizer.state.clear()
        if adam:
            for i, parameter in enumerate(self.parameters):
                # A checkpoint is read onto the CPU; the optimizer works where its parameters are.
                own = {n: v[i].to(parameter.device, copy=True) for n, v in adam.items()}
                self.optimizer.state[parameter] = own


class Reptile(Joint):
    """Start every task from the snapshot, and move it along the mean of the tasks' deltas.

    Adam's state (`meta.adam`): `persist_v`, beta_1 = 0 and every task starts from the snapshot's
    second moment, which afterwards becomes the mean of the tasks' (so their order does not matter);
    `reset`, fresh for every task; `per_preference`, kept for each preference seen.
    """

    def _prepare(self) -> None:
        if self.meta.n_inner < 2:
            raise ValueError(
                f"meta.n_inner={self.meta.n_inner}: Reptile needs at least 2 inner updates; "
                "with 1 it is joint training"
            )
        self._theta: list[Tensor] = []
        self._start: AdamState = {}
        self._shares: Sequence[Drawn] = ()
        self._tree = TreeSum(1)
        self._by_preference: dict[Preference, AdamState] = {}
        self._ran: list[Preference] = []  # in this meta-step and this group

    def _momentum_free(self) -> bool:
        return self.meta.adam == "persist_v"

    def begin(self, shares: Sequence[Drawn]) -> None:
        self._theta = [p.detach().clone() for p in self.parameters]
        self._start, self._shares, self._ran = self._adam(), shares, []
        self._tree = TreeSum(sum(map(len, shares)))

    @torch.no_grad()
    def begin_task(self, w: Preference) -> None:
        torch._foreach_copy_(self.parameters, self._theta)
        adam: AdamState = {}
        if self.meta.adam == "persist_v":
            adam = self._start
        elif self.meta.adam == "per_preference":
            adam = self._by_preference.get(w, {})
        self._set_adam(adam)

    @torch.no_grad()
    def end_task(self, number: int, w: Preference) -> None:
        """Add the task's delta to those of its neighbours, and v; per_preference: keep its Adam."""
        delta = list(torch._foreach_sub(self.parameters, self._theta))
        adam = self._adam()
        size = self.held.norm(delta).double()  # nothing waits for it
        none = torch.zeros_like(size)
        step = adam["step"][0].to(size) if adam else none
        told = torch.stack([size, size * size, torch.ones_like(size) if adam else none, step])
        v: list[Tensor] = []
        if self.meta.adam == "persist_v":  # a task of skipped updates has none
            v = adam["exp_avg_sq"] if adam else [torch.zeros_like(x) for x in delta]
        elif self.meta.adam == "per_preference":
            self._by_preference[w] = adam
            self._ran.append(w)
        self._tree.add(number, [told, *delta, *v])

    @torch.no_grad()
    def end(self, progress: float) -> dict[str, float]:
        n, shares, like = len(self.parameters), self._shares, self._theta
        tasks = sum(map(len, shares))
        told = torch.empty(4, dtype=torch.float64, device=like[0].device)
        v = like if self.meta.adam == "persist_v" else []
        told, *summed = self.mesh.summed_across(self._tree, shares, [told, *like, *v])
        mean = list(torch._foreach_div(summed[:n], tasks))
        sizes, squares, learned, steps = told.tolist()
        epsilon = self.meta.epsilon * (1.0 - progress)
        whole = float(self.held.norm(mean))
        norm = whole * epsilon
        if self.meta.max_delta and norm > self.meta.max_delta:
            epsilon *= self.meta.max_delta / norm
        torch._foreach_copy_(self.parameters, self._theta)
        torch._foreach_add_(self.parameters, mean, alpha=epsilon)
        if v and learned:
            average = list(torch._foreach_div(summed[n:], learned))
            step = torch.tensor(steps / learned, dtype=torch.float32)
            self._set_adam(
                {
                    "step": [step.to(x.device) for x in average],
                    "exp_avg": [torch.zeros_like(x) for x in average],  # beta_1 is 0
                    "exp_avg_sq": average,
                }
            )
        if self.meta.adam == "per_preference" and self.mesh.layout.groups > 1:
            self._exchange()
        metrics = {"delta_norm": norm, "epsilon": epsilon}
        if tasks > 1:
            between = sizes * sizes - squares  # sum over pairs of |a| |b|, and of a . b below
            dot = (whole * tasks) ** 2 - squares
            metrics["delta_cosine"] = dot / between if between else 0.0
        return metrics

    def _exchange(self) -> None:
        """Give the other groups what Adam has of the preferences that were learnt here."""
        mine = {w: self._by_preference[w] for w in self._ran}
        groups = self.mesh.across_groups(lambda: moved(mine, "cpu"))
        for number, theirs in enumerate(groups):  # the last task of a preference is the one kept
            self._by_preference |= mine if number == self.mesh.number else theirs

    def state(self, *, copies: bool = True) -> dict[str, Any]:
        of = {w: self._of_all(a, self.held.assembled) for w, a in self._by_preference.items()}
        return {**super().state(copies=copies), "by_preference": of}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        kept: dict[Preference, AdamState] = state["by_preference"]
        self._by_preference = {w: self._of_all(a, self.held.parts) for w, a in kept.items()}


class ParallelReptile(Reptile):
    """Run Reptile with a meta-step's tasks at once: each has factors and an Adam of its own.

    The same meta-update as one task after the other, since all start from the snapshot; but with
    `per_preference`, tasks of one preference in a meta-step do not inherit from each other, and the
    last one's state is kept.
    """

    def _prepare(self) -> None:
        super()._prepare()
        laid, of = self.mesh.layout, (self.meta, self.inner, self.mesh)
        at_once = max(len(laid.tasks(g, self.meta.tasks)) for g in range(laid.groups))
        self._lanes = [
            Reptile([nn.Parameter(p.detach().clone()) for p in self.parameters], *of)
            for _ in range(at_once)
        ]

    @property
    def lanes(self) -> Sequence[Joint]:
        return self._lanes

    @property
    def stack(self) -> Sequence[Sequence[Tensor]]:
        return [lane.parameters for lane in self._lanes]

    def begin(self, shares: Sequence[Drawn]) -> None:
        super().begin(shares)
        for lane in self._lanes:  # they start from one snapshot, and add to one sum of deltas
            lane._theta, lane._start, lane._by_preference = (
                self._theta, self._start, self._by_preference,
            )  # fmt: skip
            lane._tree, lane._ran = self._tree, self._ran


class Separate(Joint):
    """Train a model for each preference, as if it were alone.

    Its parameters and its Adam state are put into place for its tasks and kept between them; all
    models start from the same parameters, with an empty Adam state. `spread`, a metric: the root
    mean square of the models' distances to their mean, over all parameters.
    """

    def _prepare(self) -> None:
        self._first = [p.detach().clone() for p in self.parameters]
        self._theta: dict[Preference, list[Tensor]] = {}
        self._of: dict[Preference, AdamState] = {}
        self._shares: Sequence[Drawn] = ()
        self._tree = TreeSum(1)

    def begin(self, shares: Sequence[Drawn]) -> None:
        self._shares, self._tree = shares, TreeSum(sum(map(len, shares)))

    @torch.no_grad()
    def begin_task(self, w: Preference) -> None:
        torch._foreach_copy_(self.parameters, self._theta.get(w, self._first))
        self._set_adam(self._of.get(w, {}))

    @torch.no_grad()
    def end_task(self, number: int, w: Preference) -> None:
        self._theta[w] = [p.detach().clone() for p in self.parameters]
        self._of[w] = self._adam()
        away = list(torch._foreach_sub(self.parameters, self._first))
        square = self.held.norm(away).double().square().reshape(1)
        self._tree.add(number, [square, *away])

    @torch.no_grad()
    def end(self, progress: float) -> dict[str, float]:
        """Say how far the models are from their mean, by how far they are from where they began."""
        models = sum(map(len, self._shares))
        square = torch.empty(1, dtype=torch.float64, device=self._first[0].device)
        like = [square, *self._first]
        square, *away = self.mesh.summed_across(self._tree, self._shares, like)
        mean = float(self.held.norm(away)) / models
        return {"spread": max(float(square) / models - mean * mean, 0.0) ** 0.5}

    def _everybody(self) -> tuple[dict[Preference, list[Tensor]], dict[Preference, AdamState]]:
        """Give the models and Adam states of all groups, each from the group that trains it."""
        theta, adam = dict(self._theta), dict(self._of)
        if self.mesh.layout.groups == 1 or not self._shares:  # all are here, trained or loaded
            return theta, adam
        held = {w: (theta[w], adam[w]) for _, w in self._shares[self.mesh.number]}
        for theirs in self.mesh.across_groups(lambda: moved(held, "cpu")):
            theta |= {w: found for w, (found, _) in theirs.items() if w not in held}
            adam |= {w: found for w, (_, found) in theirs.items() if w not in held}
        order = [w for share in self._shares for _, w in share]
        return {w: theta[w] for w in order}, {w: adam[w] for w in order}

    def models(self) -> dict[Preference, list[Tensor]]:
        theta, _ = self._everybody()
        return theta

    def state(self, *, copies: bool = True) -> dict[str, Any]:
        theta, adam = self._everybody()
        return {"models": theta, "adam": adam}

    def load_state(self, state: dict[str, Any]) -> None:
        self._theta = {
            w: [value.to(like.device) for value, like in zip(theta, self._first, strict=True)]
            for w, theta in state["models"].items()
        }
        self._of = dict(state["adam"])
