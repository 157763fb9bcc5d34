"""Learners: (policy, rollout, scores) -> gradients and metrics."""

from .grpo import grpo

__all__ = ["grpo"]
