"""What a card holds, by kind, in bytes; signs as in cost.py. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from .engine import Engine, bytes_of, weight_type
from .hardware import Card
from .mesh import Layout
from .model_shape import ModelShape
from .workload import Work

# What this package takes for itself: meal_fast.models.sizes, meal_fast.rollout.memory.
_SLOTS, _MICRO, _CACHE = 64, 1024, float(2 << 30)  # on a CPU
_MOST_SLOTS, _MOST_MICRO = 512, 16384
_ROOM = 16  # places of keys and values come in multiples of it


@dataclass(frozen=True)
class Held:
    """Bytes of a card: always, to sample, to learn, and to end a meta-step."""

    trained: int  # n
    dtype: str  # of the model's weights
    engine: Engine
    micro_tokens: int  # of a pass forward and back
    phases: dict[str, dict[str, float]]  # "always", and what is held beside it at times
    least: float  # with the smallest micro-batch and one row's cache

    @property
    def bytes(self) -> int:
        """Give b."""
        return bytes_of(self.dtype)

    @property
    def most(self) -> float:
        """Give the most that is held at a time."""
        return sum(sum(self.phases[name].values()) for name in ("always", self.fullest))

    @property
    def fullest(self) -> str:
        """Name the phase that needs the most beside what is always held."""
        return max(
            (n for n in self.phases if n != "always"), key=lambda n: sum(self.phases[n].values())
        )


def trained_numbers(work: Work, model: ModelShape) -> int:
    """Count n: LoRA's factors, the bilinear adapters', or all parameters."""
    if work.tuning == "full":
        return model.parameters
    if work.tuning == "bilinear":
        return model.bilinear(work.rank, work.objectives)
    return model.lora(work.rank)


def activation_bytes(model: ModelShape, b: int, recompute: bool) -> float:
    """Give the bytes that a token's pass keeps for its gradient: b (16 D + 6 F) a layer [R].

    The estimate of meal_fast.models.sizes; recomputed, b D a layer, and one layer's as before.
    """
    layer = b * (16 * model.width + 6 * model.inner)
    if recompute:
        return model.layers * b * model.width + layer
    return model.layers * layer


def held(work: Work, model: ModelShape, card: Card, layout: Layout) -> Held:
    """Count what a card holds; see `_always`, `_learning`, `_sampling` and `_ending`."""
    n, dtype = trained_numbers(work, model), weight_type(work, card)
    b = bytes_of(dtype)
    own = n / (layout.shard if work.tuning == "full" else 1)
    on_gpu = card.name != "cpu"
    kept, temporary = _copy(work, model, layout, b, on_gpu)
    always = _always(work, model, layout, n, own, b) | {"the sampler's copy": kept}
    always["libraries"] = card.runtime
    # On a GPU sizes follow from what is free.
    free = max(card.memory - sum(always.values()), 0.0)
    micro, slots, budget = _MICRO, _SLOTS, _CACHE
    if on_gpu:
        a_token = activation_bytes(model, b, recompute=False)
        micro = max(256, min(_MOST_MICRO, int(free / 4 / a_token)))
        slots = max(16, min(_MOST_SLOTS, int(free / 16 / (12 * model.vocab))))
        budget = free / 2
    row = work.prompt_tokens + work.response_tokens  # which is not split
    micro = max(work.micro_tokens or micro, round(row))
    learning = _learning(work, model, layout, own, b, micro)
    a_token = activation_bytes(model, b, work.recompute)
    # An update's virtual shards are sampled one after the other.
    rows, prompts = (x / layout.virtual for x in (work.rows, work.prompts))
    growing = max(1, min(slots, round(rows)))
    own_type = "bfloat16" if work.backend == "vllm" else dtype
    bytes_ = bytes_of(own_type)
    token = bytes_ * model.kv
    wanted = growing * _rounded(work.max_new_tokens) + max(prompts, 1) * _rounded(row)
    cache = min(token * wanted, work.cache_bytes or budget)
    sampling = {
        "the sampler's sum": temporary,
        "keys and values": cache,
        "logits": 12 * growing * model.vocab,
    }
    lora = work.tuning == "lora"
    apart = n if lora and bytes_ == 2 else 0
    engine = Engine(own_type, growing, apart, merged=lora and not apart)
    least = sum(always.values()) + max(
        temporary + token * row,
        sum(learning.values()) - learning["activations"] + max(row, min(256, micro)) * a_token,
    )
    phases = {
        "always": always,
        "to sample": sampling,
        "to learn": learning,
        "to end": _ending(work, layout, own),
    }
    return Held(n, dtype, engine, micro, {k: _there(v) for k, v in phases.items()}, least)


def _always(
    work: Work, model: ModelShape, layout: Layout, n: int, own: float, b: int
) -> dict[str, float]:
    """Give b P / S of weights; for all parameters a reference, 4 P / S; factors 4 n; Adam 8 n.

    Reptile's theta, 4 n, and with persist_v Adam's 8 n as they were; sums of the tasks' deltas, and
    v, 4 n or 8 n, as many as the tree holds while the next task learns; per_preference 8 n a task
    (more in a long run); a model for each preference 12 n a task of the group, and the first, 4 n.
    Of all parameters a process has its shard of each.
    """
    full, persists = work.tuning == "full", work.adam == "persist_v"
    tasks = -(-work.tasks // layout.groups)
    found: dict[str, float] = {
        "weights": b * model.parameters / layout.shard,
        "reference": 4 * model.parameters / layout.shard if full else 0,
        "trained factors": 0 if full else 4 * n,
        "Adam's moments": 8 * own,
        "reward models": 4 * sum(r.parameters for r in work.rewards),
    }
    if work.reptile:
        found["theta and Adam before"] = (12 if persists else 4) * own
        found["sums of deltas and v"] = (8 if persists else 4) * own * _levels(tasks)
        found["Adam's of preferences"] = 8 * own * work.tasks * (work.adam == "per_preference")
    if work.models:
        found["a model a preference"] = (4 + 12 * tasks) * own
        found["sums of distances"] = 4 * own * _levels(tasks)
    return found


def _learning(
    work: Work, model: ModelShape, layout: Layout, own: float, b: int, micro: int
) -> dict[str, float]:
    """Give 4 n of gradients, once a level of the virtual shards' tree; what a pass keeps."""
    shards = layout.virtual // layout.parts
    row = work.prompt_tokens + work.response_tokens
    used = min(micro, max(work.learnt_tokens / layout.virtual, row))
    found = {
        "gradients": 4 * own * (shards.bit_length() + (layout.virtual > 1)),
        "activations": used * activation_bytes(model, b, work.recompute),
    }
    if layout.shard > 1:  # two blocks, and embedding and head
        found["gathered weights"] = b * (2 * model.block + 2 * model.vocab * model.width)
    return found


def _ending(work: Work, layout: Layout, own: float) -> dict[str, float]:
    """Give what a meta-step's end makes: the last task's sum, means, and other groups' sums."""
    if not work.reptile:
        return {"the last distance": 4 * own * bool(work.models)}
    persists = work.adam == "persist_v"
    each = (8 if persists else 4) * own
    means = (12 if persists else 4) * own
    return {
        "the last delta and v": each,
        "means": means,
        "other groups' sums": each * (layout.groups > 1),
    }


def _levels(tasks: int) -> int:
    """Give the most sums that a tree of so many leaves holds before the last one comes."""
    return tasks.bit_length() - 1


def _copy(
    work: Work, model: ModelShape, layout: Layout, b: int, on_gpu: bool
) -> tuple[float, float]:
    """Give the bytes of the sampler's weights beside the learner's: kept, and while it samples.

    vLLM's own, 2 P. This package's engine: the whole model where it is sharded; on one
    GPU the copy of what is joined (queries, keys, values; gate, up), or of all linear layers where
    factors are added to them; on a CPU those sums.
    """
    if work.backend == "vllm":
        return 2 * model.parameters, 0.0
    if layout.shard > 1:
        return 0.0, b * model.parameters
    added = work.tuning != "full" and b == 4
    if not on_gpu:
        return 0.0, b * model.linear if added else 0.0
    joined = model.width * ((model.heads + 2 * model.kv_heads) * model.head + 2 * model.inner)
    return float(b * (model.linear if added else model.layers * joined)), 0.0


def _there(part: dict[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in part.items() if value}


def _rounded(tokens: float) -> int:
    return -(-int(tokens) // _ROOM) * _ROOM
