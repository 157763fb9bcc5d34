"""The policy loss on Triton's path: three kernels a chunk of tokens, and one at the end.

Of each chunk the product with the head makes a tile of logits; one kernel takes the statistics of
its rows, one the loss's terms with their derivatives by logp and KL, one turns the tile into its
gradient. `reference` is the same loss in torch, some sixty small operations a chunk; nothing here
waits for the device. `PolicyLossFromLogp` is one kernel and that at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from . import vocab_sweep_triton as in_triton
from .reference import LossOptions
from .vocab_sweep import Derivatives, Source, Stats, chosen

Metrics = dict[str, Tensor]
LOWEST = torch.finfo(torch.float32).min / 4  # as in `reference.loss_terms`


@dataclass(frozen=True)
class Given:
    """What the loss knows of N tokens beforehand, flat and contiguous: as `reference.Tokens`, but
    as few operations as it takes."""

    advantage: Tensor
    active: Tensor  # bool
    coefficient: Tensor | None  # float32; None is 1
    total: Tensor | float
    old_logp: Tensor | None
    ref_logp: Tensor | None
    importance_weight: Tensor | None
    sequence: Tensor | None  # dense ids, where the ratio is a sequence's

    @staticmethod
    def of(
        live: Tensor,  # (N,) bool, like all that follow
        advantage: Tensor,
        sequence: Tensor | None,
        options: LossOptions,
        old_logp: Tensor | None,
        ref_logp: Tensor | None,
        importance_weight: Tensor | None,
    ) -> Given:
        normalizer = options.normalizer
        coefficient, total = None, normalizer
        if options.reduce == "grpo":
            assert sequence is not None
            coefficient, sequences = by_length(live, sequence)
            total = sequences if normalizer is None else normalizer
        elif normalizer is None:
            total = live.sum()
        if normalizer is None:
            assert isinstance(total, Tensor)
            total = total.clamp(min=1)
        active = live
        index = None
        if options.level == "sequence":
            assert sequence is not None
            index = reference.dense_ids(sequence)
        if options.beta == 0:
            active = live & (advantage != 0)
            if index is not None:  # the sequence's ratio needs all of its tokens, or none
                active = live & (reference.segment_sum(active.float(), index) > 0)[index]

        def constant(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.detach().contiguous()

        assert total is not None
        return Given(
            advantage.detach().contiguous(),
            active,
            coefficient,
            total.detach() if isinstance(total, Tensor) else float(total),
            constant(old_logp),
            constant(ref_logp),
            constant(importance_weight),
            index,
        )

    def take(self, rows: slice) -> Given:
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "total"}
        return replace(self, **{k: v[rows] for k, v in values.items() if v is not None})

    def plan(self, options: LossOptions, stats: Stats) -> Any:
        """Give the loss kernel's constants for these tokens, whose stats are known."""
        from meal_fast.kernels import policy_loss as kernels

        return kernels.Plan(
            options,
            self.advantage,
            1,
            self.old_logp,
            self.ref_logp if stats.ref_logp is None else stats.ref_logp,
            stats.entropy,
            self.importance_weight,
            self.active,
            self.coefficient,
            self.total,
            differentiate=True,
            all_active=True,  # of those that are
        )


def of_sequences(
    logp: Tensor, sequence: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Give `by_length` of (N,), or of (B, T), where a row is a sequence."""
    live = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask.bool()
    if sequence is None:
        length = live.sum(1, keepdim=True)
        return (1 / length.clamp(min=1)).expand(logp.shape).reshape(-1), (length > 0).sum()
    return by_length(live.reshape(-1), sequence.reshape(-1))


def by_length(live: Tensor, sequence: Tensor) -> tuple[Tensor, Tensor]:
    """Give 1 / the live length of each token's sequence (N,), and how many sequences have one."""
    index = reference.dense_ids(sequence)
    length = reference.segment_sum(live.float(), index)
    return (1 / length.clamp(min=1))[index], (length > 0).sum()


def loss(
    source: Source,
    ref_source: Source | None,
    target: Tensor,
    given: Given,
    options: LossOptions,
    max_bytes: int | None,
    backward: bool,
) -> tuple[Tensor, Metrics]:
    """Give the loss of a source, which collects its gradients when `backward`.

    A token's derivative needs its own log-probability alone, so it is taken in the sweep; the ratio
    of a sequence needs all of its tokens, so `level="sequence"` sweeps twice.
    """
    exact = options.kl == "exact" and ref_source is not None
    run: Callable[..., Stats] = functools.partial(
        in_triton.sweep, exact_kl=exact, max_bytes=max_bytes, active=given.active
    )
    has_kl = ref_source is not None or given.ref_logp is not None
    if backward and options.level == "token":
        chunk = in_triton.chunk_of(source, exact, True, max_bytes)
        pieces = Pieces(given, options, chunk, True)
        run(source, target, ref_source, gradient=pieces.derivatives)
    else:
        stats = run(source, target, ref_source)
        pieces = Pieces(given, options, source.rows, backward)
        made = pieces.derivatives(slice(0, source.rows), stats)
        if backward:
            run(source, target, ref_source, gradient=chosen(made), known=stats)
    return pieces.loss(has_kl)


class Pieces:
    """Sum the loss's terms, a chunk of tokens at a time."""

    def __init__(self, given: Given, options: LossOptions, chunk: int, differentiate: bool) -> None:
        from meal_fast.kernels import policy_loss as kernels

        self.given, self.options, self.differentiate = given, options, differentiate
        self._sums = kernels.Loss(given.advantage, len(given.advantage), chunk)

    def derivatives(self, rows: slice, stats: Stats) -> Derivatives:
        """Add these tokens' terms to the sums, and give their derivatives: a `Gradient`."""
        g_logp = g_kl = mean = g_mean = None
        if self.differentiate:
            g_logp = torch.empty_like(stats.logp)
            if stats.kl is not None and self.options.beta != 0:
                g_kl = torch.empty_like(stats.kl)
        if self.options.level == "sequence":
            mean = self._mean_log_ratio(stats.logp)
            g_mean = torch.empty_like(mean) if self.differentiate else None
        plan = self.given.take(rows).plan(self.options, stats)
        self._sums.piece(plan, stats.logp, stats.kl, g_logp, g_kl, mean, g_mean)
        if g_logp is not None and g_mean is not None:
            g_logp += torch.where(stats.logp >= LOWEST, self._mean(g_mean), 0)
        return g_logp, None, g_kl

    def _mean_log_ratio(self, logp: Tensor) -> Tensor:
        given = self.given
        if given.old_logp is None:
            return torch.zeros_like(logp)
        ratio = logp.clamp(min=LOWEST) - given.old_logp.float().clamp(min=LOWEST)
        return self._mean(torch.where(given.active, ratio, 0))

    def _mean(self, values: Tensor) -> Tensor:
        """Of the active tokens' values the mean over each one's sequence; the others' are 0."""
        given = self.given
        assert given.sequence is not None
        length = reference.segment_sum(given.active.to(values.dtype), given.sequence)
        total = reference.segment_sum(values, given.sequence)
        mean = (total / length.clamp(min=1))[given.sequence]
        return torch.where(given.active, mean, 0)

    def loss(self, has_kl: bool) -> tuple[Tensor, Metrics]:
        """Give loss and metrics, once all tokens' terms are there."""
        value, tokens, figures = self._sums.total(1.0)  # what the terms were divided by
        metrics = {"tokens": tokens}
        metrics |= zip(reference.FIGURES, figures[1:].unbind(), strict=True)
        if not has_kl:
            del metrics["kl"]
        return value, metrics


class PolicyLossFromLogp(torch.autograd.Function):
    """Turn (logp (N,), token_kl (N,)) into loss, active tokens, figures, and what backward needs.

    figures: 1 / total, then reference.FIGURES. The stored gradients are those of the undivided sum.
    """

    @staticmethod
    def forward(logp: Tensor, token_kl: Tensor | None, plan: Any) -> tuple[Tensor, ...]:
        from meal_fast.kernels import policy_loss as kernels

        n = logp.shape[0]
        g_logp = logp.new_empty(n if plan.differentiate else 0, dtype=torch.float32)
        g_kl = logp.new_empty(
            n if plan.differentiate and token_kl is not None else 0, dtype=torch.float32
        )
        loss = kernels.Loss(logp, n, n, undivided=True, entropy=plan.entropy is not None)
        filled = (g if g.numel() else None for g in (g_logp, g_kl))
        loss.piece(plan, logp, token_kl, *filled)
        return *loss.total(plan.normalizer), g_logp, g_kl

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor | None, Any], output: tuple[Tensor, ...]
    ) -> None:
        logp, token_kl, _ = inputs
        _, tokens, figures, g_logp, g_kl = output
        ctx.mark_non_differentiable(tokens, figures, g_logp, g_kl)
        ctx.save_for_backward(figures, g_logp, g_kl)
        ctx.dtypes = logp.dtype, None if token_kl is None else token_kl.dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        figures, g_logp, g_kl = ctx.saved_tensors
        scale = upstream * figures[0]

        def scaled(gradient: Tensor, dtype: torch.dtype) -> Tensor:
            return (gradient * scale).to(dtype)

        logp_dtype, kl_dtype = ctx.dtypes
        needs_logp, needs_kl, _ = ctx.needs_input_grad
        return (
            scaled(g_logp, logp_dtype) if needs_logp else None,
            scaled(g_kl, kl_dtype) if needs_kl else None,
            None,
        )
