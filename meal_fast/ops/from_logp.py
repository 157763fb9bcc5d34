"""The policy loss of log-probabilities: its definition, with which the fused forms agree."""

from __future__ import annotations

import torch
from torch import Tensor

from meal_fast.common import require

from . import checks, dispatch, fused, reference
from .loss import (
    Metrics,
    check_tokens,
    constant_or_count,
    loss_options,
    make_tokens,
    named,
    needs_gradient,
)


def policy_loss_from_logp(
    logp: Tensor,
    advantage: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    token_kl: Tensor | None = None,
    entropy: Tensor | None = None,
    sequence: Tensor | None = None,
    mask: Tensor | None = None,
    importance_weight: Tensor | None = None,
    beta: float = 0.0,
    kl: str = "k3",
    clip: tuple[float, float] = (0.2, 0.2),
    level: str = "token",
    reduce: str = "dapo",
    normalizer: float | Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Metrics]:
    """The clipped policy-gradient loss with a KL term: the single definition the others agree with.

    Per token, with ρ = exp(logp - old_logp):

        policy = -min(ρ A, clip(ρ, 1 - clip[0], 1 + clip[1]) A) · importance_weight
        loss   = Σ coefficient · (policy + beta · KL)                                        [P]

    - old_logp None: on-policy, ρ is 1 and carries the gradient of logp.
    - level="sequence": log ρ is its mean over the sequence (GSPO).
    - kl, with g = ref_logp - logp: ``k1`` = -g, ``k2`` = g²/2, ``k3`` = exp(g) - g - 1;
      ``exact`` = token_kl. Log-ratios are clamped before exp (|log ρ| ≤ 20, g ≤ 20), where the
      derivative becomes 0.
    - reduce: ``dapo`` Σ over tokens / number of tokens; ``grpo`` mean over each sequence, then
      over the sequences; ``dr_grpo`` Σ over tokens / a constant: B·T, or for packed tokens
      `normalizer`. `normalizer` replaces the count of tokens (dapo), of sequences (grpo) or the
      constant, so that micro-batches add up to the step's loss.

    Args:
        logp: (N,) packed, or (B, T). advantage: the same, or (B,). old_logp, ref_logp, token_kl,
            entropy, importance_weight, mask: as logp. mask false: the token counts nowhere, and
            its values may be NaN. entropy is reported, not optimised.
        sequence: (N,) int64 ids of the sequences of packed tokens, any values in any order; needed
            by level="sequence" and reduce="grpo". For (B, T) a row is a sequence.

    Returns:
        loss (a scalar), differentiable in logp and token_kl (everything else is a constant), and
        metrics: detached scalars on the device, ``tokens`` (how many are active: unmasked, and with
        beta 0 of nonzero advantage), ``policy_loss``, and means over the active tokens: ``ratio``,
        ``clip_fraction``, ``kl`` (when there is a reference), ``entropy`` (when given).

    Raises:
        ValueError: bad shapes or options.
    """
    if torch.compiler.is_compiling():  # the body of the registered op is this function
        constant, count = constant_or_count(normalizer)
        loss, tokens, figures, _, _ = torch.ops.meal_fast.policy_loss_from_logp(
            logp, token_kl, advantage, old_logp, ref_logp, entropy, sequence, mask,
            importance_weight, beta, kl, clip[0], clip[1], level, reduce, constant, count, impl,
            needs_gradient(logp, token_kl),
        )  # fmt: skip
        has_kl = ref_logp is not None or token_kl is not None
        return loss, named(tokens, figures, has_kl, entropy is not None)
    checks.floating("logp", logp)
    require(logp.dim() in (1, 2), "logp.shape", tuple(logp.shape), "must be (N,) or (B, T)")
    shape = tuple(logp.shape)
    for name, tensor in (("token_kl", token_kl), ("entropy", entropy)):
        if tensor is not None:
            checks.shape(name, tensor, shape)
    checks.same_device("logp", logp, token_kl=token_kl, entropy=entropy)
    options = loss_options(beta, kl, clip, level)
    require(kl == "exact" or token_kl is None, "kl", kl, "token_kl is given: use kl='exact'")
    if beta != 0 and kl == "exact":
        require(token_kl is not None, "token_kl", None, "kl='exact' with beta needs it")
    elif beta != 0:
        require(ref_logp is not None, "ref_logp", None, f"beta={beta} needs a reference")

    if _choose(impl, level, logp, token_kl) == "triton":
        sequence, normalizer = check_tokens(
            logp, advantage, old_logp, ref_logp, sequence, level, reduce, normalizer,
            importance_weight, mask,
        )  # fmt: skip
        coefficient = None
        if reduce == "grpo":
            coefficient, sequences = _of_sequences(logp, sequence, mask)
            normalizer = sequences.clamp(min=1) if normalizer is None else normalizer
        return _in_triton(
            logp, advantage, old_logp, ref_logp, token_kl, entropy, mask, importance_weight,
            coefficient, normalizer, options,
        )  # fmt: skip
    dtype = reference.compute_dtype(logp)
    tokens, options = make_tokens(
        logp, advantage, old_logp, ref_logp, sequence, beta, kl, clip, level, reduce,
        normalizer, importance_weight, mask, None, 0, dtype,
    )  # fmt: skip
    assert isinstance(tokens, reference.Tokens)

    def flat(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.reshape(-1).to(dtype)

    return reference.loss_and_metrics(
        logp.reshape(-1).to(dtype), flat(token_kl), flat(entropy), tokens, options
    )


def _choose(impl: str | None, level: str, logp: Tensor, token_kl: Tensor | None) -> str:
    """As `dispatch.choose`; the ratio of a sequence needs all of its tokens, and runs in torch."""
    if level == "sequence" and impl in (None, "triton"):
        require(impl is None, "impl", impl, "level='sequence' runs in torch; use None or 'torch'")
        return "torch"
    return dispatch.choose("policy_loss_from_logp", impl, logp, token_kl)


def _in_triton(
    logp: Tensor,
    advantage: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    token_kl: Tensor | None,
    entropy: Tensor | None,
    mask: Tensor | None,
    importance_weight: Tensor | None,
    coefficient: Tensor | None,
    normalizer: float | Tensor | None,
    options: reference.LossOptions,
) -> tuple[Tensor, Metrics]:
    from meal_fast.kernels import policy_loss as kernels

    def flat(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.detach().reshape(-1).contiguous()

    plan = kernels.Plan(
        advantage.detach().reshape(-1).contiguous(),
        max(1, logp.shape[1]) if advantage.dim() < logp.dim() else 1,
        flat(old_logp),
        flat(ref_logp),
        flat(entropy),
        flat(importance_weight),
        flat(mask),
        coefficient,
        normalizer if normalizer is None or isinstance(normalizer, Tensor) else float(normalizer),
        options.beta,
        options.kl,
        options.clip,
        any(needs_gradient(logp, token_kl)),
    )
    loss, tokens, figures, _, _ = kernels.PolicyLoss.apply(
        logp.reshape(-1).contiguous(),
        None if token_kl is None else token_kl.reshape(-1).contiguous(),
        plan,
    )
    has_kl = ref_logp is not None or token_kl is not None
    return loss, named(tokens, figures[1:], has_kl, entropy is not None)


def _of_sequences(
    logp: Tensor, sequence: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """reduce="grpo": per token 1 / length of its sequence (N,), and how many have a length."""
    live = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask.bool()
    if sequence is None:
        length = live.sum(1, keepdim=True)
        return (1 / length.clamp(min=1)).expand(logp.shape).reshape(-1), (length > 0).sum()
    return fused.by_length(live.reshape(-1), sequence.reshape(-1))
