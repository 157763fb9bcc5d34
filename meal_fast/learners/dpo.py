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

from ..batch import Rollout, Scored
from ..config import GRPOConfig
from ..policy import Policy
from .sequences import micro_batches, packed, token_logp


def dpo(
    policy: Policy, rollout: Rollout, scored: Scored, config: GRPOConfig, temperature: float
) -> dict[str, Tensor]:
    """Adds the gradient of the step's loss to the policy's parameters; returns metrics (scalars).

    `config.beta` is DPO's. `margin` is the mean of beta [h(y+) - h(y-)], `accuracy` the share of
    pairs where it is positive, `kl` the mean k3 estimate over tokens. Without an ordered pair there
    is no gradient. Raises ValueError for a group of an odd number of samples, and for beta = 0.
    """
    sizes = torch.bincount(rollout.group_R)
    if bool((sizes % 2).any()):
        raise ValueError(f"rollout.samples={sizes.tolist()}: pairs need an even number a prompt")
    if config.beta <= 0:
        raise ValueError(f"grpo.beta={config.beta}: the loss of a pair needs it positive")
    score_P2 = scored.score_R.view(-1, 2).to(rollout.mask_RT.device)
    sign_P = (score_P2[:, 0] - score_P2[:, 1]).sign()
    pairs = sign_P.abs().sum()
    batches = [
        (rows, packed(rollout, rows))
        for rows in micro_batches(rollout, config.micro_tokens, unit=2)
    ]
    with policy.reference() as reference, torch.no_grad():
        references = [
            token_logp(reference, rollout, rows, batch, temperature) for rows, batch in batches
        ]
    zero = torch.zeros((), device=rollout.mask_RT.device)
    totals = dict.fromkeys(("loss", "margin", "accuracy", "kl", "tokens"), zero)
    for (rows, batch), reference_N in zip(batches, references, strict=True):
        with policy.recomputing(config.recompute):
            logp_N = token_logp(policy.network, rollout, rows, batch, temperature)
        row_N = torch.repeat_interleave(rollout.mask_RT[rows].sum(1))
        gap_N = logp_N - reference_N
        h_P2 = gap_N.new_zeros(len(rows)).index_add(0, row_N, gap_N).view(-1, 2)
        sign = sign_P[rows[::2] // 2]
        margin_P = config.beta * sign * (h_P2[:, 0] - h_P2[:, 1])
        loss = -(sign.abs() * F.logsigmoid(margin_P)).sum() / pairs.clamp(min=1)
        if bool(sign.any()):
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
