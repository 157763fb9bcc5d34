"""The policy loss: from log-probabilities (its definition), logits, and hidden states."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import autograd, checks, reference
from .checks import require
from .logprob import check_head, check_rows_and_target, readout, reference_head
from .sweep import DEFAULT_MAX_BYTES

Metrics = dict[str, Tensor]


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    advantage: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    sequence: Tensor | None = None,
    beta: float = 0.0,
    kl: str = "k3",
    clip: tuple[float, float] = (0.2, 0.2),
    level: str = "token",
    reduce: str = "dapo",
    normalizer: float | Tensor | None = None,
    importance_weight: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
    impl: str | None = None,
) -> tuple[Tensor, Metrics]:
    """The policy loss of hidden states, its gradients made in the forward pass.

    loss = policy_loss_from_logp(linear_logprob(hidden, weight, target)[0], advantage, …), for which
    see there. The advantage is known beforehand, so the gradient of the logits is made while they
    are there: three products with the head (two when `weight` needs no gradient) instead of four.
    Tokens that cannot move the loss (masked; or advantage 0 with beta 0) do not go through the
    head. `level="sequence"` takes one product more: a sequence's ratio is known after its last
    token.

    Args: as `linear_logprob` and `policy_loss_from_logp`, and
        ref_hidden: (N, D_ref), the reference's hidden states, instead of ref_logp; they go through
            `ref_weight` (default: `weight`), `ref_bias`, and the same softcap and temperature, in
            the same sweep. `kl="exact"` needs it.
        ignore_index: targets of this value are masked.
        max_bytes: of the tiles of logits; see `linear_logprob`.

    Returns:
        loss, differentiable once in hidden, weight and bias (gradients of weight and bias are
        summed in float32), and metrics, with ``entropy``.
    """
    checks.implementation("linear_policy_loss", impl)
    read = readout(temperature, softcap, max_bytes)
    dtype = reference.compute_dtype(hidden, weight)
    check_head("", hidden, weight, bias, target)
    head = reference_head(hidden, weight, bias, target, ref_hidden, ref_weight, ref_bias)
    _one_reference(kl, beta, ref_logp, ref_hidden, "ref_hidden")
    tokens, options = _tokens(
        target, advantage, old_logp, ref_logp, sequence, beta, kl, clip, level, reduce,
        normalizer, importance_weight, mask, ignore_index, weight.shape[0], dtype,
    )  # fmt: skip
    metrics: Metrics = {}
    plan = autograd.LossPlan(
        target.reshape(-1).long(),
        tokens,
        options,
        read,
        dtype,
        max_bytes,
        torch.is_grad_enabled(),
        ref_head=head,
    )
    rows = hidden.reshape(-1, hidden.shape[-1])
    loss = autograd.LinearPolicyLoss.apply(rows, weight, bias, plan, metrics)
    return loss, metrics


def policy_loss(
    logits: Tensor,
    target: Tensor,
    advantage: Tensor,
    *,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    ref_logits: Tensor | None = None,
    sequence: Tensor | None = None,
    beta: float = 0.0,
    kl: str = "k3",
    clip: tuple[float, float] = (0.2, 0.2),
    level: str = "token",
    reduce: str = "dapo",
    normalizer: float | Tensor | None = None,
    importance_weight: Tensor | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
    impl: str | None = None,
) -> tuple[Tensor, Metrics]:
    """The policy loss of logits (N, V) or (B, T, V) that already exist, of any strides.

    As `linear_policy_loss`, with `ref_logits` in place of `ref_hidden`. The gradient is a new
    tensor in the logits' dtype; the logits are left as they are.
    """
    checks.implementation("policy_loss", impl)
    read = readout(temperature, softcap, max_bytes)
    checks.floating("logits", logits)
    v = check_rows_and_target("logits", logits, target)
    if ref_logits is not None:
        checks.floating("ref_logits", ref_logits)
        checks.shape("ref_logits", ref_logits, tuple(logits.shape))
    _one_reference(kl, beta, ref_logp, ref_logits, "ref_logits")
    checks.same_device("logits", logits, target=target, ref_logits=ref_logits)
    dtype = reference.compute_dtype(logits)
    tokens, options = _tokens(
        target, advantage, old_logp, ref_logp, sequence, beta, kl, clip, level, reduce,
        normalizer, importance_weight, mask, ignore_index, v, dtype,
    )  # fmt: skip
    metrics: Metrics = {}
    plan = autograd.LossPlan(
        target.reshape(-1).long(),
        tokens,
        options,
        read,
        dtype,
        max_bytes,
        torch.is_grad_enabled(),
        ref_logits=None if ref_logits is None else ref_logits.reshape(-1, v),
    )
    loss = autograd.LogitsPolicyLoss.apply(logits.reshape(-1, v), plan, metrics)
    return loss, metrics


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
    checks.implementation("policy_loss_from_logp", impl)
    checks.floating("logp", logp)
    require(logp.dim() in (1, 2), "logp.shape", tuple(logp.shape), "must be (N,) or (B, T)")
    shape = tuple(logp.shape)
    for name, tensor in (("token_kl", token_kl), ("entropy", entropy)):
        if tensor is not None:
            checks.shape(name, tensor, shape)
    require(kl == "exact" or token_kl is None, "kl", kl, "token_kl is given: use kl='exact'")
    if kl == "exact" and beta != 0:
        require(token_kl is not None, "token_kl", None, "kl='exact' with beta needs it")
    dtype = reference.compute_dtype(logp)
    tokens, options = _tokens(
        logp, advantage, old_logp, ref_logp, sequence, beta, kl, clip, level, reduce,
        normalizer, importance_weight, mask, None, 0, dtype,
    )  # fmt: skip
    if beta != 0 and kl != "exact":
        require(ref_logp is not None, "ref_logp", None, f"beta={beta} needs a reference")

    def flat(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.reshape(-1).to(dtype)

    return reference.loss_and_metrics(
        logp.reshape(-1).to(dtype), flat(token_kl), flat(entropy), tokens, options
    )


def _one_reference(
    kl: str, beta: float, ref_logp: Tensor | None, distribution: Tensor | None, name: str
) -> None:
    if ref_logp is not None and distribution is not None:
        raise ValueError(f"ref_logp: given together with {name}; give one of them")
    if kl == "exact" and (beta != 0 or ref_logp is not None):
        require(distribution is not None, name, None, "kl='exact' needs the whole distribution")
    if beta != 0 and ref_logp is None:
        require(distribution is not None, "ref_logp", None, f"beta={beta} needs it, or {name}")


def _tokens(
    like: Tensor,  # (N,) or (B, T): the targets, or their log-probabilities
    advantage: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    sequence: Tensor | None,
    beta: float,
    kl: str,
    clip: tuple[float, float],
    level: str,
    reduce: str,
    normalizer: float | Tensor | None,
    importance_weight: Tensor | None,
    mask: Tensor | None,
    ignore_index: int | None,  # of `like`, when it holds targets
    vocabulary: int,
    dtype: torch.dtype,
) -> tuple[reference.Tokens, reference.LossOptions]:
    """The loss's options and per-token constants, checked and flat."""
    checks.choice("kl", kl, ("k1", "k2", "k3", "exact"))
    checks.choice("level", level, ("token", "sequence"))
    checks.choice("reduce", reduce, ("grpo", "dapo", "dr_grpo"))
    require(math.isfinite(beta) and beta >= 0, "beta", beta, "must not be negative")
    low, high = clip
    require(0 <= low <= 1 and high >= 0, "clip", clip, "(low, high), low in [0, 1], high ≥ 0")
    shape, padded = tuple(like.shape), like.dim() == 2
    if padded and advantage.dim() == 1:
        checks.shape("advantage", advantage, (shape[0],))
        advantage = advantage[:, None].expand(shape)
    checks.shape("advantage", advantage, shape)
    given = {
        "old_logp": old_logp,
        "ref_logp": ref_logp,
        "importance_weight": importance_weight,
        "mask": mask,
        "sequence": sequence,
    }
    for name, tensor in given.items():
        if tensor is not None:
            checks.shape(name, tensor, shape)
    checks.same_device("logp or target", like, advantage=advantage, **given)

    if sequence is None and padded:
        sequence = torch.arange(shape[0], device=like.device)[:, None].expand(shape)
    if sequence is not None:
        checks.integer("sequence", sequence)
    elif level == "sequence" or reduce == "grpo":
        option = "level" if level == "sequence" else "reduce"
        value = level if level == "sequence" else reduce
        raise ValueError(f"{option}={value!r}: packed tokens need `sequence`, (N,) int64 ids")
    if normalizer is None and reduce == "dr_grpo":
        require(padded, "normalizer", None, "reduce='dr_grpo' over packed tokens needs a constant")
        normalizer = max(1, like.numel())
    if isinstance(normalizer, Tensor):
        require(normalizer.dim() == 0, "normalizer.shape", tuple(normalizer.shape), "one number")
        normalizer = normalizer.detach()
    elif normalizer is not None:
        checks.positive("normalizer", normalizer)

    live = torch.ones(shape, dtype=torch.bool, device=like.device) if mask is None else mask.bool()
    if ignore_index is not None:
        live = live & (like != ignore_index)
        if like.device.type == "cpu":
            checks.targets_in_range(like.reshape(-1), live.reshape(-1), vocabulary)

    def flat(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.reshape(-1)

    options = reference.LossOptions(float(beta), kl, (float(low), float(high)), level)
    tokens = reference.make_tokens(
        live.reshape(-1),
        advantage.reshape(-1),
        flat(sequence),
        options,
        reduce,
        normalizer,
        flat(old_logp),
        flat(ref_logp),
        flat(importance_weight),
        dtype,
    )
    return tokens, options
