"""Our attention, when a model is probed: whatever it is asked for beyond what it does is refused.

A mask that a model would be given is judged as a function of two places, anywhere in its context,
so a window shows that no forward pass of a few tokens would reach.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from .shared_prefix import Pass, Refused, attention, context_of

WATCHED = "meal_fast_watched"

# What models hand to their attention function that changes nothing of causal attention.
_HARMLESS = {
    "position_ids",
    "cache_position",
    "position_embeddings",
    "past_key_values",
    "past_key_value",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "logits_to_keep",
    "return_dict",
}


def _watched(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    tree: Pass | None = None,
    **asked: Any,
) -> tuple[Tensor, None]:
    """`attention`; raises Refused for whatever that would leave out without a word."""
    if tree is None:
        raise Refused("does not hand what it is called with on to its attention")
    if attention_mask is not None:
        raise Refused("does not attend to all tokens before each, or makes a mask of its own")
    context = context_of(module.config)
    for name, said in asked.items():
        if name in _HARMLESS or said is None or (isinstance(said, float | int) and not said):
            continue  # of numbers zero: a dropout, or a flag, that is off
        if name == "is_causal" or (name == "sliding_window" and said >= context):
            continue
        raise Refused(f"asks its attention for {name}")
    if asked.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise Refused("does not attend causally")
    return attention(module, query, key, value, None, scaling, tree)


def _whole_mask(mask_function: Any, config: Any, device: Any = None, **_: Any) -> Tensor | None:
    """The mask that a model would be given: none where, at any distance within the model's context,
    it shows everything before a token and nothing after; else one that `_watched` refuses."""
    last = min(context_of(config), 1 << 24) - 1
    near = torch.arange(64, device=device).clamp(max=last)
    steps = 2 ** torch.arange(max(last, 1).bit_length(), device=device)
    far = torch.cat([last - steps, last - steps + 1, last - steps - 1]).clamp(0, last)
    at = torch.cat([near, far, torch.tensor([last], device=device)]).unique()
    zero = torch.zeros((), dtype=torch.int64, device=device)
    seen = mask_function(zero, zero, at[:, None], at[None])
    whole = torch.equal(seen.expand(len(at), len(at)), at[None] <= at[:, None])
    return None if whole else zero


AttentionInterface.register(WATCHED, _watched)
AttentionMaskInterface.register(WATCHED, _whole_mask)
