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

from .sequences import check_pairs, micro_batches, packed, row_sums, token_logp


def dpo(
    policy: Policy, rollout: Rollout, scored: Scored, config: GRPOConfig, temperature: float
) -> dict[str, Tensor]:
    """Adds the gradient of the step's loss to the policy's parameters; returns metrics (scalars).

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
    pairs = sign_P.abs().sum()
    batches = [
        (rows, packed(rollout, rows))
        for rows in micro_batches(rollout, config.micro_tokens, unit=2)
    ]
    with policy.reference() as reference, torch.no_grad():
        references = [token_logp(reference, rollout, batch, temperature) for _, batch in batches]
    zero = torch.zeros((), device=rollout.mask_RT.device)
    totals = dict.fromkeys(("loss", "margin", "accuracy", "kl", "tokens"), zero)
    for (rows, batch), reference_N in zip(batches, references, strict=True):
        with policy.recomputing(config.recompute):
            logp_N = token_logp(policy.network, rollout, batch, temperature)
        gap_N = logp_N - reference_N
        h_P2 = row_sums(gap_N, rows, batch).view(-1, 2)
        of = slice(rows.start // 2, rows.stop // 2)
        sign = sign_P[of]
        margin_P = config.beta * sign * (h_P2[:, 0] - h_P2[:, 1])
        loss = -(sign.abs() * F.logsigmoid(margin_P)).sum() / pairs.clamp(min=1)
        if any(ordered[of]):
            loss.backward()
        gap_N, margin_P = gap_N.detach(), margin_P.detach()
        more = {
            "loss": loss.detach(),
            "margin": margin_P.sum() / pairs.clamp(min=1),
            "accuracy": (margin_P > 0).sum() / pairs.clamp(min=1),
            "kl": ((-gap_N).expm1() + gap_N).sum(),
            "tokens": zero + len(gap_N),
        }
        totals = {name: totals[name] + value for name, value in more.items()}
    return totals | {"kl": totals["kl"] / totals["tokens"], "pairs": pairs}
