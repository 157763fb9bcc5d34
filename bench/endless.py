"""A policy that no token stops: every side of a comparison then does the same work."""

from meal_fast.models.policy import Policy


def endless(policy: Policy) -> Policy:
    """Take the tokens that end a response from `policy`, which is given back."""
    kind = type(policy)
    policy.__class__ = type("Endless", (kind,), {"stop_ids": frozenset()})
    return policy
