"""Rollouts: sampled responses of the policy, every prefix computed once."""

from .engine import Request, rollout

__all__ = ["Request", "rollout"]
