"""Rollouts: sampled responses of the policy, every prefix computed once."""

from .backends import backend
from .engine import Engine, Row, engine, rollout
from .rejection_sampler import Kept, rejection_sample
from .sequence import Request, Sampling

__all__ = [
    "Engine",
    "Kept",
    "Request",
    "Row",
    "Sampling",
    "backend",
    "engine",
    "rejection_sample",
    "rollout",
]
