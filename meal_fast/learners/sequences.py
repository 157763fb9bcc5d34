"""Rows of a rollout through a model: packing, micro-batches, and log-probabilities of responses.

    logp_i = Σ_t log π(y_t | prefix, y_<t),  at the sampler's temperature, over the sampled tokens

A loss of whole responses is made of these. Where it is linear in them, Σ_i c_i logp_i with c known
beforehand, `gradient` is all it needs, in one pass; a mean over a response's tokens is then
c_i / length_i. Where c_i depends on other rows (a pair's), `logp` gives the values first, or the
caller keeps such rows together and takes `logp_rows` of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import ops, tree
from ..batch import Rollout
from ..ops import checks
from ..policy import Network, Policy


def hidden(network: Network, rollout: Rollout, rows: Tensor, batch: tree.Packed) -> Tensor:
    """The hidden states (N, D) that predict the sampled tokens of `rows`, in their order."""
    mask = rollout.mask_RT[rows]
    places_N = batch.before_RT[mask[:, : batch.before_RT.shape[1]]]
    return tree.forward(network.body, batch)[places_N]


def token_logp(
    network: Network, rollout: Rollout, rows: Tensor, batch: tree.Packed, temperature: float
) -> Tensor:
    """Log-probabilities (N,) of the sampled tokens of `rows`, in their order.

    float32 (float64 under a float64 model). Logits are never whole: `ops.linear_logprob`.
    """
    logp_N, _ = ops.linear_logprob(
        hidden(network, rollout, rows, batch),
        network.weight,
        rollout.tokens_RT[rows][rollout.mask_RT[rows]],
        temperature=temperature,
        bias=network.bias,
        softcap=network.softcap,
    )
    return logp_N


def divisor(rollout: Rollout, reduce: str) -> float | Tensor:
    """What the whole step's sum of terms is divided by, so that micro-batches add up."""
    if reduce == "dapo":
        return rollout.mask_RT.sum()
    rows, width = rollout.mask_RT.shape
    return rows if reduce == "grpo" else rows * width


def packed(rollout: Rollout, rows: Tensor) -> tree.Packed:
    """The prefixes of `rows` and the rows, laid end to end."""
    groups, group_R = torch.unique_consecutive(rollout.group_R[rows], return_inverse=True)
    mask = rollout.mask_RT[rows]
    width = int(mask.sum(1).max())
    prefixes = [rollout.prefix[g] for g in groups.tolist()]
    adapter = [rollout.adapter[g] for g in groups.tolist()] if rollout.adapter else ()
    tokens_RT, mask_RT = rollout.tokens_RT[rows, :width], mask[:, :width]
    return tree.pack(prefixes, group_R, tokens_RT, mask_RT, adapter)


def micro_batches(rollout: Rollout, budget: int, *, unit: int = 1) -> Iterator[Tensor]:
    """Runs of rows (int64 indices) of at most `budget` tokens, prefixes counted once a run.

    Rows are taken `unit` at a time, and a unit is never split, so one that is longer than the
    budget goes alone.
    """
    device = rollout.group_R.device
    lengths = rollout.mask_RT.sum(1).tolist()
    groups = rollout.group_R.tolist()
    run: list[int] = []
    used, held = 0, -1
    for row in range(0, len(groups), unit):
        length, group = sum(lengths[row : row + unit]), groups[row]
        more = length + (0 if group == held else len(rollout.prefix[group]))
        if run and used + more > budget:
            yield torch.tensor(run, device=device)
            run, used, more = [], 0, length + len(rollout.prefix[group])
        run += range(row, min(row + unit, len(groups)))
        used, held = used + more, group
    yield torch.tensor(run, device=device)


def logp_rows(network: Network, rollout: Rollout, rows: Tensor, temperature: float) -> Tensor:
    """logp of the responses `rows` (int64 indices, one or more) in one pass, (len(rows),).

    Differentiable in the network's parameters. Rows of one group that follow each other share their
    prefix.
    """
    mask = rollout.mask_RT[rows]
    logp_N = token_logp(network, rollout, rows, packed(rollout, rows), temperature)
    # Through the padded shape: a sum by index would not be the same twice on a GPU.
    return logp_N.new_zeros(mask.shape).masked_scatter(mask, logp_N).sum(1)


@torch.no_grad()
def logp(
    network: Network,
    rollout: Rollout,
    temperature: float,
    *,
    micro_tokens: int,
) -> Tensor:
    """logp (R,) of all responses, micro-batch by micro-batch, no gradient."""
    runs = micro_batches(rollout, micro_tokens)
    return torch.cat([logp_rows(network, rollout, run, temperature) for run in runs])


def gradient(
    policy: Policy,
    rollout: Rollout,
    coefficient_R: Tensor,
    temperature: float,
    *,
    micro_tokens: int,
    recompute: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """Σ_i c_i logp_i under the policy, and its gradient: a tensor for each of `policy.trainable`.

    One pass forward and one back. The parameters' own `.grad` is neither read nor written.

    Args:
        coefficient_R: c (R,), a constant; rows where it is 0 go through the model all the same.
        recompute: see `Policy.recomputing`.

    Raises:
        ValueError: no rows, c of another shape.
    """
    checks.require(len(rollout.group_R) >= 1, "rollout", "no rows", "nothing to learn from")
    checks.shape("coefficient_R", coefficient_R, (len(rollout.group_R),))
    coefficient_R = coefficient_R.detach().to(rollout.tokens_RT.device)
    total = torch.zeros((), device=coefficient_R.device)
    gradients = [torch.zeros_like(p) for p in policy.trainable]
    for rows in micro_batches(rollout, micro_tokens):
        with policy.recomputing(recompute):
            logp_R = logp_rows(policy.network, rollout, rows, temperature)
        value = (coefficient_R[rows].to(logp_R.dtype) * logp_R).sum()
        # materialize_grads: an adapter, or a layer, that these rows do not reach.
        made = torch.autograd.grad(value, policy.trainable, materialize_grads=True)
        torch._foreach_add_(gradients, list(made))
        total = total + value.detach()
    return total, gradients
