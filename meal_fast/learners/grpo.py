"""GRPO's loss and gradient for one rollout (BPS A.4 [P]; formula: `ops.linear_policy_loss`).

Prompts go through the model once for all their samples; only sampled tokens reach the head, packed
without padding. Micro-batches bound the memory; their gradients add up to the whole step's, since
each is normalised by the step's own count.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import ops, tree
from ..batch import Rollout, Scored
from ..config import GRPOConfig
from ..policy import Network, Policy

# Over micro-batches; the other metrics are means over tokens.
SUMMED = {"loss", "policy_loss", "tokens"}


def grpo(
    policy: Policy, rollout: Rollout, scored: Scored, config: GRPOConfig, temperature: float
) -> dict[str, Tensor]:
    """Adds the gradient of the step's loss to the policy's parameters; returns metrics (scalars).

    The rollout's own log-probabilities are the behaviour policy's (logp_old). With beta > 0 the
    reference model sees the policy's tokens, and both share each sweep over the vocabulary.
    """
    sequences = len(rollout.group_R)
    tokens = rollout.mask_RT.sum()
    normalizer: dict[str, float | Tensor] = {
        "grpo": sequences,
        "dapo": tokens,
        "dr_grpo": sequences * _width(rollout),
    }
    totals: dict[str, Tensor] = {}
    for rows in micro_batches(rollout, config.micro_tokens):
        hidden_ND, target_N = packed(policy.network, rollout, rows)
        mask = rollout.mask_RT[rows]
        extra: dict[str, Any] = {}
        if config.beta > 0:
            with policy.reference() as reference, torch.no_grad():
                ref_hidden, _ = packed(reference, rollout, rows)
                extra = {
                    "ref_hidden": ref_hidden,
                    "ref_weight": reference.weight,
                    "ref_bias": reference.bias,
                }
        network = policy.network
        width = mask.shape[1]
        loss, metrics = ops.linear_policy_loss(
            hidden_ND,
            network.weight,
            target_N,
            scored.advantage_R[rows, None].expand(-1, width)[mask],
            old_logp=rollout.logp_RT[rows][mask],
            sequence=rows[:, None].expand(-1, width)[mask],
            beta=config.beta,
            kl=config.kl,
            clip=(config.clip_low, config.clip_high),
            reduce=config.reduce,
            normalizer=normalizer[config.reduce],
            temperature=temperature,
            bias=network.bias,
            softcap=network.softcap,
            **extra,
        )
        loss.backward()
        metrics["loss"] = loss.detach()
        for name, value in metrics.items():
            more = value if name in SUMMED else value * metrics["tokens"]
            totals[name] = totals.get(name, 0.0) + more
    for name in totals.keys() - SUMMED:
        totals[name] = totals[name] / totals["tokens"].clamp(min=1)
    return totals


def packed(network: Network, rollout: Rollout, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (N, D) that predict the sampled tokens of `rows`, and those tokens (N,).

    A row's first token is predicted by the last token of its prefix, the others by the row itself.
    """
    groups, group_R = torch.unique_consecutive(rollout.group_R[rows], return_inverse=True)
    prefixes, last_BD = tree.prefill(network.body, [rollout.prefix[g] for g in groups.tolist()])
    mask = rollout.mask_RT[rows]
    width = int(mask.sum(1).max())
    tokens, mask = rollout.tokens_RT[rows, :width], mask[:, :width]
    hidden_RTD = last_BD[group_R, None]
    if width > 1:
        later = tree.extend(network.body, prefixes.rows(group_R), tokens[:, :-1])
        hidden_RTD = torch.cat([hidden_RTD, later], 1)
    return hidden_RTD[mask], tokens[mask]


def micro_batches(rollout: Rollout, budget: int) -> Iterator[Tensor]:
    """Runs of rows (int64 indices) of at most `budget` tokens, prefixes counted once a run.

    A single row is never split, so one that is longer than the budget goes alone.
    """
    lengths = rollout.mask_RT.sum(1).tolist()
    groups = rollout.group_R.tolist()
    run: list[int] = []
    used, widest, held = 0, 0, -1
    for row, (length, group) in enumerate(zip(lengths, groups, strict=True)):
        prefix = 0 if group == held else len(rollout.prefix[group])
        wide = max(widest, length)  # rows of a run are padded to its widest
        if run and used + prefix + wide * (len(run) + 1) > budget:
            yield torch.tensor(run, device=rollout.group_R.device)
            run, used, prefix, wide = [], 0, len(rollout.prefix[group]), length
        run.append(row)
        used, widest, held = used + prefix, wide, group
    yield torch.tensor(run, device=rollout.group_R.device)


def _width(rollout: Rollout) -> int:
    return rollout.mask_RT.shape[1]
