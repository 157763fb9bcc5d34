"""GRPO's loss and gradient for one rollout (BPS A.4 [P]; formula: `ops.linear_policy_loss`).

Prompts go through the model once for all their samples; only sampled tokens reach the head, packed
without padding. Micro-batches bound the memory; their gradients add up to the whole step's, since
each is normalised by the step's own count.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .. import ops, tree
from ..batch import Rollout, Scored
from ..config import GRPOConfig
from ..policy import Network, Policy
from .sequences import divisor, hidden, micro_batches, packed, token_logp

# Over micro-batches; the other metrics are means over tokens.
SUMMED = {"loss", "policy_loss", "tokens"}
OF_TOKENS = {"ref_logp", "ref_hidden"}  # of what the loss needs of the reference


def grpo(
    policy: Policy, rollout: Rollout, scored: Scored, config: GRPOConfig, temperature: float
) -> dict[str, Tensor]:
    """Adds the gradient of the step's loss to the policy's parameters; returns metrics (scalars).

    The rollout's own log-probabilities are the behaviour policy's (logp_old). With beta > 0 the
    reference model sees the same tokens first, before anything is kept for the gradient. Rows that
    were truncated, selected or redrawn have another behaviour policy, and raise ValueError.

    A rollout of several tasks' adapters goes through the stacked policy at once; each task has its
    own loss, whose gradient is that of its factors, and the metrics are (tasks,).

    With `config.keep` it learns from that many rows of each group (`most_telling`).
    """
    if not rollout.on_policy:
        raise ValueError(
            "rollout: its rows were truncated, selected or redrawn, so that logp_RT is not the "
            "behaviour policy's; sample without top_k, top_p, min_p and rejection"
        )
    if config.keep:
        rollout, scored = most_telling(rollout, scored, config.keep)
    normalizers = [divisor(rollout.of_task(rows), config.reduce) for rows in rollout.tasks]
    totals: list[dict[str, Tensor]] = [{} for _ in normalizers]
    batches = [
        (rows, packed(rollout, rows)) for rows in micro_batches(rollout, config.micro_tokens)
    ]
    references: list[dict[str, Any]] = [{} for _ in batches]
    if config.beta > 0:
        with policy.reference() as reference, torch.no_grad():
            references = [
                _of_reference(reference, rollout, rows, batch, config.kl, temperature)
                for rows, batch in batches
            ]
    for (rows, batch), extra in zip(batches, references, strict=True):
        network = policy.network
        with policy.recomputing(config.recompute):
            hidden_ND = hidden(network, rollout, rows, batch)
        losses = []
        for task, own, at in by_task(rollout, rows):
            mask = rollout.mask_RT[own]
            width = mask.shape[1]
            loss, metrics = ops.linear_policy_loss(
                hidden_ND[at],
                network.weight,
                rollout.tokens_RT[own][mask],
                scored.advantage_R[own, None].expand(-1, width)[mask],
                old_logp=rollout.logp_RT[own][mask],
                sequence=own[:, None].expand(-1, width)[mask],
                beta=config.beta,
                kl=config.kl,
                clip=(config.clip_low, config.clip_high),
                reduce=config.reduce,
                normalizer=normalizers[task],
                temperature=temperature,
                bias=network.bias,
                softcap=network.softcap,
                **{name: x[at] if name in OF_TOKENS else x for name, x in extra.items()},
            )
            losses.append(loss)
            metrics["loss"] = loss.detach()
            for name, value in metrics.items():
                more = value if name in SUMMED else value * metrics["tokens"]
                totals[task][name] = totals[task].get(name, 0.0) + more
        torch.stack(losses).sum().backward()
    for total in totals:
        for name in total.keys() - SUMMED:
            total[name] = total[name] / total["tokens"].clamp(min=1)
    if len(totals) == 1:
        return totals[0]
    return {name: torch.stack([total[name] for total in totals]) for name in totals[0]}


def most_telling(rollout: Rollout, scored: Scored, keep: int) -> tuple[Rollout, Scored]:
    """Of each group the `keep` rows with the largest |advantage|, in their order; ties: the first.

    Sampling is cheaper than learning, and near an advantage of 0 there is nothing to learn: so many
    responses can be drawn, of which a rare good one is seen, and few learnt from (down-sampling of
    rollouts, as in PODS [R]). Advantages stay those of the whole group. What is left out is small,
    not nothing: the gradient is that of the kept rows' mean, and so is the KL term.
    """
    order_R = scored.advantage_R.abs().sort(descending=True, stable=True).indices
    group_R = rollout.group_R.to(order_R.device)
    order_R = order_R[group_R[order_R].sort(stable=True).indices]  # by group, then by |advantage|
    size_B = torch.bincount(group_R)
    start_B = size_B.cumsum(0) - size_B
    rank_R = torch.arange(len(order_R), device=order_R.device) - start_B[group_R]
    rows = order_R[rank_R < keep].sort().values
    kept = Scored(*(getattr(scored, f.name)[rows] for f in dataclasses.fields(scored)))
    return rollout.of_rows(rows), kept


def by_task(rollout: Rollout, rows: Tensor) -> list[tuple[int, Tensor, slice]]:
    """The tasks that a run of rows is of: number, rows, and where their tokens lie among its N."""
    if not rollout.adapter:
        return [(0, rows, slice(None))]
    first, last = int(rows[0]), int(rows[-1]) + 1
    lengths, parts, start = rollout.mask_RT.sum(1).tolist(), [], 0
    for task, share in enumerate(rollout.tasks):
        low, high = max(first, share.start), min(last, share.stop)
        if low < high:
            end = start + sum(lengths[low:high])
            parts.append((task, rows[low - first : high - first], slice(start, end)))
            start = end
    return parts


def _of_reference(
    network: Network,
    rollout: Rollout,
    rows: Tensor,
    batch: tree.Packed,
    kl: str,
    temperature: float,
) -> dict[str, Any]:
    """What the loss needs of the reference: its log-probabilities; all of it for the exact KL."""
    if kl == "exact":
        return {
            "ref_hidden": hidden(network, rollout, rows, batch),
            "ref_weight": network.weight,
            "ref_bias": network.bias,
        }
    return {"ref_logp": token_logp(network, rollout, rows, batch, temperature)}
