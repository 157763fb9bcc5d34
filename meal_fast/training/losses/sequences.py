"""Rows of a rollout through a model: packing, micro-batches, and log-probabilities of responses.

    logp_i = Σ_t log π(y_t | prefix, y_<t),  at the sampler's temperature, over the sampled tokens

A loss of whole responses is made of these. Where it is linear in them, Σ_i c_i logp_i with c known
beforehand, `gradient` is all it needs, in one pass; a mean over a response's tokens is then
c_i / length_i. Where c_i depends on other rows (a pair's), `logp` gives the values first, or the
caller keeps such rows together and takes `logp_rows` of them.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from meal_fast import ops
from meal_fast.common import require
from meal_fast.data_types import Rollout
from meal_fast.models import shared_prefix
from meal_fast.models.policy import Network, Policy
from meal_fast.models.sizes import ON_A_CPU
from meal_fast.ops import checks


@dataclass(frozen=True)
class Part:
    """Say which of an update's `of` parts of rows a pass over it differentiates; by default all.

    Losses, and what they tell, add up over the parts: each divides by what the whole update has.
    `even`: each part takes as many passes forward and back as any other, whatever is in it, since
    processes that hold a model together must; what is too many counts nothing.
    """

    number: int = 0
    of: int = 1
    even: bool = False


WHOLE = Part()


@dataclass(frozen=True)
class Run:
    """Hold the rows of one pass; `dummy`: it is made for company, and counts nothing."""

    rows: range
    dummy: bool = False

    def counted(self, loss: Tensor) -> Tensor:
        """Give what the gradient is taken of."""
        return loss * 0.0 if self.dummy else loss


def nothing(said: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give metrics like these of no rows."""
    return {name: torch.zeros_like(value) for name, value in said.items()}


def hidden(network: Network, batch: shared_prefix.Packed) -> Tensor:
    """Give the hidden states (M, D) that predict the sampled tokens of a run, in their order."""
    return batch.predicting(shared_prefix.forward(network.body, batch))


def token_logp(
    network: Network, rollout: Rollout, batch: shared_prefix.Packed, temperature: float
) -> Tensor:
    """Give log-probabilities (M,) of the sampled tokens of a run, in their order.

    float32 (float64 under a float64 model). Logits are never whole: `ops.linear_logprob`.
    """
    logp_M, _ = ops.linear_logprob(
        hidden(network, batch),
        network.weight,
        of_tokens(rollout.tokens_RT, batch),
        temperature=temperature,
        bias=network.bias,
        softcap=network.softcap,
    )
    return logp_M


@torch.no_grad()
def token_logp_RT(
    network: Network, rollout: Rollout, temperature: float, *, micro_tokens: int
) -> Tensor:
    """Give log-probabilities (R, T) of the sampled tokens, 0 where masked; no gradient."""
    logp = torch.zeros_like(rollout.logp_RT).reshape(-1)
    for rows in micro_batches(rollout, micro_tokens):
        batch = packed(rollout, rows)
        logp_M = token_logp(network, rollout, batch, temperature)
        logp.index_copy_(0, batch.sampled_M, logp_M.to(logp.dtype))
    return logp.view_as(rollout.logp_RT)


def of_tokens(values_RT: Tensor, batch: shared_prefix.Packed) -> Tensor:
    """Give the values (M,) of the sampled tokens of a run."""
    return values_RT.reshape(-1).index_select(0, batch.sampled_M)


def of_rows(values_R: Tensor, rows: range, batch: shared_prefix.Packed) -> Tensor:
    """Spread values of the rows of a run, (M,): for each of its sampled tokens that of its row."""
    return values_R[rows.start : rows.stop].index_select(0, batch.row_M)


def row_sums(values_M: Tensor, rows: range, batch: shared_prefix.Packed) -> Tensor:
    """Sum values of the tokens of a run over each of its rows."""
    if values_M.device.type == "cpu":
        return values_M.new_zeros(len(rows)).index_add(0, batch.row_M, values_M)
    # As a product with zeros and ones: atomics would not give the same sum twice.
    numbers = torch.arange(len(rows), device=values_M.device)
    return (numbers[:, None] == batch.row_M).to(values_M.dtype) @ values_M


def check_pairs(rollout: Rollout) -> None:
    """Raise ValueError where the samples of a prompt are not pairs."""
    counted = Counter(rollout.groups)
    sizes = [counted[group] for group in range(len(rollout.prefix))]
    if any(size % 2 for size in sizes):
        raise ValueError(f"rollout.samples={sizes}: pairs need an even number a prompt")


def by_task(rollout: Rollout, rows: range) -> list[tuple[int, range, slice]]:
    """Split a run of rows by task: its number, its rows, and where their tokens lie among M."""
    parts, start = [], 0
    for task, share in enumerate(rollout.tasks):
        own = range(max(rows.start, share.start), min(rows.stop, share.stop))
        if len(own):
            end = start + sum(rollout.lengths[own.start : own.stop])
            parts.append((task, own, slice(start, end)))
            start = end
    return parts


def divisor(rollout: Rollout, reduce: str, rows: slice = slice(None)) -> int:
    """Give what the whole step's sum of terms is divided by, so that micro-batches add up.

    `rows`: those of one task, as if they were a rollout: no wider than the longest.
    """
    lengths = rollout.lengths[rows]
    if reduce == "dapo":
        return sum(lengths)
    width = max(lengths) if rollout.task_id else rollout.mask_RT.shape[1]
    return len(lengths) if reduce == "grpo" else len(lengths) * width


def packed(rollout: Rollout, rows: Sequence[int]) -> shared_prefix.Packed:
    """Lay the prefixes of `rows` and the rows end to end; nothing is read from the device.

    Rows of one group that follow each other share their prefix.
    """
    groups: list[int] = []
    behind = []
    for group in (rollout.groups[row] for row in rows):
        if not groups or group != groups[-1]:
            groups.append(group)
        behind.append(len(groups) - 1)
    return shared_prefix.pack(
        [rollout.prefix[g] for g in groups],
        behind,
        [rollout.lengths[row] for row in rows],
        rollout.tokens_RT,
        rows=rows,
        task_id=[rollout.task_id[g] for g in groups] if rollout.task_id else (),
    )


def rows_of(rollout: Rollout, part: Part) -> range:
    """Give the rows of a part: whole groups, neighbours, as many tokens as other parts' about."""
    if part.of == 1:
        return range(len(rollout.groups))
    tokens = Counter[int]()
    for group, length in zip(rollout.groups, rollout.lengths, strict=True):
        tokens[group] += length
    total, before = max(sum(tokens.values()), 1), 0
    of_group = {}
    for group, own in tokens.items():  # in their order
        of_group[group] = min((2 * before + own) * part.of // (2 * total), part.of - 1)
        before += own
    parts = [of_group[group] for group in rollout.groups]
    return range(bisect_left(parts, part.number), bisect_right(parts, part.number))


def runs(rollout: Rollout, budget: int, part: Part = WHOLE, *, unit: int = 1) -> list[Run]:
    """Split a part's rows into runs, as `micro_batches` does; one at least, if only a dummy."""

    def real(number: int) -> list[Run]:
        rows = rows_of(rollout, dataclasses.replace(part, number=number))
        return [Run(run) for run in micro_batches(rollout, budget, unit=unit, rows=rows)]

    mine = real(part.number)
    most = max(len(real(number)) for number in range(part.of)) if part.even else 1
    return mine + [Run(range(unit), dummy=True)] * (most - len(mine))


def micro_batches(
    rollout: Rollout, budget: int, *, unit: int = 1, rows: range | None = None
) -> Iterator[range]:
    """Split into runs of rows of at most `budget` tokens, as memory counts them: `Size`.

    Rows are taken `unit` at a time, and a unit is never split, so one that is longer than the
    budget goes alone. A budget of 0 is that of a CPU; a run has settled on its device's. `rows`:
    neighbours, all by default.
    """
    budget = budget or ON_A_CPU.micro_tokens
    whole = range(len(rollout.groups)) if rows is None else rows
    start, size, held = whole.start, Size(), -1
    for row in range(whole.start, whole.stop, unit):
        end, group = min(row + unit, whole.stop), rollout.groups[row]
        lengths, prefix = rollout.lengths[row:end], len(rollout.prefix[group])
        grown = size.and_rows(lengths, 0 if group == held else prefix)
        if row > start and grown.tokens > budget:
            yield range(start, row)
            start, grown = row, Size().and_rows(lengths, prefix)
        size, held = grown, group
    if whole:
        yield range(start, whole.stop)


@dataclass(frozen=True)
class Size:
    """Estimate what a pass keeps for its gradient, in tokens: ¾ real + ¼ padded.

    Most of a layer sees the tokens of a run without padding, but attention lays them out in
    rectangles: prefixes x the longest, rows x the longest row. One long row among many short ones
    widens that of all. The shares are measured: for shapes of SmolLM2, Qwen2 and Llama-3, both
    tunings, this is within a fifth of the bytes kept, and padding's share 0.21 to 0.26 (a row's
    copy of its prefix's keys and values included). Of rows of one length it is their tokens.
    """

    prefixes: int = 0
    longest_prefix: int = 0
    rows: int = 0
    longest: int = 0
    real: int = 0

    def and_rows(self, lengths: Sequence[int], prefix: int) -> Size:
        """Add rows, behind a prefix of so many tokens; 0: behind the last one."""
        return Size(
            self.prefixes + (prefix > 0),
            max(self.longest_prefix, prefix),
            self.rows + len(lengths),
            max(self.longest, *lengths),
            self.real + prefix + sum(lengths),
        )

    @property
    def tokens(self) -> float:
        """Give it as a number of tokens."""
        padded = self.prefixes * self.longest_prefix + self.rows * self.longest
        return (3 * self.real + padded) / 4


def logp_rows(
    network: Network, rollout: Rollout, rows: Sequence[int], temperature: float
) -> Tensor:
    """Give logp of the responses `rows` (one or more) in one pass, (len(rows),).

    Differentiable in the network's parameters. Rows of one group that follow each other share their
    prefix.
    """
    batch, width = packed(rollout, rows), rollout.tokens_RT.shape[1]
    logp_M = token_logp(network, rollout, batch, temperature)
    # Through the padded shape: a sum by index would not be the same twice on a GPU.
    place_M = batch.row_M * width + batch.sampled_M % width
    padded = logp_M.new_zeros(len(rows) * width).index_copy(0, place_M, logp_M)
    return padded.view(len(rows), width).sum(1)


class Shared(Protocol):
    """Who differentiates which parts of an update: one process all of it, or several."""

    @property
    def parts(self) -> Sequence[Part]:
        """Give this process's."""

    def summed(self, parts: dict[int, list[Tensor]]) -> list[Tensor]:
        """Add up what every part has, by number; what is handed over is changed."""


class Alone:
    """Differentiate the whole update."""

    parts: Sequence[Part] = (WHOLE,)

    def summed(self, parts: dict[int, list[Tensor]]) -> list[Tensor]:
        """Give the one part's."""
        return parts[0]


ALONE = Alone()


@torch.no_grad()
def logp(
    network: Network,
    rollout: Rollout,
    temperature: float,
    *,
    micro_tokens: int,
    shared: Shared = ALONE,
) -> Tensor:
    """Give logp (R,) of all responses, micro-batch by micro-batch, no gradient."""
    parts = {}
    for part in shared.parts:
        found = []
        values_R = torch.zeros(len(rollout.groups), device=rollout.tokens_RT.device)
        for run in runs(rollout, micro_tokens, part):
            found.append(logp_rows(network, rollout, run.rows, temperature))
            if not run.dummy:
                values_R = values_R.to(found[-1].dtype)
                values_R[run.rows.start : run.rows.stop] = found[-1]
        parts[part.number] = [values_R]
    return shared.summed(parts)[0]


def gradient(
    policy: Policy,
    rollout: Rollout,
    coefficient_R: Tensor,
    temperature: float,
    *,
    micro_tokens: int,
    recompute: bool = False,
    shared: Shared = ALONE,
) -> tuple[Tensor, list[Tensor]]:
    """Give Σ_i c_i logp_i under the policy, and its gradient, a tensor a trainable parameter.

    One pass forward and one back. The parameters' own `.grad` is neither read nor written.

    Args:
        coefficient_R: c (R,), a constant; rows where it is 0 go through the model all the same.
        recompute: see `Policy.recomputing`.

    Raises:
        ValueError: no rows, c of another shape.
    """
    require(len(rollout.group_R) >= 1, "rollout", "no rows", "nothing to learn from")
    checks.shape("coefficient_R", coefficient_R, (len(rollout.group_R),))
    coefficient_R = coefficient_R.detach().to(rollout.tokens_RT.device)
    parts = {}
    for part in shared.parts:
        total = torch.zeros((), device=coefficient_R.device)
        gradients = [torch.zeros_like(p) for p in policy.trainable]
        for run in runs(rollout, micro_tokens, part):
            rows = run.rows
            with policy.recomputing(recompute):
                logp_R = logp_rows(policy.network, rollout, rows, temperature)
            value = (coefficient_R[rows.start : rows.stop].to(logp_R.dtype) * logp_R).sum()
            value = run.counted(value)
            # materialize_grads: a task, or a layer, that these rows do not reach.
            made = torch.autograd.grad(value, policy.trainable, materialize_grads=True)
            torch._foreach_add_(gradients, list(made))
            total = total + value.detach()
        parts[part.number] = [total, *gradients]
    total, *gradients = shared.summed(parts)
    return total, gradients
