"""Log-probability, entropy and KL from hidden states; the checks of every op with a head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from meal_fast.common import require

from . import autograd, checks, reference
from .dispatch import choose
from .registration import Given, registered
from .vocab_sweep import LinearSource, Readout


def _like_target(results: int) -> Callable[[Given], tuple[Tensor, ...]]:
    """A fake: so many results in the shape of the target."""

    def fake(given: Given) -> tuple[Tensor, ...]:
        dtype = reference.compute_dtype(given["hidden"], given["weight"])
        shape, device = given["target"].shape, given["hidden"].device
        return tuple(torch.empty(shape, dtype=dtype, device=device) for _ in range(results))

    return fake


@registered("hidden", "weight", "bias", fake=_like_target(2))
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    max_bytes: int | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Give each target's log-probability, and the entropy, from hidden states, in tiles of logits.

    z = c·tanh((hidden @ weightᵀ + bias) / c) / temperature (without `softcap` c: no tanh),
    logp = z_target - log Σ exp z, entropy = -Σ p log p with p = softmax(z).

    Args:
        hidden: (N, D) or (B, T, D). weight: (V, D). target: (N,) or (B, T) int64. bias: (V,).
            A bias of -inf takes a column out of the vocabulary.
        max_bytes: of the tile of logits that is reused (and, with low-precision factors on a GPU,
            its gradient); it decides how many tokens go through the head at a time, not the
            result. None: 32 MiB on a CPU, 1 GiB on a GPU.
        impl: None, "torch" or "triton" go through the head in chunks; "fused" makes the product in
            Triton too, so that no logits are stored on the way forward (bfloat16 or float16 on a
            GPU; never run on one), and goes back in chunks.

    Returns:
        logp and entropy, shaped as `target`, float32; differentiable in hidden, weight and bias.
        A weight that does not require a gradient costs no product for it.

    Raises:
        ValueError: bad shapes or options; on the CPU also a target outside [0, V).
    """
    logp, entropy, _, _ = _linear_logprob(
        hidden, weight, target, temperature, bias, softcap, max_bytes, None, None, None, impl
    )
    return logp, entropy


@registered("hidden", "weight", "bias", fake=_like_target(4))
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
    max_bytes: int | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give `linear_logprob`, the reference's log-probability, and the exact KL, token by token.

    kl = Σ_v p_v (log p_v - log q_v), q the reference's distribution at the same temperature and
    softcap; finished as log1p Σ p·expm1(-d), which keeps in float32 the small values that the
    difference of two log-sums loses. Terms with p = 0 count nothing; where q = 0 < p it is +inf.

    Args: as `linear_logprob`; ref_hidden: (N, D_ref), a constant; ref_weight: (V, D_ref) and
        ref_bias, constants, by default `weight` and `bias` (which get no gradient through q).

    Returns:
        logp, entropy, ref_logp, kl, shaped as `target`; all but ref_logp are differentiable.
    """
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
        impl,
    )


def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float,
    bias: Tensor | None,
    softcap: float | None,
    max_bytes: int | None,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "linear_logprob" if ref_hidden is None else "linear_logprob_kl"
    read = readout(temperature, softcap, max_bytes)
    dtype = reference.compute_dtype(hidden, weight)
    check_head("", hidden, weight, bias, target)
    head = reference_head(hidden, weight, bias, target, ref_hidden, ref_weight, ref_bias)
    fused = impl == "fused" and head is None
    chosen = choose(op, "triton" if fused else impl, hidden, weight)
    flat = target.reshape(-1)
    if flat.device.type == "cpu":
        checks.targets_in_range(flat, None, weight.shape[0])
    source = None
    if head is not None:
        source = LinearSource(*head, read, dtype)
    plan = autograd.LinearPlan(flat.long(), read, dtype, max_bytes, source, chosen, fused)
    rows = hidden.reshape(-1, hidden.shape[-1])
    out = autograd.LinearLogprob.apply(rows, weight, bias, plan)
    logp, entropy, ref_logp, kl = (
        x.view(target.shape) if x.numel() == flat.numel() else x for x in out
    )
    return logp, entropy, ref_logp, kl


def readout(temperature: float, softcap: float | None, max_bytes: int | None) -> Readout:
    checks.positive("temperature", temperature)
    if softcap is not None:
        checks.positive("softcap", softcap)
    require(max_bytes is None or max_bytes >= 1, "max_bytes", max_bytes, "must be positive")
    return Readout(temperature, softcap)


def check_rows_and_target(name: str, rows: Tensor, target: Tensor) -> int:
    """Check `rows` (N, X) or (B, T, X) beside `target` (N,) or (B, T); give X."""
    shape = tuple(rows.shape)
    require(len(shape) in (2, 3), f"{name}.shape", shape, "must have 2 or 3 dimensions")
    checks.shape("target", target, shape[:-1])
    checks.integer("target", target)
    return shape[-1]


def check_head(
    prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor
) -> None:
    checks.floating(f"{prefix}hidden", hidden)
    checks.floating(f"{prefix}weight", weight)
    width = check_rows_and_target(f"{prefix}hidden", hidden, target)
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


def reference_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Check the reference's (hidden (N, D_ref), weight, bias); None when there is none."""
    if ref_hidden is None:
        for name, tensor in (("ref_weight", ref_weight), ("ref_bias", ref_bias)):
            if tensor is not None:
                raise ValueError(f"{name}: given without ref_hidden; give both or neither")
        return None
    if ref_weight is None:
        ref_weight = weight
        ref_bias = bias if ref_bias is None else ref_bias
    check_head("ref_", ref_hidden, ref_weight, ref_bias, target)
    checks.shape("ref_weight", ref_weight, (weight.shape[0], ref_hidden.shape[-1]))
    checks.same_device("hidden", hidden, ref_hidden=ref_hidden)
    rows = ref_hidden.detach().reshape(-1, ref_hidden.shape[-1])
    return rows, ref_weight.detach(), None if ref_bias is None else ref_bias.detach()
