"""The ops as `torch.ops.meal_fast.NAME`, which torch.compile keeps whole.

An op that is being compiled calls its registered self; run by hand it does not, for the dispatcher
costs more per call than a small op. The body of a registered op is the eager function, so that
checks, choice of an implementation and numbers are the same. Two shapes of op:

- values: NAME gives the results, NAME_backward calls the function again for its gradients;
- a loss: NAME gives the loss and the gradients with it, in one pass, and going back is a product.

`sample` has no gradients, and is neither.

The arguments that are differentiated come first in every schema.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import advantages, from_logp, reference, sampling
from .prefix_attention import Groups, prefix_attention

Arguments = tuple[Any, ...]


@contextmanager
def autograd_inside() -> Iterator[None]:
    """Autograd in the body of an op: the dispatcher has left it behind on the way there."""
    key = torch._C.DispatchKey.AutogradFunctionality
    before = torch._C._dispatch_tls_is_dispatch_key_excluded(key)
    torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, before)


def as_leaves(arguments: Arguments, needs: list[bool]) -> tuple[list[Any], list[Tensor]]:
    """The arguments, those that need a gradient detached and ready for one; and these alone."""
    leaves = [
        x.detach().requires_grad_() if n else x for x, n in zip(arguments, needs, strict=False)
    ]
    wanted = [leaf for leaf, n in zip(leaves, needs, strict=True) if n]
    return [*leaves, *arguments[len(needs) :]], wanted


def register_values(
    name: str, schema: str, returns: int, leading: int, eager: Callable[..., Any], fake: Any
) -> None:
    """`eager(*arguments)` → `returns` tensors, differentiable in its first `leading` arguments."""
    results = ", ".join(["Tensor"] * returns)

    def body(*arguments: Any) -> Any:
        with torch.no_grad():
            return eager(*arguments)

    def backward_body(upstream: list[Tensor], needs: list[bool], *arguments: Any) -> list[Tensor]:
        with autograd_inside():
            given, wanted = as_leaves(arguments, needs)
            outputs = eager(*given)
            used = [(o, g) for o, g in zip(outputs, upstream, strict=True) if o.requires_grad]
            made, by = zip(*used, strict=True)
            gradients = torch.autograd.grad(made, wanted, by, materialize_grads=True)
        return [g.contiguous() for g in gradients]

    def backward_fake(upstream: list[Tensor], needs: list[bool], *arguments: Any) -> list[Tensor]:
        return [x.new_empty(x.shape) for x, n in zip(arguments, needs, strict=False) if n]

    op = torch.library.custom_op(
        f"meal_fast::{name}", body, mutates_args=(), schema=f"({schema}) -> ({results})"
    )
    op.register_fake(fake)
    backward_op = torch.library.custom_op(
        f"meal_fast::{name}_backward",
        backward_body,
        mutates_args=(),
        schema=f"(Tensor[] upstream, bool[] needs, {schema}) -> Tensor[]",
    )
    backward_op.register_fake(backward_fake)

    def setup_context(ctx: Any, inputs: Arguments, output: Any) -> None:
        ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
        ctx.others = [None if isinstance(x, Tensor) else (x,) for x in inputs]

    def backward(ctx: Any, *upstream: Tensor) -> Arguments:
        tensors = iter(ctx.saved_tensors)
        arguments = [next(tensors) if x is None else x[0] for x in ctx.others]
        needs = list(ctx.needs_input_grad[:leading])
        made = iter(backward_op(list(upstream), needs, *arguments))
        return *(next(made) if n else None for n in needs), *[None] * (len(arguments) - leading)

    op.register_autograd(backward, setup_context=setup_context)


def register_loss(name: str, schema: str, leading: int, eager: Callable[..., Any]) -> None:
    """`eager(*arguments)` → (loss, metrics), differentiable in its first `leading` arguments.

    The op takes one argument more, `needs`: which of these get a gradient. It gives the loss, how
    many tokens, the other metrics in the order of reference.FIGURES (0 where there is none), and a
    gradient for each of the leading arguments: empty where it is not needed.
    """
    results = ", ".join(["Tensor"] * (3 + leading))

    def body(*arguments_and_needs: Any) -> tuple[Tensor, ...]:
        *arguments, needs = arguments_and_needs
        with autograd_inside():
            given, wanted = as_leaves(tuple(arguments), needs)
            loss, metrics = eager(*given)
            made = iter(torch.autograd.grad(loss, wanted, materialize_grads=True) if wanted else ())
        loss = loss.detach()
        figures = [metrics.get(name, torch.zeros_like(loss)) for name in reference.FIGURES]
        gradients = (next(made).contiguous() if n else loss.new_empty(0) for n in needs)
        return loss, metrics["tokens"].clone(), torch.stack(figures), *gradients

    def fake(*arguments_and_needs: Any) -> tuple[Tensor, ...]:
        *arguments, needs = arguments_and_needs
        given = arguments[:leading]
        loss = given[0].new_empty((), dtype=reference.compute_dtype(*given))
        gradients = (
            x.new_empty(x.shape) if n else loss.new_empty(0)
            for x, n in zip(given, needs, strict=True)
        )
        tokens = loss.new_empty((), dtype=torch.int64)
        return loss, tokens, loss.new_empty(len(reference.FIGURES)), *gradients

    op = torch.library.custom_op(
        f"meal_fast::{name}",
        body,
        mutates_args=(),
        schema=f"({schema}, bool[] needs) -> ({results})",
    )
    op.register_fake(fake)

    def setup_context(ctx: Any, inputs: Arguments, output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[3:])
        ctx.needs = inputs[-1]
        ctx.constants = len(inputs) - len(ctx.needs)

    def backward(ctx: Any, upstream: Tensor, *_: Any) -> Arguments:
        gradients = (
            g * upstream.to(g.dtype) if n else None
            for g, n in zip(ctx.saved_tensors, ctx.needs, strict=True)
        )
        return *gradients, *[None] * ctx.constants

    op.register_autograd(backward, setup_context=setup_context)


# --- the ops -----------------------------------------------------------------------------------


def _group_advantages(
    rewards: Tensor,
    weights: Tensor,
    group: Tensor | None,
    offsets: Tensor | None,
    keep: Tensor | None,
    utopia: Tensor | None,
    offset: Tensor | None,
    divisor: Tensor | None,
    mu: float,
    scalarization: str,
    scale: str,
    eps: float,
    check: bool | None,
    impl: str | None,
) -> tuple[Tensor, Tensor]:
    return advantages.group_advantages(
        rewards,
        weights,
        group,
        offsets=offsets,
        keep=keep,
        utopia=utopia,
        offset=offset,
        divisor=divisor,
        mu=mu,
        scalarization=scalarization,
        scale=scale,
        eps=eps,
        check=check,
        impl=impl,
    )


def _group_advantages_fake(rewards: Tensor, weights: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    dtype = reference.compute_dtype(rewards, weights)
    score = rewards.new_empty(rewards.shape[0], dtype=dtype)
    return score, torch.empty_like(score)


register_values(
    "group_advantages",
    "Tensor rewards, Tensor weights, Tensor? group, Tensor? offsets, Tensor? keep, Tensor? utopia, "
    "Tensor? offset, Tensor? divisor, float mu, str scalarization, str scale, float eps, "
    "bool? check, str? impl",
    returns=2,
    leading=2,
    eager=_group_advantages,
    fake=_group_advantages_fake,
)


def _policy_loss_from_logp(
    logp: Tensor,
    token_kl: Tensor | None,
    advantage: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    entropy: Tensor | None,
    sequence: Tensor | None,
    mask: Tensor | None,
    importance_weight: Tensor | None,
    beta: float,
    kl: str,
    low: float,
    high: float,
    level: str,
    reduce: str,
    constant: float | None,
    count: Tensor | None,
    impl: str | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    return from_logp.policy_loss_from_logp(
        logp,
        advantage,
        old_logp=old_logp,
        ref_logp=ref_logp,
        token_kl=token_kl,
        entropy=entropy,
        sequence=sequence,
        mask=mask,
        importance_weight=importance_weight,
        beta=beta,
        kl=kl,
        clip=(low, high),
        level=level,
        reduce=reduce,
        normalizer=constant if count is None else count,
        impl=impl,
    )


register_loss(
    "policy_loss_from_logp",
    "Tensor logp, Tensor? token_kl, Tensor advantage, Tensor? old_logp, Tensor? ref_logp, "
    "Tensor? entropy, Tensor? sequence, Tensor? mask, Tensor? importance_weight, float beta, "
    "str kl, float low, float high, str level, str reduce, float? constant, Tensor? count, "
    "str? impl",
    leading=2,
    eager=_policy_loss_from_logp,
)


def _prefix_attention(
    query: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    prefix_length: Tensor,
    group: Tensor,
    order: Tensor | None,
    offset: Tensor | None,
    tail_key: Tensor,
    tail_value: Tensor,
    tail_length: Tensor,
    scale: float | None,
    impl: str | None,
) -> Tensor:
    plan: Tensor | Groups = group
    if order is not None and offset is not None:
        plan = Groups(len(offset) - 1, group, order, offset)
    with torch.no_grad():
        return prefix_attention(
            query, prefix_key, prefix_value, prefix_length, plan,
            tail_key, tail_value, tail_length, scale=scale, impl=impl,
        )  # fmt: skip


# For decoding: no gradient, and so no backward pass.
torch.library.custom_op(
    "meal_fast::prefix_attention",
    _prefix_attention,
    mutates_args=(),
    schema="(Tensor query, Tensor prefix_key, Tensor prefix_value, Tensor prefix_length, "
    "Tensor group, Tensor? order, Tensor? offset, Tensor tail_key, Tensor tail_value, "
    "Tensor tail_length, float? scale, str? impl) -> Tensor",
).register_fake(lambda query, *_: query.new_empty(query.shape))


def _sample(
    logits: Tensor,
    row: Tensor,
    position: Tensor,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    impl: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return sampling.sample(
        logits,
        seed=seed,
        row=row,
        position=position,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        impl=impl,
    )


def _sample_fake(logits: Tensor, row: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    r, dtype = row.shape[0], reference.compute_dtype(logits)
    token = logits.new_empty(r, dtype=torch.int64)
    return token, logits.new_empty(r, dtype=dtype), logits.new_empty(r, dtype=dtype)


torch.library.custom_op(
    "meal_fast::sample",
    _sample,
    mutates_args=(),
    schema="(Tensor logits, Tensor row, Tensor position, int seed, float temperature, int top_k, "
    "float top_p, float min_p, str? impl) -> (Tensor, Tensor, Tensor)",
).register_fake(_sample_fake)
