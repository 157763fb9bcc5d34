"""What a card holds, by kind, in bytes; signs as in cost.py. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from .engine import Engine, engine_cards, weight_bytes
from .hardware import Card
from .mesh import Layout
from .model_shape import ModelShape
from .workload import Work

# What this package takes for itself: meal_fast.models.sizes, meal_fast.rollout.memory.
_ON_A_CPU = {"slots": 64, "micro": 1024, "cache": float(2 << 30)}
_MOST_SLOTS, _MOST_MICRO = 512, 16384
_ROOM = 16  # places of keys and values come in multiples of it


@dataclass(frozen=True)
class Held:
    """Bytes of a card: always, while it samples, and while it learns."""

    trained: int  # n
    bytes: int  # b
    engine: Engine
    micro_tokens: int  # of a pass forward and back
    always: dict[str, float]
    sampling: dict[str, float]
    learning: dict[str, float]
    least: float  # with the smallest micro-batch and one row's cache

    @property
    def most(self) -> float:
        """Give the most that is held at a time."""
        phases = (sum(self.sampling.values()), sum(self.learning.values()))
        return sum(self.always.values()) + max(phases)


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
    """Count what a card holds.

    Always: b P / S of weights; for all parameters a reference, 4 P / S; factors 4 n; Adam 8 n; of
    Reptile theta 4 n and, with persist_v, Adam's 8 n as they were, and as much for the sum of the
    tasks' deltas and moments; per_preference 8 n a task of the group (more in a long run); a model
    for each preference 12 n a task of the group. Of all parameters a process has its shard of each.
    """
    n, b = trained_numbers(work, model), weight_bytes(work, card)
    full = work.tuning == "full"
    own = n / (layout.shard if full else 1)
    tasks = -(-work.tasks // layout.groups)
    always = {
        "weights": b * model.parameters / layout.shard,
        "reference": 4 * model.parameters / layout.shard if full else 0,
        "trained factors": 0 if full else 4 * n,
        "Adam's moments": 8 * own,
        "reward models": 4 * sum(r.parameters for r in work.rewards),
        "libraries": card.runtime,
    }
    if work.reptile:
        each = 12 if work.adam == "persist_v" else 4
        always["theta and Adam before"] = each * own
        always["their sum over tasks"] = each * own
        if work.adam == "per_preference":
            always["Adam's of preferences"] = tasks * 8 * own
    if work.models:
        always["a model a preference"] = tasks * 12 * own
    cards = engine_cards(work, model, card, layout)
    vllm, on_gpu = work.backend == "vllm", card.name != "cpu"
    engine_b = 2 if vllm else b
    copied, temporary = _copy(work, model, layout, b, cards, on_gpu)
    always["the sampler's copy"] = copied
    sampling, learning = {"the sampler's sum": temporary}, {"gradients": 4 * own}
    if layout.shard > 1:  # two blocks, and embedding and head
        learning["gathered weights"] = b * (2 * model.block + 2 * model.vocab * model.width)
    # On a GPU sizes follow from what is free.
    free = max(card.memory - sum(always.values()), 0.0)
    a_token = activation_bytes(model, b, work.recompute)
    if on_gpu:
        micro = max(256, min(_MOST_MICRO, int(free / 4 / activation_bytes(model, b, False))))
        slots = max(16, min(_MOST_SLOTS, int(free / 16 / (12 * model.vocab))))
    else:
        micro, slots = int(_ON_A_CPU["micro"]), int(_ON_A_CPU["slots"])
    row = work.prompt_tokens + work.response_tokens  # which is not split
    micro = max(work.micro_tokens or micro, round(row))
    used = min(micro, max(work.learnt_tokens / layout.parts, row))
    learning["activations"] = used * a_token
    rows, prompts = (x / layout.parts * cards for x in (work.rows, work.prompts))
    token = engine_b * model.kv / cards
    growing = max(1, min(slots, round(rows)))
    budget = work.cache_bytes or (free / 2 if on_gpu else _ON_A_CPU["cache"])
    wanted = token * (
        growing * _rounded(work.max_new_tokens) + max(prompts, 1) * _rounded(work.prompt_tokens)
    )
    sampling["keys and values"] = min(wanted, budget)
    sampling["logits"] = 12 * growing * model.vocab
    lora = work.tuning == "lora"
    apart = n if lora and (b == 2 or vllm) else 0
    engine = Engine(cards, engine_b, growing, apart, merged=lora and not apart)
    least = sum(always.values()) + max(
        sum(sampling.values()) - sampling["keys and values"] - sampling["logits"] + token * row,
        sum(learning.values()) - learning["activations"] + max(row, min(256, used)) * a_token,
    )
    trimmed = [{k: float(v) for k, v in d.items() if v} for d in (always, sampling, learning)]
    return Held(n, b, engine, micro, *trimmed, least=least)


def _copy(
    work: Work, model: ModelShape, layout: Layout, b: int, cards: int, on_gpu: bool
) -> tuple[float, float]:
    """Give the bytes of the sampler's weights beside the learner's: kept, and while it samples.

    vLLM's own, 2 P / cards. This package's engine: the whole model where it is sharded; on one
    GPU the copy of what is joined (queries, keys, values; gate, up), or of all linear layers where
    factors are added to them; on a CPU those sums.
    """
    if work.backend == "vllm":
        return 2 * model.parameters / cards, 0.0
    if layout.shard > 1:
        return 0.0, b * model.parameters
    added = work.tuning != "full" and b == 4
    if not on_gpu:
        return 0.0, b * model.linear if added else 0.0
    joined = model.width * ((model.heads + 2 * model.kv_heads) * model.head + 2 * model.inner)
    return float(b * (model.linear if added else model.layers * joined)), 0.0


def _rounded(tokens: float) -> int:
    return -(-int(tokens) // _ROOM) * _ROOM
