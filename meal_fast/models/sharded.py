"""A causal LM whose weights several processes hold together (torch's FSDP2).

What FSDP2 leaves to whoever uses it is here, with a check where a mistake would show in no error:

    the head       is not the model's to run: it is read late, after the body has been run
    tied weights   the causal LM is the root, so that embedding and head stay one parameter
    changes        weights that were changed in place since they were gathered are gathered anew
    sampling       needs whole weights: a collective operation a layer a token would be slow, and
                   hang where processes draw texts of other lengths. `whole`
    sums           gradients are summed over the processes, as losses divide by what all have
    passes         each process makes as many as any other, and where one does not all say so
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from transformers.modeling_layers import GradientCheckpointingLayer

from meal_fast.common import first_line
from meal_fast.config.errors import ProcessLost

from .network import Network
from .shards import gathered, is_shared, local, part_of
from .shared_prefix import Packed

OUTSIDE = "its weights are held in parts; sample within models.sharding.whole(policy)"


class Company:
    """The processes that hold models together, each of which makes the passes that all make.

    A pass is a collective operation a layer: where one process goes into it and another does not,
    both would wait until their time is over. So they say before which it is, by a few bytes.
    """

    def __init__(self, mesh: DeviceMesh, timeout: float) -> None:
        ranks = sorted(mesh.mesh.flatten().tolist())
        self._timeout, limit = timeout, timedelta(seconds=timeout)
        self._group = dist.new_group(ranks, limit, "gloo", use_local_synchronization=True)
        self._passes = 0
        self._members = 0

    def join(self) -> int:
        """Give a model a number, by which its passes are told from another's."""
        self._members += 1
        return self._members

    def enter(self, member: int) -> None:
        """Say that a model's pass begins. Raises ValueError where another says otherwise."""
        self._passes += 1
        self._compare(self._passes, member)

    def end(self) -> None:
        """Say that an update's passes are done. Raises ValueError as `enter` does."""
        self._compare(self._passes, 0)
        self._passes = 0

    def _compare(self, number: int, member: int) -> None:
        said = torch.tensor([number, member])
        held = [torch.empty_like(said) for _ in range(dist.get_world_size(self._group))]
        try:
            dist.all_gather(held, said, group=self._group)
        except RuntimeError as error:
            raise ProcessLost(
                f"rank {dist.get_rank()}: another process that holds the weights with it has "
                f"ended, or did not answer within mesh.timeout={self._timeout:g} s "
                f"({first_line(error)[:160]})"
            ) from error
        if any(not torch.equal(said, other) for other in held):
            passes = [int(n) for n, _ in held]
            ended = [rank for rank, (_, which) in enumerate(held) if not int(which)]
            raise ValueError(
                f"policy: processes that hold its weights together make other passes: at number "
                f"{passes}, and {ended or 'none'} of them ended; each must make as many, if with "
                "rows that count nothing"
            )


class Sharded:
    """The processes of `mesh` hold `model` together; `apart` are parameters that each has whole.

    model: a causal LM of transformers, perhaps with LoRA's layers in it. Changed in place: its
    parameters are DTensors from then on.
    mesh: of one dimension; or of two, the second of which shares the weights, and the first has
    copies of what that makes.

    Raises ValueError for a model whose layers are not to be found.
    """

    def __init__(
        self, model: Any, mesh: DeviceMesh, company: Company, apart: Iterable[nn.Parameter] = ()
    ) -> None:
        self.model, self.mesh, self.is_whole = model, mesh, False
        self.company, self._member = company, company.join()
        layers = [
            m for m in model.base_model.modules() if isinstance(m, GradientCheckpointingLayer)
        ]
        if not layers:
            raise ValueError(
                f"mesh.shard: {type(model).__name__} has no layers that transformers knows as "
                "such, so it would be gathered whole; use mesh.shard=1"
            )
        ignored = set(apart)
        for layer in layers:
            fully_shard(layer, mesh=mesh, ignored_params=ignored)
        fully_shard(model, mesh=mesh, ignored_params=ignored, reshard_after_forward=False)
        self._parts: list[FSDPModule] = [m for m in model.modules() if isinstance(m, FSDPModule)]
        for part in self._parts:  # a sum: gradients of losses that divide by what all have
            part.set_force_sum_reduction_for_comms(True)
            part.set_gradient_divide_factor(1.0)
        model.features = MethodType(_features, model)
        register_fsdp_forward_method(model, "features")
        model.register_forward_pre_hook(self._only_whole, prepend=True)
        named: dict[str, nn.Parameter] = dict(model.named_parameters())
        self.held = {name: p for name, p in named.items() if is_shared(p)}
        self._locals = [local(p) for p in self.held.values()]
        self._seen = self._versions()
        self.network = LateNetwork(Body(self), model)

    def reshard(self) -> None:
        """Drop what is gathered of other processes: the next pass gathers it anew."""
        for part in self._parts:
            part.reshard()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Hold all weights on every process, so that no pass without gradients asks the others.

        Collective when it begins. Weights must stay as they are meanwhile.
        """
        if self.is_whole:
            yield
            return
        root = self.model
        self.reshard()
        self._seen = self._versions()
        for part in self._parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        self.is_whole = True
        try:
            yield
        finally:
            self.is_whole = False
            for part in self._parts:
                part.set_reshard_after_forward(part is not root, recurse=False)
                part.reshard()

    def run(self, tree: Any, inputs: dict[str, Any]) -> Any:
        """Run the body; `tree` says what kind of pass it is.

        Raises ValueError for a pass that cannot be; gathers anew what was changed.
        """
        if tree is not None and not isinstance(tree, Packed) and not self.is_whole:
            raise ValueError(f"policy: {OUTSIDE}")
        if torch.is_grad_enabled() and self.is_whole:
            raise ValueError("policy: its weights are whole, to be sampled from; learn outside it")
        now = self._versions()
        if now != self._seen:
            if self.is_whole:
                raise ValueError(
                    "policy: its weights were changed while they are whole, and this pass would "
                    "not see it; change them outside of models.sharding.whole"
                )
            self.reshard()
            self._seen = now
        if not self.is_whole:
            self.company.enter(self._member)
        return self.model.features(**(inputs if tree is None else {**inputs, "tree": tree}))

    @property
    def first(self) -> bool:
        """Say whether this process is the first of those that hold the model."""
        return not any(self.mesh.get_coordinate() or ())

    def state(self) -> Iterator[tuple[str, Tensor | None]]:
        """Give the model's state, a tensor at a time: whole, on the first process; else None.

        In the order of the model's own `state_dict`. What is tied is one tensor, given twice. No
        process has more than one whole tensor on its device at a time. Collective: every process
        must take all of it.
        """
        if self.is_whole:
            raise ValueError("policy: save outside of models.sharding.whole")
        made: dict[int, Tensor | None] = {}
        for name, value in self.model.state_dict(keep_vars=True).items():
            if id(value) not in made:
                whole = gathered(value)
                made[id(value)] = whole if self.first else None
            yield name, made[id(value)]

    @torch.no_grad()
    def put(self, values: Mapping[str, Tensor]) -> None:
        """Set weights that are held in parts, by name; `values` are whole on every process."""
        self.reshard()
        for name, value in values.items():
            held = self.held[name]
            local(held).copy_(part_of(value, held))

    def _only_whole(self, *_: Any) -> None:
        if not self.is_whole:
            raise ValueError(f"policy: {OUTSIDE}")

    def _versions(self) -> list[int]:
        """Of all weights, how often they were changed in place."""
        return [
            p._version + own._version
            for p, own in zip(self.held.values(), self._locals, strict=True)
        ]


def _features(model: Any, **inputs: Any) -> Any:
    """What a causal LM does before its head."""
    return model.base_model(**inputs)


class Body(nn.Module):
    """The body of a causal LM that is held in parts: run by way of the causal LM, as it must be."""

    def __init__(self, sharded: Sharded) -> None:
        super().__init__()
        # Not as a module: nobody is to find its parameters a second time.
        self._run = sharded.run
        self.config = sharded.model.base_model.config

    def forward(self, tree: Any = None, **inputs: Any) -> Any:
        """Run it, as the model's own body is."""
        return self._run(tree, inputs)


class LateNetwork(Network):
    """A network whose head is read when it is asked for: FSDP2 swaps it around each pass.

    Before a pass it is a DTensor, which no product of ours takes.
    """

    _model: Any

    def __init__(self, body: nn.Module, model: Any) -> None:
        softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        for name, value in {"body": body, "softcap": softcap, "runs": 1, "_model": model}.items():
            object.__setattr__(self, name, value)

    @property
    def weight(self) -> Tensor:
        """Give the head's weight as it is now."""
        weight: Tensor = self._model.get_output_embeddings().weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        """Give the head's bias as it is now."""
        return getattr(self._model.get_output_embeddings(), "bias", None)
