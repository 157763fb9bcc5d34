"""Share a policy's weights out among processes, and its frozen reference's: `shard`, `whole`.

LoRA: the base, which is the reference as well, is held in parts; the factors stay whole on every
process, so that whatever learns works on them as on one process, and their gradients are each
process's own. All parameters: these and the frozen copy are held in parts, gradients are those of
all processes together, and what learns works on its part (`models.shards.Held`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from meal_fast.config.mesh import Layout

from .policies.base import Policy
from .policies.full import FullPolicy
from .policies.lora import LoRAPolicy
from .sharded import Company, Sharded


def mesh_of(layout: Layout, device: str) -> DeviceMesh:
    """Give the processes of this one's group as a mesh to share weights out on.

    Collective: every process of the run must call it. device: a kind, as "cpu".
    """
    sizes, names = (layout.groups, layout.data, layout.shard), ("groups", "data", "shard")
    everyone = init_device_mesh(device, sizes, mesh_dim_names=names)
    return everyone["data", "shard"] if layout.data > 1 else everyone["shard"]


def shard(policy: Policy, mesh: DeviceMesh, *, timeout: float = 1800.0) -> None:
    """Share the weights of `policy`, as they are now, out among the processes of `mesh`, in place.

    Every process has loaded the policy whole. Layer by layer, each keeps its part, on the mesh's
    kind of device.

    mesh: of one dimension, whose processes hold the weights together; or of two, (copies, parts).
    timeout: seconds that a process waits for the others before a pass.

    Raises ValueError for a policy that cannot be, or is already held in parts.
    """
    if policy.sharded is not None:
        raise ValueError("policy: it is held in parts already")
    if mesh.ndim > 2:
        raise ValueError(f"mesh of {mesh.ndim} dimensions: one, or two (copies, parts)")
    if not isinstance(policy, FullPolicy | LoRAPolicy):
        raise ValueError(
            f"mesh.shard={mesh.size(mesh.ndim - 1)}: {type(policy).__name__} runs its model twice "
            "in a pass, which is not held in parts; use mesh.shard=1"
        )
    names, company = list(policy.named), Company(mesh, timeout)
    if isinstance(policy, FullPolicy):
        policy.sharded = Sharded(policy.causal_lm, mesh, company)
        policy.trainable = [policy.sharded.held[name] for name in names]
        policy.frozen.share(mesh, company)
        return
    if mesh.device_type != policy.device.type:  # what is held in parts goes there by itself
        for p in policy.trainable:
            p.data = p.data.to(mesh.device_type)
    policy.sharded = Sharded(policy.causal_lm, mesh, company, policy.trainable)


@contextmanager
def whole(policy: Policy) -> Iterator[None]:
    """Hold the policy's weights whole on every process, to sample from it or its reference.

    Of a policy that is not held in parts nothing changes. Collective when it begins.
    """
    if policy.sharded is None:
        yield
        return
    with policy.sharded.whole():
        yield
