"""What every policy is, whatever of it is trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .. import multi_lora
from ..export import save_policy
from ..network import Network, cut
from ..pblora import Adapter
from ..prompt_format import PromptFormat
from ..served import Served
from ..sharded import OUTSIDE, Sharded
from ..shared_prefix import context_of
from ..sizes import Sizes, sizes_of


class Policy(PromptFormat, ABC):
    """A steerable policy: `network`, its frozen `reference()`, its tokenizer and its parameters.

    model: a causal LM of transformers, or PEFT's around one. `format`: `PromptFormat`'s arguments.
    """

    adapter: Adapter | None = None  # of a guide: the policy then is the base model, guided by it
    rank: int = 0  # of LoRA's factors; 0: there are none
    tasks: multi_lora.Tasks = ()  # factors that stand in for its own: `stacked`
    source: str = ""  # where it was loaded from, as `policy.path` has it
    sharded: Sharded | None = None  # where processes hold its weights together: `models.sharding`

    def __init__(self, model: Any, *format: Any) -> None:
        super().__init__(*format)
        self.model = model
        self.served: Network | None = None  # what it samples from, where a guide is put to it
        self._copy: Served | None = None  # the same, where weights are copied: see `merged`
        self.kept: Any = None  # what a sampler keeps for as long as the copy stays
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        # Tokens that the model can see: `models.probe` lowers it to what position tables hold.
        self.context = min(context_of(self.causal_lm.config), self.tokenizer.model_max_length)

    @property
    def causal_lm(self) -> Any:
        """Transformers' causal LM, with whatever adapters are in it."""
        return self.model

    @property
    def reference_lm(self) -> Any:
        """The causal LM whose network `reference` gives: mostly the policy's own."""
        return self.causal_lm

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def network(self) -> Network:
        return cut(self.causal_lm) if self.sharded is None else self.sharded.network

    @cached_property
    def sizes(self) -> Sizes:
        """How much goes at once; decided once, when it is first asked for."""
        return sizes_of(self.network)

    @property
    def saved_rank(self) -> int:
        """Rank of the factors that `save_factors` writes; 0: there are none."""
        return 0

    @abstractmethod
    def reference(self) -> AbstractContextManager[Network]:
        """Give the frozen base model, for as long as the context lasts."""

    @contextmanager
    def merged(self) -> Iterator[Network]:
        """Give the policy for passes without gradients: itself, or its copy.

        On a GPU, and in bfloat16, it is a copy whose tensors stay where they are: `models.served`.
        Weights that are held in parts stay nowhere, and are not copied.

        Raises ValueError for weights that are held in parts, outside of `models.sharding.whole`.
        """
        self._check_whole()
        yield self._written_copy() if self._copied else self.network

    def _check_whole(self) -> None:
        if self.sharded is not None and not self.sharded.is_whole:
            raise ValueError(f"policy: {OUTSIDE}")

    @property
    def _copied(self) -> bool:
        weight = self.network.weight
        return self.sharded is None and (weight.is_cuda or weight.dtype != torch.float32)

    @property
    def in_parts(self) -> bool:
        """Say whether what is trained is held in parts, of which each process has its own.

        Gradients then are sums over all processes, and `models.shards.Held` has what to train.
        """
        return False

    def end_update(self) -> None:
        """Say that this process has made all passes of an update's losses.

        Raises ValueError where weights are held in parts, and another process makes more or fewer:
        it is in one then, and raises as well. Else they would wait for each other.
        """
        if self.sharded is not None:
            self.sharded.company.end()

    def reshard(self) -> None:
        """Drop what is gathered of weights that are held in parts: the next pass gathers anew."""
        if self.sharded is not None:
            self.sharded.reshard()

    def _written_copy(self) -> Network:
        if self._copy is None or self.rank > self._copy.rank:
            self._copy = self.kept = None  # before there is another
            self._copy = Served(self.causal_lm)
        else:
            self._copy.write()
        return self._copy.network or self.network

    def stays(self, network: Network) -> bool:
        """Tell whether the tensors of `network` keep their addresses while the policy lives."""
        return self._copy is not None and network is self._copy.network

    @property
    def named(self) -> dict[str, nn.Parameter]:
        """What is trained, by name, in the order of `trainable`."""
        own = {id(p) for p in self.trainable}  # not `requires_grad`: `reference` may switch it off
        return {name: p for name, p in self.model.named_parameters() if id(p) in own}

    @contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Set the trained parameters, all of them, by name, for as long as the context lasts."""
        kept = [(p, p.data) for p in self.trainable]
        try:
            for name, p in self.named.items():
                p.data = values[name].to(p.device, p.dtype)
            yield
        finally:
            for p, data in kept:
                p.data = data

    def rebase(self, values: Mapping[str, Tensor]) -> None:
        """Make what the policy is with these trained parameters its base model.

        `reference` gives that from now on. Raises ValueError for a policy that has no such thing.
        """
        raise ValueError(f"{type(self).__name__}: takes no other base model than its own")

    def check_stackable(self) -> None:
        """Raise ValueError where `stacked` would."""
        multi_lora.layers_of(self.model, self.network.body, self.trainable)

    @contextmanager
    def stacked(self, tasks: multi_lora.Tasks) -> Iterator[None]:
        """Send every token through its own task's adapter, within it: see `models.multi_lora`.

        `tasks[t]` stand in for `trainable`. Without tasks nothing changes.
        """
        if not tasks:
            yield
            return
        with multi_lora.stacked(self.model, self.network.body, self.trainable, tasks):
            self.tasks = tasks
            try:
                yield
            finally:
                self.tasks = ()

    @contextmanager
    def recomputing(self, on: bool) -> Iterator[None]:
        """Keep of forward passes each layer's input alone, and make the rest again going back.

        The layers are told that they train, which is what switches it on; what is in them is not,
        so that no dropout comes on.
        """
        model = self.causal_lm
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
        if on and layers and not layers[0].gradient_checkpointing:
            settings = {"use_reentrant": False, "preserve_rng_state": False}
            if hasattr(model, "activation_checkpointing_enable"):  # its newer name
                model.activation_checkpointing_enable(settings)
            else:
                model.gradient_checkpointing_enable(settings)
        for layer in layers:
            layer.training = on
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a response: the template's own end of a turn, and the model's."""
        ids = {*self.end_ids, self.tokenizer.eos_token_id}
        configured = getattr(self.causal_lm.generation_config, "eos_token_id", None)
        ids.update(configured if isinstance(configured, list) else [configured])
        return frozenset(int(i) for i in ids if i is not None)

    def save(self, folder: Path) -> None:
        """Write a folder that transformers loads: see `models.export.save_policy`.

        Of weights that are held in parts, every process must call it, and the first one writes.
        """
        save_policy(self, folder)

    def merged_state(self) -> dict[str, Tensor]:
        """Give the causal LM's state with adapters added; the model in use is not touched.

        Of weights that are held in parts, on the first process; elsewhere it is empty. All must
        ask for it.
        """
        if self.sharded is not None:
            return {name: x.cpu() for name, x in self.sharded.state() if x is not None}
        state: dict[str, Tensor] = self.causal_lm.state_dict()
        return state

    def save_factors(self, folder: Path) -> None:
        """Write what is trained beside the merged weights; here there is nothing."""
