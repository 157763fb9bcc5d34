"""Rollouts: sampled responses of the policy, every prefix computed once."""

from .engine import Engine, Request, Row, Sampling, engine, rollout

__all__ = ["Engine", "Request", "Row", "Sampling", "engine", "rollout"]
