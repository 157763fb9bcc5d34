"""The ops inside other trainers: `trl`, `verl`, `openrlhf`, one module each, a few lines an entry.

Importing a module here needs torch alone; its framework is imported when an entry is used, and a
ValueError says so where it is missing.

Every trainer has the same two gaps: it knows one scalar reward a response, and it has no place for
the preference that the response was asked for. `preference_score` closes both at the one point
that all of them share, the reward function: scalarise there, row by row, and any estimator that
normalises in the group does the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from meal_fast.ops import group_advantages

__all__ = ["framework", "preference_score"]


def preference_score(
    rewards: Tensor | Sequence[Sequence[float]],
    preference: Tensor | Sequence[Sequence[float]] | Sequence[float],
    *,
    utopia: Tensor | Sequence[float] | None,
    mu: float = 0.1,
    scalarization: str = "smooth-tchebycheff",
    offset: Tensor | Sequence[float] | None = None,
    divisor: Tensor | Sequence[float] | None = None,
) -> Tensor:
    """Reward vectors (R, K) and preferences (R, K) or (K,) → scores (R,), higher is better.

    S = -μ log Σ_k exp(w_k (z*_k - r̃_k) / μ) [P], or the other scalarisations of
    `ops.group_advantages`, which documents the arguments and their errors.
    """
    r = torch.as_tensor(rewards)
    w = torch.as_tensor(preference, device=r.device)
    score, _ = group_advantages(
        r.to(torch.promote_types(r.dtype, torch.float32)),
        w.to(torch.promote_types(w.dtype, torch.float32)),
        torch.arange(len(r), device=r.device),
        utopia=utopia,
        mu=mu,
        scalarization=scalarization,
        offset=offset,
        divisor=divisor,
    )
    return score


def framework(module: str, requirement: str) -> Any:
    """Import a framework's module when an entry needs it; raise ValueError where it cannot be."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(f"{module}: {error}; this entry needs {requirement}") from error
