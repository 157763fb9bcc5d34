"""What holds of a policy whose weights several processes hold together, checked by each of them.

A program for torchrun: `in_parts.py FOLDER COPIES`. Each check compares with a policy that the
process holds alone; what one raises is left in FOLDER, a file a process, and all go on.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import json
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from meal_fast import ops
from meal_fast.config import Config, from_dict
from meal_fast.config.presets import preset
from meal_fast.data_types import Prompt, Rollout, Scored
from meal_fast.models.policy import FullPolicy, Policy, load_policy
from meal_fast.models.probe import probe
from meal_fast.models.sharding import shard, whole
from meal_fast.models.shards import gathered, local, part_of
from meal_fast.rollout import Request, rollout
from meal_fast.training.hypergradient import hypergradient
from meal_fast.training.losses.grpo import grpo
from meal_fast.training.losses.sequences import WHOLE, Part
from meal_fast.training.outer import Reptile

TUNINGS = ("lora", "full")
IDS = torch.tensor([[5, 6, 7, 8]])
REQUESTS = [Request(Prompt(f"p{i}", "Write a short word."), (0.5, 0.5), 4) for i in range(4)]
LOADED: dict[str, Policy] = {}
Check = Callable[["Two"], None]
CHECKS: dict[str, Check] = {}  # by name and tuning


def check(function: Check, tunings: tuple[str, ...] = TUNINGS) -> Check:
    CHECKS.update({f"{function.__name__}-{tuning}": function for tuning in tunings})
    return function


lora_alone = partial(check, tunings=("lora",))
full_alone = partial(check, tunings=("full",))


class Two:
    """The same policy twice: alone, and in parts; away from where training starts."""

    def __init__(self, tuning: str, mesh: DeviceMesh, folder: Path) -> None:
        self.rank, self.world, self.mesh, self.folder = dist.get_rank(), mesh.size(), mesh, folder
        self.full = tuning == "full"
        self.config: Config = from_dict({"policy": {"tuning": tuning}}, preset("tiny"))
        if tuning not in LOADED:
            LOADED[tuning] = self.policy()
        self.alone, self.parts = (copy.deepcopy(LOADED[tuning]) for _ in range(2))
        shard(self.parts, mesh)

    def policy(self) -> Policy:
        policy = load_policy(self.config.policy, self.config.names, seed=0)
        random = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in policy.trainable:
                p.add_(torch.randn(p.shape, generator=random) * 0.1)
        return policy

    def part(self, number: int) -> Part:
        return Part(number, self.world, even=True)

    def gradients(
        self, policy: Policy, rolled: Rollout, part: Part = WHOLE, **options: Any
    ) -> list[Tensor]:
        for p in policy.trainable:
            p.grad = None
        advantage_R = torch.linspace(-1, 1, len(rolled.groups))
        scored = Scored(torch.zeros(len(advantage_R), 2), advantage_R, advantage_R)
        grpo(policy, rolled, scored, dataclasses.replace(self.config.grpo, **options), 1.0, part)
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.trainable]


def drawn(policy: Policy, tokens: int = 6, **more: Any) -> Rollout:
    with torch.no_grad():
        return rollout(policy, REQUESTS, max_new_tokens=tokens, temperature=1.0, seed=0, **more)


@torch.no_grad()
def states(policy: Policy) -> Tensor:
    found: Tensor = policy.network.body(input_ids=IDS, use_cache=False).last_hidden_state
    return found


def same(one: Rollout, other: Rollout, within: float = 0.0) -> None:
    assert one.texts == other.texts
    torch.testing.assert_close(one.logp_RT, other.logp_RT, rtol=0, atol=within)


def close(ones: Any, others: Any, within: float = 0.0) -> None:
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(gathered(other), gathered(one), rtol=0, atol=within)


def refused(words: str, action: Callable[[], Any]) -> None:
    try:
        action()
    except ValueError as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"not refused: {words}")


@check
def each_process_has_its_part(two: Two) -> None:
    held = two.parts.sharded.held.values()
    alone = sum(p.numel() for p in two.alone.causal_lm.parameters())
    mine = torch.tensor(sum(local(p).numel() for p in held))
    factors = 0 if two.full else sum(p.numel() for p in two.alone.trainable)
    every = mine.clone()
    dist.all_reduce(every)
    assert every == (alone - factors) * two.world / two.mesh.size(two.mesh.ndim - 1)
    assert mine < 1.1 * every / two.world
    assert all(isinstance(p, DTensor) for p in two.parts.trainable) == two.full
    assert list(two.parts.named) == list(two.alone.named)
    if two.full:
        frozen = two.parts.frozen.sharded.held.values()
        assert sum(local(p).numel() for p in frozen) == mine


@check
def tied_weights_stay_tied(two: Two) -> None:
    for model in (two.alone.causal_lm, two.parts.causal_lm):
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    states(two.parts)  # gathered
    model = two.parts.causal_lm
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not isinstance(two.parts.network.weight, DTensor)


@check
def nobody_samples_from_parts(two: Two) -> None:
    parts = two.parts
    refused("within models.sharding.whole", lambda: drawn(parts))
    refused("within models.sharding.whole", lambda: drawn(parts, network=parts.network))
    with parts.reference() as base:
        refused("within models.sharding.whole", lambda: drawn(parts, network=base))
    refused("within models.sharding.whole", lambda: parts.causal_lm(input_ids=IDS))


@check
def whole_weights_give_the_same_texts(two: Two) -> None:
    tokens = 3 + 3 * two.rank  # of other lengths: nobody waits for the others
    with whole(two.parts):
        mine = drawn(two.parts, tokens)
        with whole(two.parts):
            assert two.parts.sharded.is_whole
        assert two.parts.sharded.is_whole
    same(drawn(two.alone, tokens), mine)
    with two.alone.reference() as base:
        of_base = drawn(two.alone, tokens, network=base)
    assert of_base.texts != mine.texts  # it is not the base that was asked
    refused("within models.sharding.whole", lambda: drawn(two.parts))


@check
def the_reference_is_the_base_model(two: Two) -> None:
    found = []
    for policy in (two.alone, two.parts):
        with policy.reference() as base, torch.no_grad():
            found.append(base.body(input_ids=IDS, use_cache=False).last_hidden_state)
    assert torch.equal(*found) and not torch.equal(found[0], states(two.alone))


OPTIONS: list[dict[str, Any]] = [
    {"beta": 0.0, "micro_tokens": 60},
    {"beta": 0.1},
    {"beta": 0.1, "micro_tokens": 60, "recompute": True},
    {"beta": 0.1, "micro_tokens": 60, "kl": "exact"},
]


@check
def gradients_are_each_processs_own_or_the_sum(two: Two) -> None:
    rolled = drawn(two.alone)
    for options in OPTIONS:
        found = two.gradients(two.parts, rolled, two.part(two.rank), **options)
        if not two.full:
            close(two.gradients(two.alone, rolled, two.part(two.rank), **options), found)
            continue
        every = [two.gradients(two.alone, rolled, two.part(r), **options) for r in range(two.world)]
        close([sum(of_all) for of_all in zip(*every, strict=True)], found, within=3e-8)
        norms = [torch.stack([g.norm() for g in gs]).norm() for gs in (every[0], every[1])]
        assert min(norms) > 1e-3  # it is a sum of something
    two.parts.end_update()


@check
def a_change_in_place_is_seen(two: Two) -> None:
    parts, alone, sharded = two.parts, two.alone, two.parts.sharded
    assert torch.equal(states(parts), states(alone))

    def change(by: float) -> None:
        with torch.no_grad():
            for p in (*sharded.held.values(), *alone.causal_lm.parameters()):
                if p.requires_grad == two.full and p.dim():
                    local(p).add_(by)

    change(0.05)
    assert torch.equal(states(parts), states(alone))
    versions = sharded._versions
    sharded._versions = lambda: sharded._seen  # without the check
    change(0.05)
    assert not torch.equal(states(parts), states(alone))
    parts.reshard()
    assert torch.equal(states(parts), states(alone))
    sharded._versions = versions
    with whole(parts):
        assert torch.equal(states(parts), states(alone))
        change(0.05)
        refused("changed while they are whole", lambda: states(parts))
    assert torch.equal(states(parts), states(alone))


@check
def nobody_learns_from_whole_weights(two: Two) -> None:
    with whole(two.parts):
        refused("learn outside", lambda: two.parts.network.body(input_ids=IDS, use_cache=False))


@check
def a_head_that_is_in_parts_is_no_ones_weight(two: Two) -> None:
    weight = two.parts.network.weight  # before a pass
    assert isinstance(weight, DTensor)
    try:
        ops.linear_logprob(torch.zeros(3, weight.shape[1]), weight, torch.tensor([5, 6, 7]))
    except RuntimeError as error:
        assert "mixed torch.Tensor and DTensor" in str(error), error
    else:
        raise AssertionError("a product with a head in parts")


@check
def processes_that_make_other_passes_say_so(two: Two) -> None:
    def update() -> None:
        for _ in range(2 + (two.rank == 1)):
            states(two.parts)
        two.parts.end_update()

    refused("make other passes", update)


@full_alone
def passes_through_other_models_are_other_passes(two: Two) -> None:
    def one() -> None:
        if two.rank:
            states(two.parts)
        else:
            with two.parts.reference() as base, torch.no_grad():
                base.body(input_ids=IDS, use_cache=False)

    refused("make other passes", one)


@check
def a_meta_step_is_that_of_one_process(two: Two) -> None:
    rolled, tasks = drawn(two.alone), [(0, (0.5, 0.5)), (1, (0.2, 0.8))]
    told = []
    for policy in (two.alone, two.parts):
        outer = Reptile(policy.trainable, two.config.meta, two.config.grpo)
        outer.begin([tasks])
        norms = []
        for number, w in tasks:
            outer.begin_task(w)
            for _ in range(2):
                if two.full and policy is two.parts:
                    two.gradients(policy, rolled, two.part(two.rank), beta=0.1)
                    outer.held.take_gradients()
                else:
                    two.gradients(policy, rolled, beta=0.1)
                norms.append(float(outer.advance(1e-3, 0.1)))  # clipped
                assert not outer.left_out
            outer.end_task(number, w)
        told.append([*norms, *outer.end(0.0).values()])
    assert min(told[0][:4]) > 0.2
    within = 1e-5 if two.full else 0.0  # Adam divides by the root of small squares
    torch.testing.assert_close(torch.tensor(told[1]), torch.tensor(told[0]), rtol=within, atol=0)
    close(two.alone.trainable, two.parts.trainable, within=within)
    with whole(two.parts):  # it answers as it is now
        same(drawn(two.alone), drawn(two.parts), within)


@check
def what_is_held_is_given_back(two: Two) -> None:
    before = [gathered(p).clone() for p in two.parts.trainable]
    values = {name: gathered(p) + 0.05 for name, p in two.parts.named.items()}
    assert torch.equal(states(two.parts), states(two.alone))
    with two.parts.holding(values), two.alone.holding(values):
        assert torch.equal(states(two.parts), states(two.alone))
    close(before, two.parts.trainable)
    assert torch.equal(states(two.parts), states(two.alone))


@check
def another_base_is_another_base(two: Two) -> None:
    values = {name: gathered(p) + 0.05 for name, p in two.alone.named.items()}
    for policy in (two.alone, two.parts):
        policy.rebase(values)
    assert torch.equal(states(two.parts), states(two.alone))
    found = []
    for policy in (two.alone, two.parts):
        with policy.reference() as base, torch.no_grad():
            found.append(base.body(input_ids=IDS, use_cache=False).last_hidden_state)
    assert torch.equal(*found)


@check
def the_saved_folder_is_that_of_one_process(two: Two) -> None:
    with whole(two.parts):
        refused("outside of models.sharding.whole", two.parts.merged_state)
    states(two.parts)  # gathered
    two.parts.save(two.folder / "parts")
    assert (two.parts.merged_state() != {}) == two.parts.sharded.first
    if two.rank:
        return
    two.alone.save(two.folder / "alone")
    files = [
        {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.is_file()}
        for root in (two.folder / "alone", two.folder / "parts")
    ]
    assert "model.safetensors" in files[0] and files[0] == files[1]
    assert ("adapter/adapter_model.safetensors" in files[0]) != two.full


@check
def what_cannot_be_is_refused(two: Two) -> None:
    refused("in parts already", lambda: shard(two.parts, two.mesh))
    refused("probe it before", lambda: probe(two.parts, "it"))
    guide = dataclasses.replace(two.config.policy, tuning="bilinear", preference_text="none")
    guided = load_policy(guide, two.config.names)
    refused("use mesh.shard=1", lambda: shard(guided, two.mesh))


@check
def a_hypergradient_is_that_of_one_process(two: Two) -> None:
    rolled = drawn(two.alone)
    a_R = torch.linspace(0.1, 1.0, len(rolled.groups))
    options: Any = {"eta": 0.05, "temperature": 1.0, "micro_tokens": 60}

    def of(policy: Policy) -> Tensor:
        return hypergradient(policy, rolled, a_R, rolled, **options)[0]

    if isinstance(two.parts, FullPolicy):
        refused("policy.tuning=lora", lambda: of(two.parts))
        return
    found = of(two.parts)
    assert torch.equal(found, of(two.alone)) and float(found.abs().max()) > 0


@lora_alone
def stacked_adapters_are_those_of_one_process(two: Two) -> None:
    found = []
    for policy in (two.alone, two.parts):
        tasks = [[p.detach() + 0.02 * t for p in policy.trainable] for t in range(2)]
        tasks = [[x.requires_grad_() for x in task] for task in tasks]
        requests = [dataclasses.replace(r, task_id=n % 2) for n, r in enumerate(REQUESTS)]
        requests.sort(key=lambda r: r.task_id)
        with policy.stacked(tasks):
            with whole(policy), torch.no_grad():
                rolled = rollout(policy, requests, max_new_tokens=6, temperature=1.0, seed=0)
            two.gradients(policy, rolled, beta=0.1)
        found.append((rolled, [x.grad for task in tasks for x in task]))
    same(found[0][0], found[1][0])
    close(found[0][1], found[1][1])


@check
def a_part_is_cut_as_torch_cuts_it(two: Two) -> None:
    for name, p in two.parts.sharded.held.items():
        assert torch.equal(part_of(gathered(p), p), local(p)), name


def main(folder: Path, copies: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    world = dist.get_world_size()
    if copies == 1:
        mesh = init_device_mesh("cpu", (world,))
    else:
        mesh = init_device_mesh(
            "cpu", (copies, world // copies), mesh_dim_names=("copies", "parts")
        )
    found: dict[str, str] = {}
    for name, function in CHECKS.items():
        own = folder / name
        own.mkdir(exist_ok=True)
        found[name] = ""
        try:
            function(Two(name.rpartition("-")[2], mesh, own))
        except Exception:
            found[name] = traceback.format_exc()
        (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
