"""The public ops: checks, choice of an implementation, one function an op. Needs torch alone.

    R  rows (responses)    K  objectives    N  tokens    B, T  rows and padded length
    D  hidden width        V  vocabulary

Every op takes `impl=None | "torch" | "triton" | "cuda"`. None takes the best that exists for the
device; a name that cannot be met is a ValueError, and nothing falls back in silence. Results are
float32, or float64 when a floating point input is float64. Where values (not shapes) are bad, the
CPU raises; on a GPU, where looking would stall the queue, the row gives NaN and never a bad access.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from meal_fast.ops import checks, linear, reference, sampling
from meal_fast.ops.checks import require
from meal_fast.ops.sweep import DEFAULT_MAX_BYTES, LinearSource, Readout

__all__ = [
    "group_advantages",
    "linear_logprob",
    "linear_logprob_kl",
    "linear_policy_loss",
    "policy_loss",
    "policy_loss_from_logp",
    "sample",
]

Metrics = dict[str, Tensor]
IMPLEMENTATIONS = ("torch", "triton", "cuda")


def _implementation(op: str, impl: str | None, available: tuple[str, ...] = ("torch",)) -> str:
    """The implementation to call. `available` names what `op` has, the best for its device first."""
    if impl is None:
        return available[0]
    checks.choice("impl", impl, IMPLEMENTATIONS)
    require(
        impl in available,
        "impl",
        impl,
        f"{op} has no such implementation here; use None or one of: {', '.join(available)}",
    )
    return impl


def group_advantages(
    rewards: Tensor,
    weights: Tensor,
    group: Tensor,
    *,
    utopia: Tensor | Sequence[float] | None,
    mu: float = 0.1,
    scalarization: str = "smooth-tchebycheff",
    scale: str = "std",
    offset: Tensor | Sequence[float] | None = None,
    divisor: Tensor | Sequence[float] | None = None,
    keep: Tensor | None = None,
    eps: float = 1e-4,
    check: bool | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Vector rewards and per-row preferences → scalar score and group-relative advantage.

    With r̃ = (rewards - offset) / divisor, `scalarization` is one of

    - ``linear``: S = Σ_k w_k r̃_k
    - ``tchebycheff``: S = -max_k w_k (z*_k - r̃_k)
    - ``smooth-tchebycheff``: S = -μ log Σ_k exp(w_k (z*_k - r̃_k) / μ) [P]

    and A = (S - mean) / (std + eps) over the kept rows of the group, std the unbiased one [P];
    ``scale="none"`` leaves the division out. A is 0 for dropped rows, for a group of one kept row,
    and throughout a group whose scores are all equal.

    Args:
        rewards: (R, K), raw.
        weights: (R, K) or (K,), on the simplex.
        group: (R,) int64, any ids, uneven, in any order.
        utopia: (K,), z*, in units of r̃; may be None when `scalarization="linear"`.
        mu: smoothing, positive.
        offset, divisor: (K,), the reward normalisation; 0 and 1 by default.
        keep: (R,) bool; False drops a row (all its values may be NaN).
        check: look at the values even if that waits for a GPU. On the CPU they always are.

    Returns:
        score (R,) and advantage (R,), differentiable in `rewards` and `weights`. A row without a
        finite reward and a weight on the simplex has score NaN; when it is kept (possible on a GPU
        only) so has the advantage of its group.

    Raises:
        ValueError: a shape, option or (see `check`) value is bad; a value is named with its row.
    """
    _implementation("group_advantages", impl)
    checks.choice("scalarization", scalarization, ("linear", "tchebycheff", "smooth-tchebycheff"))
    checks.choice("scale", scale, ("std", "none"))
    checks.positive("mu", mu)
    require(eps >= 0, "eps", eps, "must not be negative")
    checks.floating("rewards", rewards)
    require(rewards.dim() == 2, "rewards.shape", tuple(rewards.shape), "must be (R, K)")
    r, k = rewards.shape
    checks.floating("weights", weights)
    checks.shape("weights", weights, (r, k), (k,))
    checks.shape("group", group, (r,))
    checks.integer("group", group)
    if utopia is None:
        require(scalarization == "linear", "utopia", None, f"{scalarization} needs one")
        utopia = [0.0] * k
    dtype = reference.compute_dtype(rewards, weights)

    def vector(name: str, value: Tensor | Sequence[float] | None, default: float) -> Tensor:
        value = [default] * k if value is None else value
        out = torch.as_tensor(value, dtype=dtype, device=rewards.device)
        checks.shape(name, out, (k,))
        return out.detach()

    z, shift, unit = (
        vector("utopia", utopia, 0.0),
        vector("offset", offset, 0.0),
        vector("divisor", divisor, 1.0),
    )
    kept = torch.ones(r, dtype=torch.bool, device=rewards.device) if keep is None else keep
    checks.shape("keep", kept, (r,))
    require(kept.dtype == torch.bool, "keep.dtype", kept.dtype, "must be bool")
    checks.same_device("rewards", rewards, weights=weights, group=group, keep=kept)
    rewards, weights = rewards.to(dtype), weights.to(dtype).expand(r, k)
    if checks.values_are_checked(rewards, check):
        _check_rows(rewards.detach(), weights.detach(), kept)
        for name, value in (("utopia", z), ("offset", shift), ("divisor", unit)):
            require(bool(value.isfinite().all()), name, value.tolist(), "must be finite")
        require(bool((unit != 0).all()), "divisor", unit.tolist(), "must not be zero")
    return reference.group_advantages(
        rewards,
        weights,
        group.long(),
        z,
        shift,
        unit,
        kept,
        mu=mu,
        scalarization=scalarization,
        scale=scale,
        eps=eps,
    )


def _check_rows(rewards: Tensor, weights: Tensor, keep: Tensor) -> None:
    bad = keep & ~rewards.isfinite().all(1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"rewards: row {row} is {rewards[row].tolist()}, not finite; drop it with keep"
        )
    bad = keep & ~reference.on_simplex(weights)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"weights: row {row} is {weights[row].tolist()}, not on the simplex; "
            "weights are non-negative and sum to 1"
        )


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and entropy, from hidden states; logits are never whole.

    z = c·tanh((hidden @ weightᵀ + bias) / c) / temperature (without `softcap` c: no tanh),
    logp = z_target - log Σ exp z, entropy = -Σ p log p with p = softmax(z).

    Args:
        hidden: (N, D) or (B, T, D). weight: (V, D). target: (N,) or (B, T) int64. bias: (V,).
            A bias of -inf takes a column out of the vocabulary.
        max_bytes: of the tile of logits that is reused; it decides how many tokens go through the
            head at a time, not the result.

    Returns:
        logp and entropy, shaped as `target`, float32; differentiable in hidden, weight and bias.
        A weight that does not require a gradient costs no product for it.

    Raises:
        ValueError: bad shapes or options; on the CPU also a target outside [0, V).
    """
    _implementation("linear_logprob", impl)
    logp, entropy, _, _ = _linear_logprob(
        hidden, weight, target, temperature, bias, softcap, max_bytes, None, None, None
    )
    return logp, entropy


def linear_logprob_kl(
    hidden: Tensor,
    ref_hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`linear_logprob`, the reference's log-probability, and the exact KL to it, token by token.

    kl = Σ_v p_v (log p_v - log q_v), q the reference's distribution at the same temperature and
    softcap; finished as log1p Σ p·expm1(-d), which keeps in float32 the small values that the
    difference of two log-sums loses. Terms with p = 0 count nothing; where q = 0 < p it is +inf.

    Args: as `linear_logprob`; ref_hidden: (N, D_ref), a constant; ref_weight: (V, D_ref) and
        ref_bias, constants, by default `weight` and `bias` (which get no gradient through q).

    Returns:
        logp, entropy, ref_logp, kl, shaped as `target`; all but ref_logp are differentiable.
    """
    _implementation("linear_logprob_kl", impl)
    return _linear_logprob(
        hidden,
        weight,
        target,
        temperature,
        bias,
        softcap,
        max_bytes,
        ref_hidden,
        ref_weight,
        ref_bias,
    )


def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float,
    bias: Tensor | None,
    softcap: float | None,
    max_bytes: int,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    readout = _readout(temperature, softcap, max_bytes)
    dtype = reference.compute_dtype(hidden, weight)
    _check_head("", hidden, weight, bias, target)
    head = _reference_head(hidden, weight, bias, target, ref_hidden, ref_weight, ref_bias)
    flat = target.reshape(-1)
    if flat.device.type == "cpu":
        checks.targets_in_range(flat, torch.ones_like(flat, dtype=torch.bool), weight.shape[0])
    source = None
    if head is not None:
        source = LinearSource(*head, readout, dtype)
    plan = linear.LinearPlan(flat.long(), readout, dtype, max_bytes, source)
    rows = hidden.reshape(-1, hidden.shape[-1])
    out = linear.LinearLogprob.apply(rows, weight, bias, plan)
    logp, entropy, ref_logp, kl = (
        x.view(target.shape) if x.numel() == flat.numel() else x for x in out
    )
    return logp, entropy, ref_logp, kl


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
    _implementation("linear_policy_loss", impl)
    readout = _readout(temperature, softcap, max_bytes)
    dtype = reference.compute_dtype(hidden, weight)
    _check_head("", hidden, weight, bias, target)
    head = _reference_head(hidden, weight, bias, target, ref_hidden, ref_weight, ref_bias)
    _one_reference(kl, beta, ref_logp, ref_hidden, "ref_hidden")
    tokens, options = _tokens(
        target, advantage, old_logp, ref_logp, sequence, beta, kl, clip, level, reduce,
        normalizer, importance_weight, mask, ignore_index, weight.shape[0], dtype,
    )  # fmt: skip
    metrics: Metrics = {}
    plan = linear.LossPlan(
        target.reshape(-1).long(),
        tokens,
        options,
        readout,
        dtype,
        max_bytes,
        *(head if head is not None else (None, None, None)),
        None,
        torch.is_grad_enabled(),
    )
    rows = hidden.reshape(-1, hidden.shape[-1])
    loss = linear.LinearPolicyLoss.apply(rows, weight, bias, plan, metrics)
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
    _implementation("policy_loss", impl)
    readout = _readout(temperature, softcap, max_bytes)
    checks.floating("logits", logits)
    v = _check_rows_and_target("logits", logits, target)
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
    plan = linear.LossPlan(
        target.reshape(-1).long(),
        tokens,
        options,
        readout,
        dtype,
        max_bytes,
        None,
        None,
        None,
        None if ref_logits is None else ref_logits.reshape(-1, v),
        torch.is_grad_enabled(),
    )
    loss = linear.LogitsPolicyLoss.apply(logits.reshape(-1, v), plan, metrics)
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
    _implementation("policy_loss_from_logp", impl)
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
    flat = (None if x is None else x.reshape(-1).to(dtype) for x in (logp, token_kl, entropy))
    first, *rest = flat
    assert first is not None
    return reference.loss_and_metrics(first, *rest, tokens, options)


def sample(
    logits: Tensor,
    *,
    seed: int,
    row: Tensor,
    position: Tensor | int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One token of each row, by inverse CDF with one uniform per (seed, row id, position).

    The uniform comes from Philox4x32-10 (key: seed; counter: position, row id), so a row's token
    depends on its own logits and ids, not on what else is in the batch. The token always has p > 0.

    Args:
        logits: (R, V). row: (R,) int64 ids. position: (R,) int64 or an int.
        temperature: p = softmax(logits / temperature). 0 is greedy: the first maximum.
        top_k: keep exactly the k likeliest (0: all). top_p: of those, the shortest prefix in order
            of probability whose share reaches top_p. min_p: of those, the ones with
            p ≥ min_p · max p. Ties are taken in order of token id.

    Returns:
        token (R,) int64; logp (R,), its log-probability under softmax(logits / temperature) (at
        temperature 0: under softmax(logits)); truncated_logp (R,), under what was sampled from,
        renormalised (at temperature 0: 0). Not differentiable.

    Raises:
        ValueError: bad shapes or options; on the CPU also a row whose largest logit is not finite
            or that holds a NaN.
    """
    _implementation("sample", impl)
    checks.floating("logits", logits)
    require(logits.dim() == 2, "logits.shape", tuple(logits.shape), "must be (R, V)")
    r, v = logits.shape
    require(v >= 1, "logits.shape", tuple(logits.shape), "needs a vocabulary")
    checks.shape("row", row, (r,))
    checks.integer("row", row)
    require(
        isinstance(seed, int) and -(2**63) <= seed < 2**64, "seed", seed, "must be a 64-bit int"
    )
    if isinstance(position, int):
        position = torch.full_like(row, position)
    checks.shape("position", position, (r,))
    checks.integer("position", position)
    checks.same_device("logits", logits, row=row, position=position)
    require(
        math.isfinite(temperature) and temperature >= 0,
        "temperature",
        temperature,
        "must be 0 (greedy) or positive",
    )
    require(top_k >= 0, "top_k", top_k, "must be 0 (no limit) or positive")
    require(0 < top_p <= 1, "top_p", top_p, "must be in (0, 1]")
    require(0 <= min_p <= 1, "min_p", min_p, "must be in [0, 1]")
    with torch.no_grad():
        if logits.device.type == "cpu":
            bad = ~logits.amax(1).isfinite()  # a NaN comes through amax
            if bool(bad.any()):
                first = int(bad.nonzero()[0, 0])
                raise ValueError(
                    f"logits: row {first} has a NaN, an infinite maximum or only -inf; "
                    "it is no distribution"
                )
        return sampling.sample(
            logits,
            seed,
            row.long(),
            position.long(),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            dtype=reference.compute_dtype(logits),
        )


# --- checks shared by several ops ---------------------------------------------------------------


def _readout(temperature: float, softcap: float | None, max_bytes: int) -> Readout:
    checks.positive("temperature", temperature)
    if softcap is not None:
        checks.positive("softcap", softcap)
    require(max_bytes >= 1, "max_bytes", max_bytes, "must be positive")
    return Readout(temperature, softcap)


def _check_rows_and_target(name: str, rows: Tensor, target: Tensor) -> int:
    """`rows` (N, X) or (B, T, X) with `target` (N,) or (B, T); returns X."""
    shape = tuple(rows.shape)
    require(len(shape) in (2, 3), f"{name}.shape", shape, "must have 2 or 3 dimensions")
    checks.shape("target", target, shape[:-1])
    checks.integer("target", target)
    return shape[-1]


def _check_head(
    prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor
) -> None:
    checks.floating(f"{prefix}hidden", hidden)
    checks.floating(f"{prefix}weight", weight)
    width = _check_rows_and_target(f"{prefix}hidden", hidden, target)
    require(
        weight.dim() == 2 and weight.shape[0] >= 1,
        f"{prefix}weight.shape",
        tuple(weight.shape),
        "must be (V, D)",
    )
    checks.shape(f"{prefix}weight", weight, (weight.shape[0], width))
    if bias is not None:
        checks.floating(f"{prefix}bias", bias)
        checks.shape(f"{prefix}bias", bias, (weight.shape[0],))
    checks.same_device(f"{prefix}hidden", hidden, weight=weight, bias=bias, target=target)


def _reference_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """(hidden (N, D_ref), weight, bias) of the reference, checked; None when there is none."""
    if ref_hidden is None:
        for name, tensor in (("ref_weight", ref_weight), ("ref_bias", ref_bias)):
            if tensor is not None:
                raise ValueError(f"{name}: given without ref_hidden; give both or neither")
        return None
    if ref_weight is None:
        ref_weight = weight
        ref_bias = bias if ref_bias is None else ref_bias
    _check_head("ref_", ref_hidden, ref_weight, ref_bias, target)
    checks.shape("ref_weight", ref_weight, (weight.shape[0], ref_hidden.shape[-1]))
    checks.same_device("hidden", hidden, ref_hidden=ref_hidden)
    rows = ref_hidden.detach().reshape(-1, ref_hidden.shape[-1])
    return rows, ref_weight.detach(), None if ref_bias is None else ref_bias.detach()


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
