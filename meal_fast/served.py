"""A copy of a policy's weights to sample from, whose tensors stay where they are.

What is captured as a CUDA graph reads its weights by their addresses. So the copy is made once, and
what training changes is written into it in place, before a rollout: trained parameters as they are,
LoRA's factors multiplied out in float32, added to the frozen weight, and rounded once to its dtype.
Frozen parameters are the model's own, not copied. A Llama-like model's body is `decoder.Decoder`;
of any other the copy has transformers' modules.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .decoder import Decoder, agree, llama_like
from .network import Network, cut

Source = Any  # a tensor, or a layer with adapters


class Served:
    """The copy: `network`, whose tensors are written anew by `write`."""

    def __init__(self, model: Any) -> None:
        """Of `model`, a causal LM, perhaps with LoRA layers in it."""
        self._parts: list[tuple[Tensor, Source]] = []  # where it goes, what it comes from
        self._single: dict[int, Tensor] = {}  # tied weights stay tied
        head = cut(model)
        body: nn.Module | None = None
        if llama_like(head.body):
            body = Decoder(head.body, self._own)
            self.write()
            if not agree(body, head.body):
                body = None
        if body is None:
            self._parts.clear()
            self._single.clear()
            self.network = cut(self._plain(model))
        else:
            bias = None if head.bias is None else self._own([head.bias])
            weight = self._own([head.weight])
            self.network = Network(body, weight, bias, head.softcap)
        self.write()

    @torch.no_grad()
    def write(self) -> None:
        """Puts the policy's weights, as they are now, into the copy."""
        for to, source in self._parts:
            if isinstance(source, Tensor):
                to.copy_(source)
            else:
                to.copy_(source.base_layer.weight.float() + source.get_delta_weight("default"))

    def _own(self, sources: list[Source]) -> Tensor:
        """The sources' weights one below the other, and written with the others from now on.

        One frozen tensor is given back as it is.
        """
        weights = [s if isinstance(s, Tensor) else s.base_layer.weight for s in sources]
        first = weights[0]
        if len(sources) == 1:
            if first is sources[0] and not first.requires_grad:
                return first.detach()
            if id(first) in self._single:
                return self._single[id(first)]
        size = (sum(len(w) for w in weights), *first.shape[1:])
        whole = torch.empty(size, dtype=first.dtype, device=first.device)
        if len(sources) == 1:
            self._single[id(first)] = whole
        parts = whole.split([len(w) for w in weights])
        for part, source, weight in zip(parts, sources, weights, strict=True):
            if weight is source and not weight.requires_grad:
                part.copy_(weight.detach())  # once: it stays as it is
            else:
                self._parts.append((part, source))
        return whole

    def _plain(self, model: Any) -> Any:
        """A copy of transformers' modules, layers with adapters made plain."""
        layers = {n: m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
        merged = {id(m.base_layer.weight) for m in layers.values()}
        shared = {
            id(p): p for p in model.parameters() if not p.requires_grad and id(p) not in merged
        }
        twin = copy.deepcopy(model, shared)
        for name, layer in layers.items():
            parent, _, child = name.rpartition(".")
            plain = twin.get_submodule(name).base_layer
            setattr(twin.get_submodule(parent), child, plain)
            self._parts.append((plain.weight.data, layer))
        mine = dict(twin.named_parameters())
        self._parts += [
            (mine[name].data, p)
            for name, p in model.named_parameters()
            if p.requires_grad and ".lora_" not in name
        ]
        return twin.requires_grad_(False).eval()
