"""Supervised fine-tuning on responses that were kept (Meta-Aligner's policy update [P]; form [R]).

    L = sum_i a_i * (-1/T_i sum_t log pi(y_it | x_i, w*_i)) / R  +  beta * KL(pi || base)

over the R kept rows of the step, which read the preference w* that they were relabelled with. The
weights a_i stand in `scored.loss_weight_R`; `grpo.reduce` chooses the mean over tokens as for GRPO,
`grpo.kl` the estimator of the KL term. Log-probabilities are at the sampler's temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meal_fast import ops
from meal_fast.config.config import GRPOConfig
from meal_fast.data_types import Rollout, Weighted
from meal_fast.models.policy import Policy

from .sequences import WHOLE, Part, divisor, nothing, of_rows, packed, runs, token_logp


def sft(
    policy: Policy,
    rollout: Rollout,
    scored: Weighted,
    config: GRPOConfig,
    temperature: float,
    part: Part = WHOLE,
) -> dict[str, Tensor]:
    """Add the gradient of the step's loss to the policy's parameters; give metrics (scalars).

    Of a part: its share of both.

    `nll` is the mean negative log-likelihood of a kept token; `kl` the mean of the estimator over
    them, 0 without beta. Raises ValueError for `kl="exact"`, which this learner does not compute.
    """
    if config.kl == "exact" and config.beta > 0:
        raise ValueError("grpo.kl='exact': not with kept responses; use k1, k2 or k3")
    normalizer = divisor(rollout, config.reduce)
    batches = [(run, packed(rollout, run.rows)) for run in runs(rollout, config.micro_tokens, part)]
    references: list[Tensor | None] = [None] * len(batches)
    if config.beta > 0:
        with policy.reference() as reference, torch.no_grad():
            references = [
                token_logp(reference, rollout, batch, temperature) for _, batch in batches
            ]
    totals: dict[str, Tensor] = {}
    for (run, batch), reference_N in zip(batches, references, strict=True):
        rows = run.rows
        with policy.recomputing(config.recompute):
            logp_N = token_logp(policy.network, rollout, batch, temperature)
        weight_N = of_rows(scored.loss_weight_R, rows, batch)
        loss, metrics = ops.policy_loss_from_logp(
            logp_N,
            weight_N,
            old_logp=None,
            ref_logp=reference_N,
            sequence=batch.row_M,
            beta=config.beta,
            kl=config.kl,
            reduce=config.reduce,
            normalizer=normalizer,
        )
        run.counted(loss).backward()
        # The op's policy term is -a_i: right in its gradient, and no likelihood.
        nll_N, count = -logp_N.detach(), len(logp_N)
        length_N = of_rows(rollout.mask_RT.sum(1), rows, batch)
        share_N = weight_N / length_N if config.reduce == "grpo" else weight_N
        more = {
            "loss": loss.detach() - metrics["policy_loss"] + (share_N * nll_N).sum() / normalizer,
            "tokens": torch.full_like(loss.detach(), count),
            "nll": nll_N.sum(),
            "kl": metrics.get("kl", nll_N.new_zeros(())) * count,
        }
        if run.dummy:
            more = nothing(more)
        totals = {name: totals.get(name, 0.0) + value for name, value in more.items()}
    tokens = max(sum(rollout.lengths), 1)
    return totals | {name: totals[name] / tokens for name in ("nll", "kl")}
