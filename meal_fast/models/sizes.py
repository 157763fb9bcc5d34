"""How much goes at once: on a CPU what its caches like, on a GPU what its memory has room for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .network import Network


@dataclass(frozen=True)
class Sizes:
    """None of them changes what is computed, up to the order in which numbers are summed."""

    slots: int  # rows that are decoded at a time
    pass_tokens: int  # padded tokens of a pass over prompts or suffixes
    micro_tokens: int  # of a pass forward and back: what `grpo.micro_tokens` should be


ON_A_CPU = Sizes(slots=64, pass_tokens=4096, micro_tokens=1024)
_MOST = Sizes(slots=512, pass_tokens=16384, micro_tokens=16384)  # beyond, a GPU gains little
_SHARE = 16  # of the free memory: for a step's logits, and for a pass without gradients
_LEARNERS = 4  # the same for what a pass keeps for its gradient


def sizes_of(network: Network) -> Sizes:
    """Choose the sizes for a network on its device, by the memory that is free there now."""
    device = network.weight.device
    if device.type != "cuda":
        return ON_A_CPU
    config = network.body.config.get_text_config()  # type: ignore[operator, union-attr]
    free, bytes_each = free_bytes(device), network.weight.element_size()
    width = network.weight.shape[1]
    inner = getattr(config, "intermediate_size", None) or 4 * width
    # A row's logits and what sampling makes of them are float32.
    slots = free // _SHARE // (12 * len(network.weight))
    # What a layer holds at a time of a token, and what all layers keep of it: about so many of
    # its hidden and inner states.
    once = bytes_each * (8 * width + 4 * inner)
    kept = bytes_each * (16 * width + 6 * inner) * config.num_hidden_layers
    return Sizes(
        slots=_within(slots, 16, _MOST.slots),
        pass_tokens=_within(free // _SHARE // once, 1024, _MOST.pass_tokens),
        micro_tokens=_within(free // _LEARNERS // kept, 256, _MOST.micro_tokens),
    )


def free_bytes(device: torch.device) -> int:
    """Count what is free of a GPU's memory: what nobody has, and what torch holds unused."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def _within(n: int, least: int, most: int) -> int:
    """The largest power of two of at most n, between the two."""
    return min(max(1 << max(n.bit_length() - 1, 0), least), most)
