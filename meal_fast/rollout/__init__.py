"""Rollouts: sampled responses of the policy, every prefix computed once."""

from .backends import backend
from .engine import Engine, Row, engine, rollout
from .requests import Request, Sampling

__all__ = ["Engine", "Request", "Row", "Sampling", "backend", "engine", "rollout"]
