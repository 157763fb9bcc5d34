"""Losses, one a file: (policy, rollout, scored) -> gradients and metrics.

Nothing is exported here: a function of its module's name would hide the module.
"""

__all__: list[str] = []
