"""The ops with a head in them, as autograd functions over `vocab_sweep`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import fused
from . import vocab_sweep_triton as in_triton
from .fused import Given
from .reference import LossOptions, Tokens, loss_and_metrics, loss_terms, weighted_loss
from .vocab_sweep import (
    Derivatives,
    LinearSource,
    LogitsSource,
    Readout,
    Source,
    Stats,
    chosen,
    sweep,
)

Metrics = dict[str, Tensor]
Pass = TypeVar("Pass", bound=Callable[..., Any])


def in_own_dtype(forward: Pass) -> Pass:
    """Run a pass outside autocast: the dtypes of the inputs decide, as documented."""

    @functools.wraps(forward)
    def run(ctx: Any, *arguments: Any) -> Any:
        tensor = next((x for x in arguments if isinstance(x, Tensor)), None)
        if tensor is None or not torch.is_autocast_enabled(tensor.device.type):
            return forward(ctx, *arguments)
        with torch.autocast(tensor.device.type, enabled=False):
            return forward(ctx, *arguments)

    return cast(Pass, run)


@dataclass(frozen=True)
class LinearPlan:
    """Hold the constant arguments of a linear op."""

    target: Tensor
    readout: Readout
    dtype: torch.dtype
    max_bytes: int | None
    reference: LinearSource | None
    impl: str
    fused: bool = False  # the product too, on the way forward


class LinearLogprob(torch.autograd.Function):
    """Turn (hidden, weight, bias) into (logp, entropy, ref_logp, kl); back, logits again.

    Without a reference the last two are empty.
    """

    @staticmethod
    @in_own_dtype
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: LinearPlan
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        source = LinearSource(hidden, weight, bias, plan.readout, plan.dtype)
        exact = plan.reference is not None
        run: Callable[..., Stats] = sweep if plan.impl == "torch" else in_triton.sweep
        if plan.fused:
            s = _fused(hidden, weight, bias, plan)
        else:
            s = run(source, plan.target, plan.reference, exact_kl=exact, max_bytes=plan.max_bytes)
        none = s.logp.new_empty(0)
        logp, entropy, ref_logp, kl = (
            # What is kept for the gradient must not change when a caller changes a result.
            none if x is None else x if s.kept is None else x.clone()
            for x in (s.logp, s.entropy, s.ref_logp, s.kl)
        )
        ctx.save_for_backward(hidden, weight, bias, s.kept)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(ref_logp)
        return logp, entropy, ref_logp, kl

    @staticmethod
    @once_differentiable
    @in_own_dtype
    def backward(
        ctx: Any, g_logp: Tensor | None, g_entropy: Tensor | None, _: None, g_kl: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, kept = ctx.saved_tensors
        plan: LinearPlan = ctx.plan
        needs = ctx.needs_input_grad[:3]
        source = LinearSource(hidden, weight, bias, plan.readout, plan.dtype, needs)
        reference = None if g_kl is None else plan.reference
        gradient = chosen((g_logp, g_entropy, None if reference is None else g_kl))
        exact = reference is not None
        options: dict[str, Any] = {"gradient": gradient, "max_bytes": plan.max_bytes}
        if plan.impl == "torch":
            sweep(source, plan.target, reference, exact_kl=exact, **options)
        else:
            known = None if kept is None else in_triton.restore(kept, exact, exact)
            in_triton.sweep(source, plan.target, reference, exact_kl=exact, known=known, **options)
        return *_as_inputs(source, hidden, weight, bias), None


def _fused(hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: LinearPlan) -> Stats:
    from meal_fast.kernels.linear_logprob import linear_logprob_forward

    logp, entropy = linear_logprob_forward(
        hidden.detach(),
        weight.detach(),
        plan.target,
        temperature=plan.readout.temperature,
        softcap=plan.readout.softcap,
        bias=bias,
    )
    return Stats(logp, entropy, None, None)


def _as_inputs(
    source: LinearSource, hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients in the inputs' dtypes."""

    def cast(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
        return None if gradient is None or like is None else gradient.to(like.dtype)

    return (
        cast(source.grad_hidden, hidden),
        cast(source.grad_weight, weight),
        cast(source.grad_bias, bias),
    )


def derivatives(stats: Stats, tokens: Tokens, options: LossOptions) -> Derivatives:
    """Differentiate the loss with respect to each token's logp, entropy and KL."""
    with torch.enable_grad():
        logp = stats.logp.detach().requires_grad_()
        kl = None if stats.kl is None else stats.kl.detach().requires_grad_()
        tokens = tokens.with_reference(stats.ref_logp)
        loss = weighted_loss(loss_terms(logp, kl, tokens, options), tokens, options)
    inputs = [logp] if kl is None else [logp, kl]
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return grads[0], None, grads[1] if kl is not None else None


def swept_loss(
    source: Source,
    reference: Source | None,
    target: Tensor,
    tokens: Tokens,
    options: LossOptions,
    max_bytes: int | None,
    backward: bool,
) -> tuple[Tensor, Metrics]:
    """`fused.loss` in torch: of the active rows of a source."""
    exact = options.kl == "exact" and reference is not None
    run: Callable[..., Stats] = functools.partial(sweep, exact_kl=exact, max_bytes=max_bytes)

    def in_sweep(rows: slice, stats: Stats) -> Derivatives:
        return derivatives(stats, tokens.take(rows), options)

    gradient: Callable[[slice, Stats], Derivatives] | None = in_sweep if backward else None
    if backward and options.level == "sequence":
        gradient = chosen(derivatives(run(source, target, reference), tokens, options))
    stats = run(source, target, reference, gradient=gradient)
    tokens = tokens.with_reference(stats.ref_logp)
    return loss_and_metrics(stats.logp, stats.kl, stats.entropy, tokens, options)


@dataclass(frozen=True)
class LossPlan:
    """Hold the constant arguments of a fused loss."""

    target: Tensor
    tokens: Tokens | Given  # Given: it runs in Triton
    options: LossOptions
    readout: Readout
    dtype: torch.dtype
    max_bytes: int | None
    differentiate: bool
    ref_head: tuple[Tensor, Tensor, Tensor | None] | None = None  # hidden, weight, bias
    ref_logits: Tensor | None = None


def loss_of(
    source: Source,
    reference: Source | None,
    target: Tensor,
    tokens: Tokens | Given,
    plan: LossPlan,
    backward: bool,
) -> tuple[Tensor, Metrics]:
    """Give the loss of a source, which collects its gradients when `backward`."""
    run: Callable[..., tuple[Tensor, Metrics]] = swept_loss
    if isinstance(tokens, Given):
        run = fused.loss
    return run(source, reference, target, tokens, plan.options, plan.max_bytes, backward)


class LinearPolicyLoss(torch.autograd.Function):
    """Turn (hidden, weight, bias) into a loss and make the gradients too: three products, not four.

    `metrics` is filled in place: an autograd function returns tensors only.
    """

    @staticmethod
    @in_own_dtype
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        plan: LossPlan,
        metrics: Metrics,
    ) -> Tensor:
        a, b, c = (n and plan.differentiate for n in ctx.needs_input_grad[:3])
        tokens, rows = plan.tokens, None
        if isinstance(tokens, Given):  # whose kernels read no inactive row; a product with it does
            rows_in = torch.where(tokens.active[:, None], hidden, 0) if b else hidden
        else:
            rows = active_rows(tokens)
            rows_in = select(hidden, tokens, rows)
            tokens = tokens if rows is None else tokens.take(rows)
        source = LinearSource(rows_in, weight, bias, plan.readout, plan.dtype, (a, b, c))
        reference = None
        if plan.ref_head is not None:
            ref_hidden, ref_weight, ref_bias = plan.ref_head
            if isinstance(tokens, Tokens):
                ref_hidden = select(ref_hidden, plan.tokens, rows)
            reference = LinearSource(ref_hidden, ref_weight, ref_bias, plan.readout, plan.dtype)
        target, backward = take(plan.target, rows), a or b or c
        loss, made = loss_of(source, reference, target, tokens, plan, backward)
        metrics.update(made)
        g_hidden, g_weight, g_bias = _as_inputs(source, hidden, weight, bias)
        if g_hidden is not None and rows is not None:
            g_hidden = torch.zeros_like(hidden).index_copy_(0, rows, g_hidden)
        ctx.save_for_backward(g_hidden, g_weight, g_bias)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled(ctx.saved_tensors, upstream), None, None


class LogitsPolicyLoss(torch.autograd.Function):
    """Turn logits into a loss and make their gradient on the way, in a tensor of its own."""

    @staticmethod
    @in_own_dtype
    def forward(ctx: Any, logits: Tensor, plan: LossPlan, metrics: Metrics) -> Tensor:
        needs = ctx.needs_input_grad[0] and plan.differentiate
        assert isinstance(plan.tokens, Tokens)
        rows = active_rows(plan.tokens)
        source = LogitsSource(select(logits, plan.tokens, rows), plan.readout, plan.dtype, needs)
        reference = None
        if plan.ref_logits is not None:
            ref_chosen = select(plan.ref_logits, plan.tokens, rows)
            reference = LogitsSource(ref_chosen, plan.readout, plan.dtype, False)
        tokens = plan.tokens if rows is None else plan.tokens.take(rows)
        loss, made = loss_of(source, reference, take(plan.target, rows), tokens, plan, needs)
        metrics.update(made)
        gradient = source.grad_logits
        if gradient is not None and rows is not None:
            gradient = torch.zeros_like(logits).index_copy_(0, rows, gradient)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *scaled(ctx.saved_tensors, upstream), None, None


class LogitsPolicyLossLater(torch.autograd.Function):
    """Turn logits into a loss in Triton: one read; going back is one read and one write.

    So the upstream gradient scales N numbers, not (N, V); finding out on a GPU whether it is 1
    would wait for the device.
    """

    @staticmethod
    @in_own_dtype
    def forward(ctx: Any, logits: Tensor, plan: LossPlan, metrics: Metrics) -> Tensor:
        given, options = plan.tokens, plan.options
        assert isinstance(given, Given)
        source, reference = _logits_sources(logits, plan.ref_logits, plan, False)
        exact = options.kl == "exact" and reference is not None
        needs = ctx.needs_input_grad[0] and plan.differentiate
        stats = in_triton.sweep(source, plan.target, reference, exact_kl=exact, active=given.active)
        pieces = fused.Pieces(given, options, source.rows, needs)
        g_logp, _, g_kl = pieces.derivatives(slice(0, source.rows), stats)
        loss, made = pieces.loss(reference is not None or given.ref_logp is not None)
        metrics.update(made)
        if needs:
            ref_logits = plan.ref_logits if exact else None
            ctx.save_for_backward(logits, ref_logits, stats.kept, g_logp, g_kl)
            ctx.plan = replace(plan, ref_logits=None)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, ref_logits, kept, *coefficients = ctx.saved_tensors
        plan: LossPlan = ctx.plan
        source, reference = _logits_sources(logits, ref_logits, plan, True)
        exact = reference is not None
        g_logp, g_kl = (None if g is None else g * upstream for g in coefficients)
        in_triton.sweep(
            source,
            plan.target,
            reference,
            exact_kl=exact,
            gradient=chosen((g_logp, None, g_kl)),
            active=plan.tokens.active,
            known=in_triton.restore(kept, exact, exact),
        )
        return source.grad_logits, None, None


def _logits_sources(
    logits: Tensor, ref_logits: Tensor | None, plan: LossPlan, needs: bool
) -> tuple[LogitsSource, LogitsSource | None]:
    source = LogitsSource(logits, plan.readout, plan.dtype, needs)
    if ref_logits is None:
        return source, None
    return source, LogitsSource(ref_logits, plan.readout, plan.dtype, False)


def active_rows(tokens: Tokens) -> Tensor | None:
    """Find rows that can move the loss, where leaving out the others needs no synchronisation."""
    if tokens.active.device.type != "cpu" or bool(tokens.active.all()):
        return None
    return tokens.active.nonzero().squeeze(1)


def take(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor[rows]


def select(tensor: Tensor, tokens: Tokens | Given, rows: Tensor | None) -> Tensor:
    """Take the rows; where all stay, put zeros in place of inactive ones, which may hold NaN."""
    if rows is not None:
        return tensor.detach()[rows]
    if tensor.device.type == "cpu":
        return tensor.detach()
    return torch.where(tokens.active[:, None], tensor.detach(), 0)


def scaled(gradients: tuple[Tensor | None, ...], upstream: Tensor) -> list[Tensor | None]:
    """Multiply the gradients by the upstream one; not in place, for they may be asked for again."""
    if upstream.device.type == "cpu" and float(upstream) == 1.0:
        return list(gradients)
    return [None if g is None else g * upstream.to(g.dtype) for g in gradients]
