"""The policy loss of logits and of hidden states; the checks of every op with a loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from meal_fast.common import require

from . import autograd, checks, fused, reference
from .dispatch import choose
from .logprob import check_head, check_rows_and_target, readout, reference_head

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
    max_bytes: int | None = None,
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
    if torch.compiler.is_compiling():  # the body of the registered op is this function
        loss, tokens, figures, *_ = torch.ops.meal_fast.linear_policy_loss(
            hidden, weight, bias, target, advantage, old_logp, ref_logp, ref_hidden, sequence,
            importance_weight, mask, ref_weight, ref_bias, beta, kl, clip[0], clip[1], level,
            reduce, *constant_or_count(normalizer), ignore_index, temperature, softcap, max_bytes,
            impl, needs_gradient(hidden, weight, bias),
        )  # fmt: skip
        return loss, named(tokens, figures, ref_logp is not None or ref_hidden is not None, True)
    read = readout(temperature, softcap, max_bytes)
    dtype = reference.compute_dtype(hidden, weight)
    check_head("", hidden, weight, bias, target)
    head = reference_head(hidden, weight, bias, target, ref_hidden, ref_weight, ref_bias)
    _one_reference(kl, beta, ref_logp, ref_hidden, "ref_hidden")
    chosen = choose("linear_policy_loss", impl, hidden, weight)
    tokens, options = make_tokens(
        target, advantage, old_logp, ref_logp, sequence, beta, kl, clip, level, reduce,
        normalizer, importance_weight, mask, ignore_index, weight.shape[0], dtype, chosen,
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
    max_bytes: int | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Metrics]:
    """The policy loss of logits (N, V) or (B, T, V) that already exist, of any strides.

    As `linear_policy_loss`, with `ref_logits` in place of `ref_hidden`. The gradient is a new
    tensor in the logits' dtype; the logits are left as they are. In Triton they are read where they
    lie, once for the loss and once for the gradient, and `max_bytes` has nothing to bound.
    """
    if torch.compiler.is_compiling():  # the body of the registered op is this function
        loss, tokens, figures, *_ = torch.ops.meal_fast.policy_loss(
            logits, target, advantage, old_logp, ref_logp, ref_logits, sequence, importance_weight,
            mask, beta, kl, clip[0], clip[1], level, reduce, *constant_or_count(normalizer),
            ignore_index, temperature, softcap, max_bytes, impl, needs_gradient(logits),
        )  # fmt: skip
        return loss, named(tokens, figures, ref_logp is not None or ref_logits is not None, True)
    read = readout(temperature, softcap, max_bytes)
    checks.floating("logits", logits)
    v = check_rows_and_target("logits", logits, target)
    if ref_logits is not None:
        checks.floating("ref_logits", ref_logits)
        checks.shape("ref_logits", ref_logits, tuple(logits.shape))
    _one_reference(kl, beta, ref_logp, ref_logits, "ref_logits")
    checks.same_device("logits", logits, target=target, ref_logits=ref_logits)
    chosen = choose("policy_loss", impl, logits, ref_logits)
    if ref_logits is not None and chosen == "torch":
        ref_logits = ref_logits.reshape(-1, v)
    dtype = reference.compute_dtype(logits)
    tokens, options = make_tokens(
        target, advantage, old_logp, ref_logp, sequence, beta, kl, clip, level, reduce,
        normalizer, importance_weight, mask, ignore_index, v, dtype, chosen,
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
        ref_logits=ref_logits,
    )
    if chosen == "triton":
        return autograd.LogitsPolicyLossLater.apply(logits, plan, metrics), metrics
    return autograd.LogitsPolicyLoss.apply(logits.reshape(-1, v), plan, metrics), metrics


def needs_gradient(*tensors: Tensor | None) -> list[bool]:
    enabled = torch.is_grad_enabled()
    return [enabled and x is not None and x.requires_grad for x in tensors]


def constant_or_count(normalizer: float | Tensor | None) -> tuple[float | None, Tensor | None]:
    """A registered op takes a number and a tensor in places of their own."""
    return (None, normalizer) if isinstance(normalizer, Tensor) else (normalizer, None)


def named(tokens: Tensor, figures: Tensor, has_kl: bool, has_entropy: bool) -> Metrics:
    """The metrics of a fused form, which has them in one tensor: reference.FIGURES."""
    metrics = {"tokens": tokens} | dict(zip(reference.FIGURES, figures.unbind(), strict=True))
    if not has_kl:
        del metrics["kl"]
    if not has_entropy:
        del metrics["entropy"]
    return metrics


def _one_reference(
    kl: str, beta: float, ref_logp: Tensor | None, distribution: Tensor | None, name: str
) -> None:
    if ref_logp is not None and distribution is not None:
        raise ValueError(f"ref_logp: given together with {name}; give one of them")
    if kl == "exact" and (beta != 0 or ref_logp is not None):
        require(distribution is not None, name, None, "kl='exact' needs the whole distribution")
    if beta != 0 and ref_logp is None:
        require(distribution is not None, "ref_logp", None, f"beta={beta} needs it, or {name}")


def loss_options(
    beta: float, kl: str, clip: tuple[float, float], level: str
) -> reference.LossOptions:
    checks.choice("kl", kl, ("k1", "k2", "k3", "exact"))
    checks.choice("level", level, ("token", "sequence"))
    require(math.isfinite(beta) and beta >= 0, "beta", beta, "must not be negative")
    low, high = clip
    require(0 <= low <= 1 and high >= 0, "clip", clip, "(low, high), low in [0, 1], high ≥ 0")
    return reference.LossOptions(float(beta), kl, (float(low), float(high)), level)


def check_tokens(
    like: Tensor,
    advantage: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    sequence: Tensor | None,
    level: str,
    reduce: str,
    normalizer: float | Tensor | None,
    importance_weight: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor | None, float | Tensor | None]:
    """Check what the loss knows of its tokens; the sequence ids, and the normalizer or None.

    Ids of None: a row of (B, T) is a sequence, or nothing asks. A normalizer of None: the count.
    """
    checks.choice("reduce", reduce, ("grpo", "dapo", "dr_grpo"))
    shape, padded = tuple(like.shape), like.dim() == 2
    if padded and advantage.dim() == 1:
        checks.shape("advantage", advantage, (shape[0],))
    else:
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
    if sequence is not None:
        checks.integer("sequence", sequence)
    elif not padded and (level == "sequence" or reduce == "grpo"):
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
    return sequence, normalizer


def make_tokens(
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
    impl: str = "torch",
) -> tuple[reference.Tokens | fused.Given, reference.LossOptions]:
    """The loss's options and per-token constants, checked and flat."""
    shape = tuple(like.shape)
    options = loss_options(beta, kl, clip, level)
    sequence, normalizer = check_tokens(
        like, advantage, old_logp, ref_logp, sequence, level, reduce, normalizer,
        importance_weight, mask,
    )  # fmt: skip
    if advantage.dim() < like.dim():
        advantage = advantage[:, None].expand(shape)
    if sequence is None and like.dim() == 2:
        sequence = torch.arange(shape[0], device=like.device)[:, None].expand(shape)

    live = None if mask is None else mask.bool()
    if ignore_index is not None:
        counted = like != ignore_index
        live = counted if live is None else live & counted
        if like.device.type == "cpu":
            checks.targets_in_range(like.reshape(-1), live.reshape(-1), vocabulary)
    elif live is None:
        live = torch.ones(shape, dtype=torch.bool, device=like.device)

    def flat(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.reshape(-1)

    given = (
        live.reshape(-1),
        advantage.reshape(-1),
        flat(sequence),
        options,
        reduce,
        normalizer,
        flat(old_logp),
        flat(ref_logp),
        flat(importance_weight),
    )
    if impl == "triton":
        return fused.Given.of(*given), options
    return reference.make_tokens(*given, dtype), options
