"""GRPO's loss and gradient for one rollout (BPS A.4 [P]; formula: `ops.linear_policy_loss`).

Prompts go through the model once for all their samples; only sampled tokens reach the head, packed
without padding. Micro-batches bound the memory; their gradients add up to the whole step's, since
each is normalised by the step's own count.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from meal_fast import ops
from meal_fast.config.config import GRPOConfig
from meal_fast.data_types import Rollout, Scored
from meal_fast.models import shared_prefix
from meal_fast.models.policy import Network, Policy

from .sequences import (
    WHOLE,
    Part,
    by_task,
    divisor,
    hidden,
    nothing,
    of_rows,
    of_tokens,
    packed,
    runs,
    token_logp,
)

# Over micro-batches; the other metrics are means over tokens.
SUMMED = {"loss", "policy_loss", "tokens"}
OF_TOKENS = {"ref_logp", "ref_hidden"}  # of what the loss needs of the reference


def grpo(
    policy: Policy,
    rollout: Rollout,
    scored: Scored,
    config: GRPOConfig,
    temperature: float,
    part: Part = WHOLE,
) -> dict[str, Tensor]:
    """Add the gradient of the step's loss to the policy's parameters; give metrics (scalars).

    Of a part: its share of both.

    The rollout's own log-probabilities are the behaviour policy's (logp_old). With beta > 0 the
    reference model sees the same tokens first, before anything is kept for the gradient. Rows that
    were truncated, selected or redrawn have another behaviour policy, and raise ValueError.

    A rollout of several tasks' adapters goes through the stacked policy at once; each task has its
    own loss, whose gradient is that of its factors, and the metrics are (tasks,).

    With `config.keep` it learns from that many rows of each group (`most_telling`).

    Where another program has sampled, its log-probabilities differ a little from the policy's own
    of the same weights: ρ is then the ratio to the policy's own, and a token's policy term is
    weighted by what the two differ in (`truncated`); "logp_gap" says how much that is.
    """
    if not rollout.on_policy:
        raise ValueError(
            "rollout: its rows were truncated, selected or redrawn, so that logp_RT is not the "
            "behaviour policy's; sample without top_k, top_p, min_p and rejection"
        )
    if config.keep:
        rollout, scored = most_telling(rollout, scored, config.keep)
    advantage_R, unsound = _finite(scored.advantage_R, rollout.tasks)
    normalizers = [divisor(rollout, config.reduce, rows) for rows in rollout.tasks]
    made: list[list[dict[str, Tensor]]] = [[] for _ in normalizers]  # of each task its runs'
    batches = [(run, packed(rollout, run.rows)) for run in runs(rollout, config.micro_tokens, part)]
    references: list[dict[str, Any]] = [{} for _ in batches]
    if config.beta > 0:
        with policy.reference() as reference, torch.no_grad():
            references = [
                _of_reference(reference, rollout, batch, config.kl, temperature)
                for _, batch in batches
            ]
    for (run, batch), extra in zip(batches, references, strict=True):
        network, rows = policy.network, run.rows
        with policy.recomputing(config.recompute):
            hidden_MD = hidden(network, batch)
        tokens = {
            "target": of_tokens(rollout.tokens_RT, batch),
            "advantage": of_rows(advantage_R, rows, batch),
            "old_logp": of_tokens(rollout.logp_RT, batch),
            "sequence": batch.row_M,
            **{name: extra.pop(name) for name in OF_TOKENS & extra.keys()},
        }
        gap_M = None
        if rollout.behaviour_logp_RT is not None:
            gap_M = tokens["old_logp"] - of_tokens(rollout.behaviour_logp_RT, batch)
            if config.importance_cap:
                tokens["importance_weight"] = truncated(gap_M, config.importance_cap)
        parts = by_task(rollout, rows)
        hidden_of = hidden_MD.split([at.stop - at.start for _, _, at in parts])
        losses = []
        for (task, _, at), own_MD in zip(parts, hidden_of, strict=True):
            loss, metrics = ops.linear_policy_loss(
                own_MD,
                network.weight,
                **{name: x[at] for name, x in tokens.items()},
                beta=config.beta,
                kl=config.kl,
                clip=(config.clip_low, config.clip_high),
                reduce=config.reduce,
                normalizer=normalizers[task],
                temperature=temperature,
                bias=network.bias,
                softcap=network.softcap,
                **extra,
            )
            losses.append(loss)
            said = metrics | {"loss": loss.detach()}
            if gap_M is not None:
                said |= _of_gap(gap_M[at], config.importance_cap)
            if not run.dummy:
                made[task].append(said)
        run.counted(torch.stack(losses).sum()).backward()
    counts = [sum(rollout.lengths[rows]) for rows in rollout.tasks]
    totals = [_whole(found or [nothing(said)], n) for found, n in zip(made, counts, strict=True)]
    for task in unsound:
        totals[task]["loss"] = torch.full_like(totals[task]["loss"], math.nan)
    if len(totals) == 1:
        return totals[0]
    return {name: torch.stack([total[name] for total in totals]) for name in totals[0]}


def truncated(gap_M: Tensor, cap: float) -> Tensor:
    """Give the truncated importance weights min(π(y_t) / μ(y_t), cap) of tokens, a constant.

    gap_M: log π - log μ, of the learner's model before the update and of the program that sampled,
    with the same weights and temperature. Rows of μ are no draws of π: without truncation
    E_μ[(π/μ) f] = E_π[f]; truncation bounds the variance, and what it biases is seldom: between
    two programs the ratio is near 1. "Truncated importance sampling", as in Yao et al., "Your
    efficient RL framework secretly brings you off-policy RL training" (2025) [R].
    """
    return gap_M.exp().clamp(max=cap)


def _of_gap(gap_M: Tensor, cap: float) -> dict[str, Tensor]:
    """Give means over tokens of |log π - log μ|, and of the weights, and how many are cut."""
    found = {"logp_gap": gap_M.abs().mean()}
    if cap:
        weight_M = truncated(gap_M, cap)
        found["importance"] = weight_M.mean()
        found["importance_capped"] = (weight_M >= cap).float().mean()
    return found


def _finite(advantage_R: Tensor, tasks: Sequence[slice]) -> tuple[Tensor, list[int]]:
    """Put 0 for advantages that are not finite; tell which tasks have them: their loss is NaN.

    On a CPU, where the op would refuse them; on a GPU, where nobody looks, the op's loss is NaN.
    """
    if advantage_R.device.type != "cpu" or bool(advantage_R.isfinite().all()):
        return advantage_R, []
    unsound = [t for t, rows in enumerate(tasks) if not bool(advantage_R[rows].isfinite().all())]
    return advantage_R.nan_to_num(0.0, 0.0, 0.0), unsound


def _whole(runs: list[dict[str, Tensor]], tokens: int) -> dict[str, Tensor]:
    """Give the step's metrics from its runs', as few tensors: SUMMED, and means over the tokens.

    tokens: of the whole step, of which these runs may be a part.
    """
    names = sorted(runs[0], key=lambda name: name not in SUMMED)
    first = sum(name in SUMMED for name in names)
    total: Tensor | float = 0.0
    for run in runs:
        values = torch.stack([run[name].to(run["loss"].dtype) for name in names])
        values[first:] *= run["tokens"]
        total = total + values
    assert isinstance(total, Tensor)
    total[first:] /= max(tokens, 1)
    return dict(zip(names, total.unbind(), strict=True))


def most_telling(rollout: Rollout, scored: Scored, keep: int) -> tuple[Rollout, Scored]:
    """Choose each group's `keep` rows of the largest |advantage|, in their order; ties: the first.

    Sampling is cheaper than learning, and near an advantage of 0 there is nothing to learn: so many
    responses can be drawn, of which a rare good one is seen, and few learnt from (down-sampling of
    rollouts, as in PODS [R]). Advantages stay those of the whole group. What is left out is small,
    not nothing: the gradient is that of the kept rows' mean, and so is the KL term.
    """
    order_R = scored.advantage_R.abs().sort(descending=True, stable=True).indices
    kept: list[int] = []
    taken: Counter[int] = Counter()
    for row in order_R.tolist():  # the one time that the device is waited for
        group = rollout.groups[row]
        if taken[group] < keep:
            kept.append(row)
        taken[group] += 1
    kept.sort()
    (rows,) = shared_prefix.to_device([torch.tensor(kept, dtype=torch.int64)], order_R.device)
    return rollout.of_rows(rows, kept), scored.of_rows(rows)


def _of_reference(
    network: Network, rollout: Rollout, batch: shared_prefix.Packed, kl: str, temperature: float
) -> dict[str, Any]:
    """Give the reference's log-probabilities; for the exact KL all that the loss needs of it."""
    if kl == "exact":
        return {
            "ref_hidden": hidden(network, batch),
            "ref_weight": network.weight,
            "ref_bias": network.bias,
        }
    return {"ref_logp": token_logp(network, rollout, batch, temperature)}
