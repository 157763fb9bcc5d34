"""Rollouts: sampled responses of the policy, every prefix computed once."""

from .backends import backend, capable, open_backend, rollout
from .engine import Engine, Row, engine
from .protocol import Backend, Capability
from .rejection_sampler import Kept, rejection_sample
from .sequence import Delta, Request, Sampling
from .service import Service

__all__ = [
    "Backend",
    "Capability",
    "Delta",
    "Engine",
    "Kept",
    "Request",
    "Row",
    "Sampling",
    "Service",
    "backend",
    "capable",
    "engine",
    "open_backend",
    "rejection_sample",
    "rollout",
]
