"""The public ops: checks, choice of an implementation, one function an op. Needs torch alone.

    R  rows (responses)    K  objectives    N  tokens    B, T  rows and padded length
    D  hidden width        V  vocabulary

Every op takes `impl=None | "torch" | "triton" | "cuda"`. None takes the best that exists for the
device; a name that cannot be met is a ValueError, and nothing falls back in silence. Results are
float32, or float64 when a floating point input is float64. Where values (not shapes) are bad, the
CPU raises; on a GPU, where looking would stall the queue, the row gives NaN and never a bad access.
"""

from .advantages import group_advantages
from .logprob import linear_logprob, linear_logprob_kl
from .policy_loss import linear_policy_loss, policy_loss, policy_loss_from_logp
from .prefix_attention import Groups, prefix_attention
from .sampling import sample

__all__ = [
    "Groups",
    "group_advantages",
    "linear_logprob",
    "linear_logprob_kl",
    "linear_policy_loss",
    "policy_loss",
    "policy_loss_from_logp",
    "prefix_attention",
    "sample",
]
