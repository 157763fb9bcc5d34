"""The ops with a vocabulary in them as `torch.ops.meal_fast.NAME`; see `registration`.

Going back through a compiled `linear_logprob` makes its forward pass again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import logprob, loss, reference
from .registration import register_loss, register_values

HEAD = "Tensor hidden, Tensor weight, Tensor? bias"
READOUT = "float temperature, float? softcap, SymInt? max_bytes, str? impl"
OPTIONS = (
    "float beta, str kl, float low, float high, str level, str reduce, float? constant, "
    "Tensor? count, SymInt ignore_index"
)


def _linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: float,
    softcap: float | None,
    max_bytes: int | None,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    return logprob.linear_logprob(
        hidden,
        weight,
        target,
        temperature=temperature,
        bias=bias,
        softcap=softcap,
        max_bytes=max_bytes,
        impl=impl,
    )


def _linear_logprob_kl(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    target: Tensor,
    temperature: float,
    softcap: float | None,
    max_bytes: int | None,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return logprob.linear_logprob_kl(
        hidden,
        ref_hidden,
        weight,
        target,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        temperature=temperature,
        bias=bias,
        softcap=softcap,
        max_bytes=max_bytes,
        impl=impl,
    )


def _like_target(results: int, place: int) -> Any:
    """A fake: so many results in the shape of the target, which is the argument at `place`."""

    def fake(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        dtype, shape = reference.compute_dtype(hidden, weight), rest[place - 2].shape
        return tuple(torch.empty(shape, dtype=dtype, device=hidden.device) for _ in range(results))

    return fake


register_values(
    "linear_logprob",
    f"{HEAD}, Tensor target, {READOUT}",
    returns=2,
    leading=3,
    eager=_linear_logprob,
    fake=_like_target(2, 3),
)
register_values(
    "linear_logprob_kl",
    f"{HEAD}, Tensor ref_hidden, Tensor? ref_weight, Tensor? ref_bias, Tensor target, {READOUT}",
    returns=4,
    leading=3,
    eager=_linear_logprob_kl,
    fake=_like_target(4, 6),
)


def _linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    advantage: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    ref_hidden: Tensor | None,
    sequence: Tensor | None,
    importance_weight: Tensor | None,
    mask: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    *options: Any,
) -> tuple[Tensor, loss.Metrics]:
    return loss.linear_policy_loss(
        hidden,
        weight,
        target,
        advantage,
        old_logp=old_logp,
        ref_logp=ref_logp,
        ref_hidden=ref_hidden,
        sequence=sequence,
        importance_weight=importance_weight,
        mask=mask,
        bias=bias,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        **_by_name(*options),
    )


def _policy_loss(
    logits: Tensor,
    target: Tensor,
    advantage: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    ref_logits: Tensor | None,
    sequence: Tensor | None,
    importance_weight: Tensor | None,
    mask: Tensor | None,
    *options: Any,
) -> tuple[Tensor, loss.Metrics]:
    return loss.policy_loss(
        logits,
        target,
        advantage,
        old_logp=old_logp,
        ref_logp=ref_logp,
        ref_logits=ref_logits,
        sequence=sequence,
        importance_weight=importance_weight,
        mask=mask,
        **_by_name(*options),
    )


def _by_name(
    beta: float,
    kl: str,
    low: float,
    high: float,
    level: str,
    reduce: str,
    constant: float | None,
    count: Tensor | None,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    max_bytes: int | None,
    impl: str | None,
) -> dict[str, Any]:
    """OPTIONS and READOUT as the public functions name them."""
    return {
        "beta": beta,
        "kl": kl,
        "clip": (low, high),
        "level": level,
        "reduce": reduce,
        "normalizer": constant if count is None else count,
        "ignore_index": ignore_index,
        "temperature": temperature,
        "softcap": softcap,
        "max_bytes": max_bytes,
        "impl": impl,
    }


register_loss(
    "linear_policy_loss",
    f"{HEAD}, Tensor target, Tensor advantage, Tensor? old_logp, Tensor? ref_logp, "
    "Tensor? ref_hidden, Tensor? sequence, Tensor? importance_weight, Tensor? mask, "
    f"Tensor? ref_weight, Tensor? ref_bias, {OPTIONS}, {READOUT}",
    leading=3,
    eager=_linear_policy_loss,
)
register_loss(
    "policy_loss",
    "Tensor logits, Tensor target, Tensor advantage, Tensor? old_logp, Tensor? ref_logp, "
    "Tensor? ref_logits, Tensor? sequence, Tensor? importance_weight, Tensor? mask, "
    f"{OPTIONS}, {READOUT}",
    leading=1,
    eager=_policy_loss,
)
