"""Online direct preference optimisation (MO-ODPO [P]; formula: Rafailov et al., 2023 [P]).

Samples 2j and 2j+1 of a prompt are a pair, ordered by their scores (w . r for MO-ODPO):

    L = -mean over pairs of log sigmoid(beta [h(y+) - h(y-)]),
    h(y) = log pi(y|x,w) - log base(y|x,w)

with log-probabilities summed over a response's tokens, at the sampler's temperature. A pair of
equal scores has no order and is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from meal_fast.config.config import GRPOConfig
from meal_fast.data_types import Rollout, Scored
from meal_fast.models.policy import Policy

from .sequences import (
    WHOLE,
    Part,
    by_task,
    check_pairs,
    nothing,
    packed,
    row_sums,
    runs,
    token_logp,
)


def dpo(
    policy: Policy,
    rollout: Rollout,
    scored: Scored,
    config: GRPOConfig,
    temperature: float,
    part: Part = WHOLE,
) -> dict[str, Tensor]:
    """Add the gradient of the step's loss to the policy's parameters; give metrics (scalars).

    Of a part: its share of both.

    A rollout of several tasks' adapters goes through the stacked policy at once; each task has its
    own loss, and the metrics are (tasks,).

    `config.beta` is DPO's. `margin` is the mean of beta [h(y+) - h(y-)], `accuracy` the share of
    pairs where it is positive, `kl` the mean k3 estimate over tokens. Without an ordered pair there
    is no gradient. Raises ValueError for a group of an odd number of samples, and for beta = 0.
    """
    check_pairs(rollout)
    if config.beta <= 0:
        raise ValueError(f"grpo.beta={config.beta}: the loss of a pair needs it positive")
    score_P2 = scored.score_R.view(-1, 2).to(rollout.mask_RT.device)
    sign_P = (score_P2[:, 0] - score_P2[:, 1]).sign()
    ordered = sign_P.tolist()  # the one time that the device is waited for
    pairs_of = [sign_P[_pairs(rows)].abs().sum() for rows in rollout.tasks]
    batches = [
        (run, packed(rollout, run.rows)) for run in runs(rollout, config.micro_tokens, part, unit=2)
    ]
    with policy.reference() as reference, torch.no_grad():
        references = [token_logp(reference, rollout, batch, temperature) for _, batch in batches]
    made: list[list[dict[str, Tensor]]] = [[] for _ in pairs_of]  # of each task its runs'
    for (run, batch), reference_N in zip(batches, references, strict=True):
        rows = run.rows
        with policy.recomputing(config.recompute):
            logp_N = token_logp(policy.network, rollout, batch, temperature)
        gap_N = logp_N - reference_N
        h_P2 = row_sums(gap_N, rows, batch).view(-1, 2)
        losses = []
        for task, own, at in by_task(rollout, rows):
            pairs = pairs_of[task].clamp(min=1)
            sign, h = sign_P[_pairs(own)], h_P2[_pairs(own, rows.start)]
            margin_P = config.beta * sign * (h[:, 0] - h[:, 1])
            loss = -(sign.abs() * F.logsigmoid(margin_P)).sum() / pairs
            if part.even or any(ordered[_pairs(own)]):
                losses.append(loss)
            own_N, margin_P = gap_N[at].detach(), margin_P.detach()
            said = {
                "loss": loss.detach(),
                "margin": margin_P.sum() / pairs,
                "accuracy": (margin_P > 0).sum() / pairs,
                "kl": ((-own_N).expm1() + own_N).sum(),
                "tokens": loss.new_full((), len(own_N)),
            }
            if not run.dummy:
                made[task].append(said)
        if losses:
            run.counted(torch.stack(losses).sum()).backward()
    counts = [sum(rollout.lengths[rows]) for rows in rollout.tasks]
    first = part.number == 0  # which tells what is of no part
    totals = [
        _whole(found or [nothing(said)], pairs if first else torch.zeros_like(pairs), n)
        for found, pairs, n in zip(made, pairs_of, counts, strict=True)
    ]
    if len(totals) == 1:
        return totals[0]
    return {name: torch.stack([total[name] for total in totals]) for name in totals[0]}


def _pairs(rows: slice | range, first: int = 0) -> slice:
    """Give the pairs that rows are, counted from the row `first` on."""
    return slice((rows.start - first) // 2, (rows.stop - first) // 2)


def _whole(runs: list[dict[str, Tensor]], pairs: Tensor, tokens: int) -> dict[str, Tensor]:
    """Give a task's metrics of the whole step from its runs'; tokens: of the whole step."""
    zero = torch.zeros_like(pairs)
    totals = {name: sum((run[name] for run in runs), zero) for name in runs[0]}
    return totals | {"kl": totals["kl"] / max(tokens, 1), "pairs": pairs}
