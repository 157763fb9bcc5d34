"""The policy and its frozen reference: what the other rooms import of them."""

from .loading import load_policy, resolve
from .network import Network, cut
from .policies.base import Policy
from .policies.full import FullPolicy
from .policies.lora import LoRAPolicy
from .policies.pblora import GUIDE, PBLoRAPolicy

__all__ = [
    "GUIDE",
    "FullPolicy",
    "LoRAPolicy",
    "Network",
    "PBLoRAPolicy",
    "Policy",
    "cut",
    "load_policy",
    "resolve",
]
