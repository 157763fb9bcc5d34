"""Learners: (policy, rollout, scores) -> gradients and metrics."""

from .dpo import dpo
from .grpo import grpo
from .parm import parm
from .sft import sft

__all__ = ["dpo", "grpo", "parm", "sft"]
