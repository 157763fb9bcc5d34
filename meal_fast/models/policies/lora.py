"""A policy of which LoRA's factors are trained, on a frozen base model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meal_fast.common import opening
from meal_fast.config.config import PolicyConfig

from .. import multi_lora
from ..export import ADAPTER
from ..network import Network
from ..shards import local, part_of
from .base import Policy


class LoRAPolicy(Policy):
    """PEFT's model: a frozen base, and alpha/rank * B A added to each of its linear layers."""

    _added: Mapping[str, Tensor] | None = None  # factors that were added to the base: `rebase`

    @property
    def causal_lm(self) -> Any:
        """The base model, with the layers that hold the factors."""
        return self.model.get_base_model()

    @property
    def rank(self) -> int:  # type: ignore[override]
        """Rank of the factors."""
        return int(self.model.peft_config["default"].r)

    @property
    def rebased(self) -> bool:
        """Whether its base model is another than was loaded: `rebase`."""
        return self._added is not None

    @property
    def saved_rank(self) -> int:
        """Rank of the factors that `save_factors` writes."""
        return self.rank * (2 if self.rebased else 1)

    @contextmanager
    def reference(self) -> Iterator[Network]:
        """Give the base model: its adapters are off as long as the context lasts."""
        with self.model.disable_adapter():
            yield self.network

    @contextmanager
    def merged(self) -> Iterator[Network]:
        """Give the policy for passes without gradients; in float32 its factors multiplied out.

        That saves two of the three products of each layer. On a CPU the sums take the weights'
        place as long as it lasts. On a GPU, and in bfloat16, where the factors stay apart, there is
        a copy whose tensors stay where they are: `models.served`. Tasks' adapters (`stacked`) stay
        apart.
        """
        self._check_whole()
        layers = self._layers
        if not all(multi_lora.mergeable(m) for m in layers):
            yield self.network
            return
        if self._copied:
            yield self._written_copy()
            return
        if layers[0].base_layer.weight.dtype not in (torch.float32, torch.float64):
            yield self.network  # held in parts
            return
        kept = [m.base_layer.weight.data for m in layers]
        try:
            for m in layers:
                m.base_layer.weight.data = m.base_layer.weight + m.get_delta_weight("default")
            with self.model.disable_adapter():
                yield self.network
        finally:
            for m, weight in zip(layers, kept, strict=True):
                m.base_layer.weight.data = weight

    @contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Set the factors, all of them, by name, for as long as the context lasts.

        They may be of a multiple of the rank: alpha goes with it, so the scale stays.
        """
        lora = self.model.peft_config["default"]
        rank, alpha = lora.r, lora.lora_alpha
        try:
            with super().holding(values):
                lora.r = next(len(v) for name, v in values.items() if ".lora_A." in name)
                lora.lora_alpha = alpha * lora.r // rank
                yield
        finally:
            lora.r, lora.lora_alpha = rank, alpha

    @torch.no_grad()
    def rebase(self, values: Mapping[str, Tensor]) -> None:
        """Add these factors to the base's weights; those that are trained stay as they are."""
        self.reshard()
        with self.holding(values):
            for m in self._layers:
                weight, delta = m.base_layer.weight, m.get_delta_weight("default")
                if self.sharded is None:
                    weight.data = weight + delta
                else:
                    own = local(weight)
                    own.copy_(own + part_of(delta, weight))
        self._added = dict(values)
        self._copy = self.kept = None

    def merged_state(self) -> dict[str, Tensor]:
        """Give the base's state with alpha/rank * B A added; the model in use is not touched."""
        base, state = self.causal_lm, {}
        adapted = {
            f"{name}.base_layer.weight": module
            for name, module in base.named_modules()
            if hasattr(module, "get_delta_weight")
        }
        held = self.sharded
        for name, value in base.state_dict().items() if held is None else held.state():
            if ".lora_" in name or value is None:
                continue
            if name in adapted:
                value = value + adapted[name].get_delta_weight("default")
            state[name.replace(".base_layer.", ".")] = value if held is None else value.cpu()
        return state

    def save_factors(self, folder: Path) -> None:
        """Write the factors in `adapter/`, PEFT's own format, as ones to the base as it was loaded.

        After `rebase` they are of twice the rank: [B1 B2] [A1; A2] = B1 A1 + B2 A2.
        """
        own: dict[str, Tensor] = {name: p.detach() for name, p in self.named.items()}
        if self._added is not None:
            own = {
                name: torch.cat([self._added[name].to(p), p], 0 if ".lora_A." in name else 1)
                for name, p in own.items()
            }
        with self.holding(own):
            # "auto" would ask the hub for the base model's vocabulary.
            self.model.save_pretrained(str(folder / ADAPTER), save_embedding_layers=False)
        _forget_place(folder / ADAPTER)

    def save_added(self, folder: Path) -> None:
        """Write the factors that `rebase` added, in `adapter/`: of the rank of `save_factors`."""
        with self.holding({name: torch.zeros_like(p) for name, p in self.named.items()}):
            self.save_factors(folder)

    @property
    def _layers(self) -> list[Any]:
        return [m for m in self.model.modules() if hasattr(m, "get_delta_weight")]


def _forget_place(adapter: Path) -> None:
    """Take out what PEFT writes of where on this machine the base model lies."""
    (adapter / "README.md").unlink(missing_ok=True)
    path = adapter / "adapter_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    base = Path(values.get("base_model_name_or_path") or "")
    if base.is_absolute() or base.is_dir():
        values["base_model_name_or_path"] = base.name
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def with_lora(model: Any, config: PolicyConfig, seed: int, trained: Path | None) -> Any:
    """Put factors on the linear layers of `model`, in place: B = 0 and A drawn from `seed`, or
    those in the folder `trained`."""
    # Here, not above: whoever trains all parameters needs none of its memory.
    from peft import LoraConfig, PeftModel, get_peft_model

    model.requires_grad_(False)
    if trained is not None:
        with opening(f"{str(trained / ADAPTER)!r}", "it holds no factors of this model"):
            model = PeftModel.from_pretrained(model, trained / ADAPTER, is_trainable=True)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            settings = LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_alpha,
                target_modules="all-linear",
                task_type="CAUSAL_LM",
            )
            model = get_peft_model(model, settings)
    return multi_lora.fuse(model)
