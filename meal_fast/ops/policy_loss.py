"""The policy loss of log-probabilities, of logits and of hidden states.

`policy_loss_from_logp` is the definition. The other two make the log-probabilities on the way, and
their gradients with them. What all three share is below them: `LossOptions` (reference.py) says
what the loss is, `Inputs` what it is given of each token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from meal_fast.common import require

from . import autograd, checks, dispatch, fused, reference
from .logprob import check_head, check_rows_and_target, readout, reference_head
from .reference import LossOptions
from .registration import Given, needs_gradient, registered

Metrics = dict[str, Tensor]


def _report(given: Given, tokens: Tensor, figures: Tensor) -> Metrics:
    """Name the metrics that there are; a fused form has them in one tensor, reference.FIGURES."""
    metrics = {"tokens": tokens} | dict(zip(reference.FIGURES, figures.unbind(), strict=True))
    references = ("ref_logp", "token_kl", "ref_hidden", "ref_logits")
    if all(given.get(name) is None for name in references):
        del metrics["kl"]
    if "entropy" in given and given["entropy"] is None:
        del metrics["entropy"]
    return metrics


@registered("logp", "token_kl", report=_report)
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
    """Give the clipped policy-gradient loss with a KL term: the definition the others agree with.

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
        ValueError: bad shapes or options; on the CPU also a live token whose advantage or
            importance_weight is not finite.
    """
    options = LossOptions(beta, kl, clip, level, reduce, normalizer)
    inputs = Inputs(advantage, old_logp, ref_logp, sequence, importance_weight, mask)
    checks.floating("logp", logp)
    require(logp.dim() in (1, 2), "logp.shape", tuple(logp.shape), "must be (N,) or (B, T)")
    shape = tuple(logp.shape)
    for name, tensor in (("token_kl", token_kl), ("entropy", entropy)):
        if tensor is not None:
            checks.shape(name, tensor, shape)
    checks.same_device("logp", logp, token_kl=token_kl, entropy=entropy)
    require(kl == "exact" or token_kl is None, "kl", kl, "token_kl is given: use kl='exact'")
    if beta != 0 and kl == "exact":
        require(token_kl is not None, "token_kl", None, "kl='exact' with beta needs it")
    elif beta != 0:
        require(ref_logp is not None, "ref_logp", None, f"beta={beta} needs a reference")
    options = inputs.checked(logp, options)
    if _choose(impl, level, logp, token_kl) == "triton":
        return _in_triton(logp, token_kl, entropy, inputs, options)
    dtype = reference.compute_dtype(logp)
    tokens = inputs.tokens(logp, options, None, 0, dtype, "torch")
    assert isinstance(tokens, reference.Tokens)

    def flat(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.reshape(-1).to(dtype)

    return reference.loss_and_metrics(
        logp.reshape(-1).to(dtype), flat(token_kl), flat(entropy), tokens, options
    )


@registered("hidden", "weight", "bias", report=_report)
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
    """Give the policy loss of hidden states, its gradients made in the forward pass.

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
    options = LossOptions(beta, kl, clip, level, reduce, normalizer)
    inputs = Inputs(advantage, old_logp, ref_logp, sequence, importance_weight, mask)
    read = readout(temperature, softcap, max_bytes)
    dtype = reference.compute_dtype(hidden, weight)
    check_head("", hidden, weight, bias, target)
    head = reference_head(hidden, weight, bias, target, ref_hidden, ref_weight, ref_bias)
    _one_reference(kl, beta, ref_logp, ref_hidden, "ref_hidden")
    chosen = dispatch.choose("linear_policy_loss", impl, hidden, weight)
    options = inputs.checked(target, options)
    tokens = inputs.tokens(target, options, ignore_index, weight.shape[0], dtype, chosen)
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


@registered("logits", report=_report)
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
    """Give the policy loss of logits (N, V) or (B, T, V) that already exist, of any strides.

    As `linear_policy_loss`, with `ref_logits` in place of `ref_hidden`. The gradient is a new
    tensor in the logits' dtype; the logits are left as they are. In Triton they are read where they
    lie, once for the loss and once for the gradient, and `max_bytes` has nothing to bound.
    """
    options = LossOptions(beta, kl, clip, level, reduce, normalizer)
    inputs = Inputs(advantage, old_logp, ref_logp, sequence, importance_weight, mask)
    read = readout(temperature, softcap, max_bytes)
    checks.floating("logits", logits)
    v = check_rows_and_target("logits", logits, target)
    if ref_logits is not None:
        checks.floating("ref_logits", ref_logits)
        checks.shape("ref_logits", ref_logits, tuple(logits.shape))
    _one_reference(kl, beta, ref_logp, ref_logits, "ref_logits")
    checks.same_device("logits", logits, target=target, ref_logits=ref_logits)
    chosen = dispatch.choose("policy_loss", impl, logits, ref_logits)
    if ref_logits is not None and chosen == "torch":
        ref_logits = ref_logits.reshape(-1, v)
    dtype = reference.compute_dtype(logits)
    options = inputs.checked(target, options)
    tokens = inputs.tokens(target, options, ignore_index, v, dtype, chosen)
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


@dataclass(frozen=True)
class Inputs:
    """Hold what a loss is given of its tokens, as the public functions name it: constants."""

    advantage: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None
    sequence: Tensor | None
    importance_weight: Tensor | None
    mask: Tensor | None

    def checked(self, like: Tensor, options: LossOptions) -> LossOptions:
        """Check them beside `like`, (N,) or (B, T): the targets, or their log-probabilities.

        Returns the options, where dr_grpo's constant is no longer None.
        """
        shape, padded = tuple(like.shape), like.dim() == 2
        if padded and self.advantage.dim() == 1:
            checks.shape("advantage", self.advantage, (shape[0],))
        else:
            checks.shape("advantage", self.advantage, shape)
        for name, tensor in vars(self).items():
            if tensor is not None and name != "advantage":
                checks.shape(name, tensor, shape)
        checks.same_device("logp or target", like, **vars(self))
        if self.sequence is not None:
            checks.integer("sequence", self.sequence)
        elif not padded and (options.level == "sequence" or options.reduce == "grpo"):
            option = "level" if options.level == "sequence" else "reduce"
            value = getattr(options, option)
            raise ValueError(f"{option}={value!r}: packed tokens need `sequence`, (N,) int64 ids")
        if options.normalizer is None and options.reduce == "dr_grpo":
            remedy = "reduce='dr_grpo' over packed tokens needs a constant"
            require(padded, "normalizer", None, remedy)
            return replace(options, normalizer=max(1, like.numel()))
        return options

    def check_finite(self, live: Tensor | None) -> None:
        """Raise ValueError, on the CPU, for a live token whose constants are not finite."""
        remedy = "it would make the whole loss NaN: mask its tokens, or mend what made it"
        for name in ("advantage", "importance_weight"):
            values: Tensor | None = getattr(self, name)
            if values is not None and values.device.type == "cpu":
                checks.finite_where(name, values.detach(), live, remedy)

    def tokens(
        self,
        like: Tensor,
        options: LossOptions,
        ignore_index: int | None,  # of `like`, when it holds targets
        vocabulary: int,
        dtype: torch.dtype,
        impl: str,
    ) -> reference.Tokens | fused.Given:
        """Make the loss's per-token constants, flat."""
        shape, advantage, sequence = tuple(like.shape), self.advantage, self.sequence
        if advantage.dim() < like.dim():
            advantage = advantage[:, None].expand(shape)
        if sequence is None and like.dim() == 2:
            sequence = torch.arange(shape[0], device=like.device)[:, None].expand(shape)
        live = None if self.mask is None else self.mask.bool()
        if ignore_index is not None:
            counted = like != ignore_index
            live = counted if live is None else live & counted
            if like.device.type == "cpu":
                checks.targets_in_range(like.reshape(-1), live.reshape(-1), vocabulary)
        elif live is None:
            live = torch.ones(shape, dtype=torch.bool, device=like.device)
        self.check_finite(live)
        given = (
            live.reshape(-1),
            advantage.reshape(-1),
            _flat(sequence),
            options,
            _flat(self.old_logp),
            _flat(self.ref_logp),
            _flat(self.importance_weight),
        )
        return fused.Given.of(*given) if impl == "triton" else reference.make_tokens(*given, dtype)


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.reshape(-1)


def _one_reference(
    kl: str, beta: float, ref_logp: Tensor | None, distribution: Tensor | None, name: str
) -> None:
    if ref_logp is not None and distribution is not None:
        raise ValueError(f"ref_logp: given together with {name}; give one of them")
    if kl == "exact" and (beta != 0 or ref_logp is not None):
        require(distribution is not None, name, None, "kl='exact' needs the whole distribution")
    if beta != 0 and ref_logp is None:
        require(distribution is not None, "ref_logp", None, f"beta={beta} needs it, or {name}")


def _choose(impl: str | None, level: str, logp: Tensor, token_kl: Tensor | None) -> str:
    """As `dispatch.choose`; the ratio of a sequence needs all of its tokens, and runs in torch."""
    if level == "sequence" and impl in (None, "triton"):
        require(impl is None, "impl", impl, "level='sequence' runs in torch; use None or 'torch'")
        return "torch"
    return dispatch.choose("policy_loss_from_logp", impl, logp, token_kl)


def _in_triton(
    logp: Tensor,
    token_kl: Tensor | None,
    entropy: Tensor | None,
    inputs: Inputs,
    options: LossOptions,
) -> tuple[Tensor, Metrics]:
    from meal_fast.kernels import policy_loss as kernels

    def flat(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.detach().reshape(-1).contiguous()

    inputs.check_finite(None if inputs.mask is None else inputs.mask.bool())
    coefficient, total = None, options.normalizer
    if options.reduce == "grpo":
        coefficient, sequences = fused.of_sequences(logp, inputs.sequence, inputs.mask)
        total = sequences.clamp(min=1) if total is None else total
    shared = inputs.advantage.dim() < logp.dim()
    plan = kernels.Plan(
        options,
        inputs.advantage.detach().reshape(-1).contiguous(),
        max(1, logp.shape[1]) if shared else 1,
        flat(inputs.old_logp),
        flat(inputs.ref_logp),
        flat(entropy),
        flat(inputs.importance_weight),
        flat(inputs.mask),
        coefficient,
        total if total is None or isinstance(total, Tensor) else float(total),
        any(needs_gradient(logp, token_kl)),
    )
    loss, tokens, figures, _, _ = fused.PolicyLossFromLogp.apply(
        logp.reshape(-1).contiguous(),
        None if token_kl is None else token_kl.reshape(-1).contiguous(),
        plan,
    )
    given = {"ref_logp": inputs.ref_logp, "token_kl": token_kl, "entropy": entropy}
    return loss, _report(given, tokens, figures[1:])
