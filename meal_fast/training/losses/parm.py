"""PARM's loss: an autoregressive reward model that is conditioned on the preference.

The reward is the guide's own log-probability, r_w(x, y) = sum_t log pi_w(y_t | x, y_<t). Samples 2j
and 2j+1 of a prompt are a pair, which every objective orders by its own reward (Lin et al., "PARM",
2025 [P]; the base model's samples instead of a data set of pairs [R]):

    L = sum_k 1/n_k sum over pairs of w_k * -log sigmoid(beta_r [r_w(y+_k) - r_w(y-_k)])

with n_k the pairs that objective k orders: equal rewards have no order. Log-probabilities are at
temperature 1, whatever the sampler's: what decoding adds to the base are the guide's own logits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from meal_fast.config.config import GRPOConfig
from meal_fast.data_types import Rollout, Scored
from meal_fast.models.policy import Policy

from .sequences import WHOLE, Part, check_pairs, packed, row_sums, runs, token_logp


def parm(
    policy: Policy,
    rollout: Rollout,
    scored: Scored,
    config: GRPOConfig,
    temperature: float,
    part: Part = WHOLE,
    *,
    beta_r: float,
) -> dict[str, Tensor]:
    """Add the gradient of the step's loss to the guide's parameters; give metrics (scalars).

    Of a part: its share of both.

    `margin` is the mean of beta_r [r_w(y+_k) - r_w(y-_k)] over ordered pairs and objectives,
    weighted by w_k, `accuracy` the share of them, so weighted, where it is positive, and `pairs`
    the number of those that at least one objective orders. Without any there is no gradient.
    Raises ValueError for a policy without a guide, a group of an odd number of samples, rows of a
    group under different preferences, and beta_r <= 0.
    """
    adapter = policy.adapter
    if adapter is None:
        raise ValueError("policy: has no bilinear adapter; load it with policy.tuning=bilinear")
    check_pairs(rollout)
    if beta_r <= 0:
        raise ValueError(f"beta_r={beta_r}: the loss of a pair needs it positive")
    device = rollout.mask_RT.device
    w_RK = rollout.condition_RK.to(device)
    w_GK = w_RK.new_zeros(len(rollout.prefix), w_RK.shape[1])
    w_GK.index_copy_(0, rollout.group_R, w_RK)
    if bool((w_GK[rollout.group_R] != w_RK).any()):
        raise ValueError("rollout.condition_RK: rows behind one prefix must have one preference")
    sign_PK, share_PK = orders(scored.reward_RK.to(device), w_RK)
    ordered = sign_PK.any(1).tolist()
    weight = share_PK.sum().clamp(min=1e-9)
    zero = torch.zeros((), device=device)
    totals = dict.fromkeys(("loss", "margin", "accuracy"), zero)
    for run in runs(rollout, config.micro_tokens, part, unit=2):
        rows = run.rows
        batch = packed(rollout, rows)
        pairs = slice(rows.start // 2, rows.stop // 2)
        w_BK = w_RK.new_zeros(batch.shape_BPRS[0], w_RK.shape[1])
        w_BK.index_copy_(0, batch.group_R, w_RK[rows.start : rows.stop])
        # Going back it may run again, at the same preferences: so `at` holds the backward pass.
        with adapter.at(w_BK.index_select(0, batch.group_N)):
            with policy.recomputing(config.recompute):
                logp_N = token_logp(policy.network, rollout, batch, temperature=1.0)
            r_P2 = row_sums(logp_N, rows, batch).view(-1, 2)
            loss, margin_PK = pair_loss(r_P2, sign_PK[pairs], share_PK[pairs], beta_r)
            if part.even or any(ordered[pairs]):
                run.counted(loss).backward()
        if run.dummy:
            continue
        more = {
            "loss": loss.detach(),
            "margin": (share_PK[pairs] * margin_PK).sum() / weight,
            "accuracy": (share_PK[pairs] * (margin_PK > 0)).sum() / weight,
        }
        totals = {name: totals[name] + value for name, value in more.items()}
    pairs_P = sign_PK.any(1) if part.number == 0 else zero  # of no part: the first one tells it
    return totals | {"pairs": pairs_P.sum()}


def orders(reward_RK: Tensor, w_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Order every pair by each objective: 1, -1 or 0 for none, and the order's share in the loss.

    Both are (P, K); the share is w_k / n_k, and 0 where there is no order. An objective that does
    not apply to both responses (NaN) does not order them.
    """
    reward_P2K = reward_RK.unflatten(0, (-1, 2))
    sign_PK = (reward_P2K[:, 0] - reward_P2K[:, 1]).nan_to_num(0.0).sign()
    return sign_PK, w_RK[::2] * sign_PK.abs() / sign_PK.abs().sum(0).clamp(min=1)


def pair_loss(
    r_P2: Tensor, sign_PK: Tensor, share_PK: Tensor, beta_r: float
) -> tuple[Tensor, Tensor]:
    """Give the loss of the pairs' rewards r_w, and the margins (P, K) without a gradient."""
    margin_PK = beta_r * sign_PK * (r_P2[:, :1] - r_P2[:, 1:])
    return -(share_PK * F.logsigmoid(margin_PK)).sum(), margin_PK.detach()
