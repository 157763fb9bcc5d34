"""verl: a policy loss, an advantage estimator for K rewards and preferences, a fused head.

verl's estimators are given scalar rewards and an id a response. K rewards and the preference w
arrive in one of two ways; w itself comes in a column of the dataset, best inside `extra_info`,
which verl hands to the reward function:

    {"prompt": [{"role": "user", "content": "How do ... [helpful=0.80 harmless=0.20]"}],
     "data_source": "mine", "reward_model": {"style": "rule", "ground_truth": ""},
     "extra_info": {"preference": [0.8, 0.2]}}

1. With any trainer and estimator of verl, ours or its own: scalarise in the reward function.

       def compute_score(data_source, solution_str, ground_truth, extra_info, **kwargs):
           r, w = [helpful(solution_str), harmless(solution_str)], extra_info["preference"]
           score = preference_score([r], [w], utopia=[1.1, 1.1])
           return {"score": float(score), "helpful": r[0], "harmless": r[1]}

2. As columns, with `trainer.use_v1=False` and `algorithm.adv_estimator=gdpo`: the one name for
   which verl hands the batch's columns on, so that the estimator has to take it over. The
   reward function returns rewards and weights by name, numbers all, and they become columns.

       def compute_score(data_source, solution_str, ground_truth, extra_info, **kwargs):
           r, w = [helpful(solution_str), harmless(solution_str)], extra_info["preference"]
           return {"score": sum(r), "helpful": r[0], "harmless": r[1],
                   "w_helpful": w[0], "w_harmless": w[1]}

       # my_steering.py; set VERL_USE_EXTERNAL_MODULES=my_steering for all
       from meal_fast.integrations.verl import advantage_estimator, register
       register(advantage_estimator(["helpful", "harmless"], utopia=[1.1, 1.1]), name="gdpo")

With `register()` alone, `algorithm.adv_estimator=meal_fast` is the estimator of scalar scores;
`actor_rollout_ref.actor.policy_loss.loss_mode=meal_fast` is the loss; the head is fused by
`actor_rollout_ref.model.use_fused_kernels=True` with
`actor_rollout_ref.model.fused_kernel_options.impl_backend=triton`.

Tested against the functions of verl 0.9.1 that these replace, on the CPU. `register` is untested,
and no training run of verl has been made: verl's own dependencies need a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from meal_fast.ops import group_advantages, linear_logprob, policy_loss_from_logp

from . import framework, preference_score

__all__ = [
    "advantage_estimator",
    "linear_cross_entropy",
    "policy_loss",
    "preference_score",
    "register",
]

_REQUIREMENT = "verl>=0.9"
Estimator = Callable[..., tuple[Tensor, Tensor]]


def register(estimator: Estimator | None = None, *, name: str = "meal_fast") -> None:
    """Make verl's names mean these functions: loss "meal_fast", estimator `name`, triton's head.

    Args:
        estimator: by default `advantage_estimator()`, of scalar scores.
        name: "gdpo" is given the batch's columns, and verl's own estimator of that name goes.

    Raises:
        ValueError: verl is missing, or too old to have these places.
    """
    core = framework("verl.trainer.ppo.core_algos", _REQUIREMENT)
    head = framework("verl.utils.kernel.linear_cross_entropy", _REQUIREMENT)
    core.register_policy_loss("meal_fast")(policy_loss)
    # Not register_adv_est: it refuses a name that is taken.
    core.ADV_ESTIMATOR_REGISTRY[name] = estimator or advantage_estimator()
    head.linear_cross_entropy = linear_cross_entropy  # verl imports it at every forward


def advantage_estimator(
    objectives: Sequence[str] | None = None,
    *,
    utopia: Sequence[float] | None = None,
    preference: Sequence[str] | None = None,
    mu: float = 0.1,
    scalarization: str = "smooth-tchebycheff",
    offset: Sequence[float] | None = None,
    divisor: Sequence[float] | None = None,
    epsilon: float = 1e-4,
) -> Estimator:
    """An estimator for verl's registry: the advantage in its group [P], on every response token.

    A = (S - mean) / (std + epsilon), std the unbiased one; without the division where the config
    says `norm_adv_by_std_in_grpo=False`. verl's own "grpo" is this with epsilon 1e-6, except that
    it gives a group of one response its bare score; here, that group and one of equal scores
    have 0.

    Args:
        objectives: names of the K reward columns (R,), from which `ops.group_advantages` makes S.
            None: S is the sum of each response's token rewards, as with verl's "grpo".
        preference: names of the K columns of weights; by default "w_" before each objective's.
        utopia, mu, scalarization, offset, divisor: of `ops.group_advantages`.

    Returns:
        f(token_level_rewards (R, T), response_mask (R, T), index (R,), …) → (advantages, returns),
        both (R, T) and the same. It raises a ValueError where a column is missing.
    """

    def estimate(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Sequence[Any],
        norm_adv_by_std_in_grpo: bool | None = None,
        config: Any = None,
        non_tensor_batch: dict[str, Any] | None = None,
        **_: Any,  # what verl hands to some estimators only
    ) -> tuple[Tensor, Tensor]:
        device = response_mask.device
        first: dict[Any, int] = {}
        group = torch.tensor([first.setdefault(i, len(first)) for i in index], device=device)
        if norm_adv_by_std_in_grpo is None:
            by_std = config is None or bool(config.get("norm_adv_by_std_in_grpo", True))
        else:
            by_std = norm_adv_by_std_in_grpo
        options: dict[str, Any] = {"scale": "std" if by_std else "none", "eps": epsilon}
        if objectives is None:
            rewards = token_level_rewards.sum(1, keepdim=True)
            weights = torch.ones_like(rewards)
            options |= {"utopia": None, "scalarization": "linear"}
        else:
            names = [f"w_{name}" for name in objectives] if preference is None else preference
            rewards = _columns(non_tensor_batch, objectives, device)
            weights = _columns(non_tensor_batch, names, device)
            options |= {"utopia": utopia, "mu": mu, "scalarization": scalarization}
            options |= {"offset": offset, "divisor": divisor}
        with torch.no_grad():
            advantage = group_advantages(rewards, weights, group, check=True, **options)[1]
            advantages = torch.where(response_mask.bool(), advantage[:, None], 0)
        return advantages, advantages

    return estimate


def _columns(batch: dict[str, Any] | None, names: Sequence[str], device: torch.device) -> Tensor:
    """(R, K) float32 from K columns of numbers."""
    for name in names:
        if batch is None or name not in batch:
            there = "no columns" if batch is None else ", ".join(sorted(batch))
            raise ValueError(
                f"{name}: not in the batch, which has {there}; return it from compute_score, with "
                "use_v1=False and the estimator named gdpo, or scalarise there: preference_score"
            )
    assert batch is not None
    return torch.tensor([[float(v) for v in batch[name]] for name in names], device=device).t()


def policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Give verl's "vanilla" policy loss by `ops.policy_loss_from_logp`; all tensors (B, T).

    Per token -min(ρ A, clip(ρ) A), where A < 0 at most clip_ratio_c |A| (dual clip), times
    `rollout_is_weights`. `config` is verl's actor config: clip_ratio, clip_ratio_low,
    clip_ratio_high, clip_ratio_c and global_batch_info are read, the last for the sizes of the
    whole batch that the mean is over. KL and entropy are added by verl afterwards.

    Returns:
        loss, differentiable in `log_prob`, and verl's three metrics of it.

    Raises:
        ValueError: no config; an unknown `loss_agg_mode`; several processes without batch sizes.
    """
    if config is None:
        raise ValueError("config=None: verl's actor config is needed, for the clip range")
    c = float(config.get("clip_ratio_c", 3.0))
    if not c > 1:
        raise ValueError(f"clip_ratio_c={c}: must be above 1")
    low, high = (
        config.clip_ratio if value is None else value
        for value in (config.clip_ratio_low, config.clip_ratio_high)
    )
    live = response_mask.bool()
    reduce, normalizer = _aggregation(loss_agg_mode, live, config.global_batch_info)
    # With its ratio held at c, a token of negative advantage has the dual clip's value and slope.
    most = torch.where(advantages < 0, old_log_prob.detach() + math.log(c), torch.inf)
    loss, metrics = policy_loss_from_logp(
        torch.minimum(log_prob, most),
        advantages,
        old_logp=old_log_prob,
        mask=live,
        importance_weight=rollout_is_weights,
        clip=(low, high),
        reduce=reduce,
        normalizer=normalizer,
    )
    with torch.no_grad():
        count = live.sum() + 1e-8
        gap = torch.where(live, log_prob - old_log_prob, 0).clamp(-20, 20)
        beyond = live & (log_prob > most)
        made = {
            "actor/pg_clipfrac": metrics["clip_fraction"] * metrics["tokens"] / count,
            "actor/ppo_kl": -gap.sum() / count,
            "actor/pg_clipfrac_lower": beyond.sum() / count,
        }
    return loss, {name: value.item() for name, value in made.items()}


def _aggregation(mode: str, live: Tensor, batch: dict[str, Any]) -> tuple[str, Any]:
    """Give (reduce, normalizer) of `ops.policy_loss_from_logp` for one of verl's modes.

    The normalizer is the whole batch's, over the number of processes: their gradients are averaged.
    """
    processes = batch.get("dp_size") or 1
    if mode in ("token-mean", "token-sum"):
        total = 1 if mode == "token-sum" else batch.get("batch_num_tokens")
        name, counted = "batch_num_tokens", live.sum()
    elif mode in ("seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"):
        total = batch.get("global_batch_size")
        name, counted = "global_batch_size", live.any(1).sum()
    else:
        raise ValueError(f"loss_agg_mode={mode!r}: not one of verl 0.9's")
    if total is None:
        if processes > 1:
            raise ValueError(f"{name}=None: needed with {processes} processes")
        total = counted.clamp(min=1)
    if mode == "seq-mean-token-sum-norm":
        total = total * (batch.get("loss_scale_factor") or live.shape[1])
    return ("grpo" if mode == "seq-mean-token-mean" else "dapo"), total / processes


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """verl's fused head, (…, D) × (V, D) → log-probability and entropy (N,), by `linear_logprob`.

    Raises:
        ValueError: a reduction, or a head whose vocabulary is split over processes.
    """
    if str(reduction).lower() != "none":
        raise ValueError(f"reduction={reduction!r}: only 'none'")
    if dist_process_group is not None:
        raise ValueError("dist_process_group: a head split over processes is not supported")
    rows = hidden.reshape(-1, hidden.shape[-1])
    return linear_logprob(rows, weight, labels.reshape(-1).long(), temperature=temperature)
