"""A copy of a policy's weights to sample from, whose tensors stay where they are.

What is captured as a CUDA graph reads its weights by their addresses. So the copy is made once, and
what training changes is written into it in place, before a rollout. In float32 LoRA's factors are
multiplied out and added to the frozen weight. In half precision they stay apart, rounded as the
learner rounds them: added to weights of 8 bits, most of what an update changes would be rounded
away, and the sampler would go on answering as the base model does. Frozen parameters are the
model's own, not copied, where they stand alone. A Llama-like model's body is `decoder.Decoder`; of
any other the copy has transformers' modules.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .decoder import Decoder, Product, agree, base_of, llama_like
from .network import Network, cut


class Served:
    """The copy: `network`, whose tensors are written anew by `write`.

    `network` is None for a model that is not Llama-like and whose factors would stay apart: what
    there is to sample from is the model itself.
    """

    def __init__(self, model: Any) -> None:
        """Of `model`, a causal LM, perhaps with LoRA layers in it."""
        self._parts: list[
            tuple[Tensor, Callable[[], Tensor]]
        ] = []  # where it goes, what goes there
        self._single: dict[int, Tensor] = {}  # tied weights stay tied
        adapted = [m for m in model.modules() if _adapted(m)]
        self.rank = max((len(_a(m)) for m in adapted), default=0)  # it has room for
        head = cut(model)
        self.apart = bool(adapted) and head.weight.dtype not in (torch.float32, torch.float64)
        body: nn.Module | None = None
        if llama_like(head.body):
            body = Decoder(head.body, self._own, self._joined)
            self.write()
            if not agree(body, head.body):
                body = None
        self.network: Network | None = None
        if body is not None:
            bias = None if head.bias is None else self._own([head.bias])
            self.network = Network(body, self._own([head.weight]), bias, head.softcap)
        else:
            self._parts.clear()
            self._single.clear()
            if not self.apart:
                self.network = cut(self._plain(model))
        self.write()

    @torch.no_grad()
    def write(self) -> None:
        """Put the policy's weights, as they are now, into the copy.

        LoRA's factors may be of a smaller rank than when it was made.
        """
        for to, now in self._parts:
            value = now()
            rows, columns = value.shape[0], value.shape[-1]
            if to.shape != value.shape:
                to.zero_()
                to = to[:rows, :columns]
            to.copy_(value)

    def _own(self, sources: Sequence[Tensor]) -> Tensor:
        """The sources one below the other, and written with the others from now on.

        One frozen tensor is given back as it is.
        """
        first = sources[0]
        if len(sources) == 1:
            if not first.requires_grad:
                return first.detach()
            if id(first) in self._single:
                return self._single[id(first)]
        whole = _below([tuple(source.shape) for source in sources], first)
        if len(sources) == 1:
            self._single[id(first)] = whole
        parts = whole.split([len(source) for source in sources])
        for part, source in zip(parts, sources, strict=True):
            if source.requires_grad:
                self._parts.append((part, partial(_itself, source)))
            else:
                part.copy_(source.detach())  # once: it stays as it is
        return whole

    def _joined(self, layers: list[Any]) -> Product:
        """Linear layers that read the same, as one."""
        bases = [base_of(layer) for layer in layers]
        biases = [base.bias for base in bases]
        bias = None if biases[0] is None else self._own(biases)
        if not any(map(_adapted, layers)):
            return Product(self._own([base.weight for base in bases]), bias)
        if self.apart:
            weight = self._own([base.weight for base in bases])
            return Product(weight, bias, self._low_rank(layers, weight))
        whole = _below([tuple(base.weight.shape) for base in bases], bases[0].weight)
        for part, layer in zip(whole.split([len(b.weight) for b in bases]), layers, strict=True):
            self._parts.append((part, partial(_whole, layer)))
        return Product(whole, bias)

    def _low_rank(self, layers: list[Any], weight: Tensor) -> tuple[Tensor, Tensor]:
        """A, one layer's below the other's; and B, a block of it for each layer."""
        with_factors = [(n, layer) for n, layer in enumerate(layers) if _adapted(layer)]
        r = self.rank
        a = weight.new_zeros(r * len(with_factors), weight.shape[1])
        b = weight.new_zeros(weight.shape[0], len(a))
        rows_of = b.split([len(base_of(layer).weight) for layer in layers])
        for k, (n, layer) in enumerate(with_factors):
            block = slice(k * r, (k + 1) * r)
            self._parts.append((a[block], partial(_a, layer)))
            self._parts.append((rows_of[n][:, block], partial(_b, layer)))
        return a, b

    def _plain(self, model: Any) -> Any:
        """A copy of transformers' modules, layers with adapters made plain."""
        layers = {n: m for n, m in model.named_modules() if _adapted(m)}
        merged = {id(m.base_layer.weight) for m in layers.values()}
        shared = {
            id(p): p for p in model.parameters() if not p.requires_grad and id(p) not in merged
        }
        twin = copy.deepcopy(model, shared)
        for name, layer in layers.items():
            parent, _, child = name.rpartition(".")
            plain = twin.get_submodule(name).base_layer
            setattr(twin.get_submodule(parent), child, plain)
            self._parts.append((plain.weight.data, partial(_whole, layer)))
        mine = dict(twin.named_parameters())
        self._parts += [
            (mine[name].data, partial(_itself, p))
            for name, p in model.named_parameters()
            if p.requires_grad and ".lora_" not in name
        ]
        return twin.requires_grad_(False).eval()


def _adapted(layer: Any) -> bool:
    return hasattr(layer, "get_delta_weight")


def _itself(parameter: Tensor) -> Tensor:
    return parameter


def _a(layer: Any) -> Tensor:
    """LoRA's A (r, K), times its scale."""
    scaled: Tensor = layer.scaling["default"] * layer.lora_A["default"].weight
    return scaled


def _b(layer: Any) -> Tensor:
    """LoRA's B (N, r)."""
    weight: Tensor = layer.lora_B["default"].weight
    return weight


def _whole(layer: Any) -> Tensor:
    """A layer's weight with its factors multiplied out, in float32."""
    whole: Tensor = layer.base_layer.weight.float() + layer.get_delta_weight("default")
    return whole


def _below(shapes: list[tuple[int, ...]], like: Tensor) -> Tensor:
    """An empty tensor for weights of these shapes, one below the other."""
    size = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    return torch.empty(size, dtype=like.dtype, device=like.device)
