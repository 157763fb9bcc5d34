"""The cost of a run on cards that need not be here: bytes, bytes on the wire, seconds. No torch.

It is arithmetic. Products are divided by a card's FLOP/s, reads by its memory's bytes/s, messages
by its links' bytes/s, each times the share of it that is assumed (`hardware.Shares` [R]):

    seconds of a meta-step = ceil(tasks / groups) * n_inner * (rollout + reward + learn
                             + weights + exchange) + deltas

Signs, as in a formula below:

    P  parameters of the model     N  weights of its blocks' linear layers
    n  numbers that are trained    b  bytes of a frozen weight (2 bfloat16, 4 float32)
    V  vocabulary                  D  hidden width               L  layers
    S  shards of the weights       m  processes of a group, data * S
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .cost_memory import Held, held
from .engine import Engine
from .hardware import Card
from .mesh import Layout
from .model_shape import ModelShape
from .workload import Work

_LAUNCHES, _APART = 20, 28  # kernels of a layer in a step; where LoRA's factors stay apart
_ADAM = 28  # bytes read and written of a number: it, its gradient, two moments
_ROW_TOKEN = 16  # bytes that processes of a group tell each other of a sampled token [R]


@dataclass(frozen=True)
class Cost:
    """What `cost` gives: of a card, and of a meta-step unless said otherwise."""

    work: Work
    model: ModelShape
    card: Card
    layout: Layout
    engine: Engine
    memory: Held
    wire: dict[str, float]  # bytes that a card sends, a mean over the cards
    seconds: dict[str, float]  # by part
    checkpoint: float  # bytes: what is trained, and Adam's two moments, float32

    @property
    def total(self) -> float:
        """Give the seconds of a meta-step."""
        return sum(self.seconds.values())

    @property
    def fits(self) -> bool:
        """Say whether a card has room for the most that is held at a time."""
        return self.memory.most <= self.card.memory

    @property
    def floor(self) -> float:
        """Give the bytes that one delta and one second moment take: 8 n."""
        return 8 * self.memory.trained

    @property
    def generated(self) -> float:
        """Give the tokens that all cards generate in a meta-step."""
        work = self.work
        return work.tasks * work.n_inner * work.rows * work.response_tokens

    @property
    def tokens_per_second(self) -> float:
        """Give the generated tokens a second, over the whole meta-step."""
        return self.generated / self.total

    @property
    def updates(self) -> int:
        """Count the inner updates of a meta-step that a group makes, one after the other."""
        return -(-self.work.tasks // self.layout.groups) * self.work.n_inner


def cost(work: Work, model: ModelShape, card: Card, layout: Layout) -> Cost:
    """Compute what a run costs on a layout of such cards."""
    memory = held(work, model, card, layout)
    engine, n = memory.engine, memory.trained
    learn = learn_seconds(work, model, card, layout, memory)
    gathers = gathered_bytes(work, model, layout, memory)
    weights, sent_weights = _new_weights(work, model, card, layout, engine, n)
    gradients = gradient_bytes(work, layout, n)
    within = card.between(layout.parts)
    rows = _all_gather(work.rows * work.response_tokens * _ROW_TOKEN, layout.parts)
    # FSDP2 fetches the next block while one computes: what does not fit behind it is waited for.
    waited = max(0.0, gathers / card.between(layout.shard) - learn)
    hops = 4 * _rounds(layout.parts) * card.shares.hop
    update = {
        "rollout": rollout_seconds(work, model, card, layout, engine),
        "reward": reward_seconds(work, card, layout, memory.dtype),
        "learn": learn,
        "weights to the sampler": weights,
        "exchange in a group": (rows + gradients) / within + hops + waited,
    }
    times = -(-work.tasks // layout.groups) * work.n_inner
    seconds = {part: times * value for part, value in update.items()}
    deltas, kept = delta_bytes(work, layout, n), kept_bytes(work, layout, n)
    link, hops = card.between(layout.world), 2 * _rounds(layout.groups) * card.shares.hop
    seconds["deltas between groups"] = (deltas + kept) / link + hops
    wire = {
        "rows of an update, to its group": times * rows,
        "gradients, in a group": times * gradients,
        "weights and gradients of shards": times * gathers,
        "weights to the sampler": times * sent_weights,
        "deltas between groups": deltas,
        "Adam's of preferences": kept,
    }
    checkpoint = 12.0 * n * max(work.models, 1)
    return Cost(work, model, card, layout, engine, memory, wire, seconds, checkpoint)


def rollout_seconds(
    work: Work, model: ModelShape, card: Card, layout: Layout, engine: Engine
) -> float:
    """Give the seconds that an update's sampling takes.

    Prompts, once each: 2 N products a token and those of attention, at `prefill`. Then, for each
    token of `engine.slots` rows at a time, the longer of reading (weights, keys and values, logits)
    at `read` and of computing 2 (N + V D) products a row at `decode`; and the kernels' launches.
    """
    shares, b = card.shares, engine.bytes
    # Virtual shards are sampled one after the other.
    rows, prompts = (x / layout.virtual for x in (work.rows, work.prompts))
    head = model.vocab * model.width
    half = work.prompt_tokens / 2
    prefill = prompts * work.prompt_tokens * (2 * model.linear + _attention(model, half))
    seconds = prefill / (card.products(engine.dtype) * shares.prefill)
    slots = min(rows, engine.slots)
    context = work.prompt_tokens + work.response_tokens / 2
    read = b * (model.linear + head + slots * model.kv * context) + 16 * slots * model.vocab
    extra = 2 * engine.factors
    products = slots * (2 * (model.linear + head) + extra + _attention(model, context))
    step = max(
        read / (card.bandwidth * shares.read),
        products / (card.products(engine.dtype) * shares.decode),
    )
    step += model.layers * (_APART if extra else _LAUNCHES) * shares.launch
    seconds += rows / slots * work.response_tokens * step
    seconds *= layout.virtual / layout.parts
    if engine.merged:  # factors multiplied out, and added
        seconds += 3 * 4 * model.linear / (card.bandwidth * shares.read)
    return seconds


def reward_seconds(work: Work, card: Card, layout: Layout, dtype: str) -> float:
    """Give the seconds of an update's reward models: 2 products a weight and token.

    Their weights are float32. On a GPU their products are rounded only where the policy's are, in
    tfloat32. A row is taken to have the policy's prefix: the most that it can have.
    """
    tokens = work.rows / layout.parts * (work.prompt_tokens + work.response_tokens)
    products = sum(2 * reward.linear * tokens for reward in work.rewards)
    own = dtype if dtype == "tfloat32" else "float32"
    return products / (card.products(own) * card.shares.prefill)


def learn_seconds(work: Work, model: ModelShape, card: Card, layout: Layout, memory: Held) -> float:
    """Give the seconds of an update's gradient and Adam's step on one process.

    Products of a token: 2 N and attention forward, as much backward (twice that for all
    parameters), forward once more where activations are recomputed, and in the reference's pass; 6
    a number of LoRA's factors. The head, of sampled tokens alone: 2 V D for the logits, as much
    back (twice for all parameters), and for the reference's logits. Adam: 28 bytes a number.
    """
    full = work.tuning == "full"
    context = (work.prompt_tokens + work.response_tokens) / 2
    forward = 2 * model.linear + _attention(model, context)
    body = forward * (work.passes + 1 + (2 if full else 1) + work.recompute)
    body += 0 if full else 6 * memory.trained
    head = 2 * model.vocab * model.width * (work.passes + 1 + (2 if full else 1))
    products = (work.learnt_tokens * body + work.learnt_responses * head) / layout.parts
    shard = layout.shard if full else 1
    step = _ADAM * memory.trained / shard / (card.bandwidth * card.shares.read)
    return work.epochs * (products / (card.products(memory.dtype) * card.shares.learn) + step)


def held_sums(numbers: range, count: int) -> int:
    """Count the sums that a process holds of neighbouring leaves `numbers`, of `count` in the tree.

    The tree of meal_fast.training.tree_sum: neighbours are added, what has none goes up as it is.
    """
    nodes, place = 0, numbers.start
    while place < numbers.stop:
        level = 0  # the largest subtree that begins here and ends with these leaves
        while not place >> level & 1 and level < (count - 1).bit_length():
            stop = min(place + (2 << level), count)
            if stop > numbers.stop:
                break
            level += 1
        nodes, place = nodes + 1, min(place + (1 << level), count)
    return nodes


def summed_bytes(payload: float, owners: Sequence[range], count: int) -> float:
    """Give the bytes that a process sends for a sum over processes, the mean: (m + 1)(P - 1)/P.

    Times the payload; P processes (owners: the leaves of each), m sums of its own, mostly one.
    """
    if len(owners) == 1:
        return 0.0
    mean = sum(held_sums(numbers, count) for numbers in owners) / len(owners)
    return (mean + 1) * _all_gather(payload, len(owners))


def gradient_bytes(work: Work, layout: Layout, trained: int) -> float:
    """Give the bytes that a process sends for an update's gradients: a sum of 4 n over its group.

    Sharded ones (all parameters) are summed over `data` alone here: see `gathered_bytes`.
    """
    owners = [layout.shards(rank) for rank in range(layout.parts)]
    if work.tuning == "full" and layout.shard > 1:
        shared = 2 * _all_gather(4 * trained / layout.shard, layout.data)
        return work.epochs * shared
    return work.epochs * summed_bytes(4 * trained, owners, layout.virtual)


def gathered_bytes(work: Work, model: ModelShape, layout: Layout, memory: Held) -> float:
    """Give the bytes that FSDP2 makes a process send in an update: (S - 1) / S of each of these.

    b P for a pass forward, a pass back and one of the reference, and 4 n of gradients where all
    parameters are trained; for each micro-batch.
    """
    if layout.shard == 1:
        return 0.0
    each = (2 + work.passes) * memory.bytes * model.parameters
    each += 4 * memory.trained if work.tuning == "full" else 0
    batches = math.ceil(work.learnt_tokens / layout.virtual / memory.micro_tokens)
    batches *= layout.virtual // layout.parts
    return work.epochs * batches * _all_gather(each, layout.shard)


def delta_bytes(work: Work, layout: Layout, trained: int) -> float:
    """Give the bytes that a process sends as a meta-step ends: a sum over groups of 4 n or 8 n.

    A delta and, with meta.adam=persist_v, the second moment, float32; the shards of all parameters
    each their own. Where each preference has a model, how far it went, 4 n.
    """
    if not (work.reptile or work.models):
        return 0.0
    own = trained / (layout.shard if work.tuning == "full" else 1)
    two = work.reptile and work.adam == "persist_v"
    owners = [layout.tasks(group, work.tasks) for group in range(layout.groups)]
    return summed_bytes((8 if two else 4) * own, owners, work.tasks)


def kept_bytes(work: Work, layout: Layout, trained: int) -> float:
    """Give the bytes of Adam's states that a process sends to other groups: per_preference's.

    8 n for each of its tasks, to each other group.
    """
    if not (work.reptile and work.adam == "per_preference"):
        return 0.0
    own = trained / (layout.shard if work.tuning == "full" else 1)
    return 8 * own * work.tasks / layout.groups * (layout.groups - 1)


def _new_weights(
    work: Work, model: ModelShape, card: Card, layout: Layout, engine: Engine, trained: int
) -> tuple[float, float]:
    """Give seconds and bytes sent until an update's sampler has the weights of the one before."""
    shares, lora = card.shares, work.tuning != "full"
    if work.backend == "vllm":
        whole = 2 * trained if lora else 2 * model.parameters
        sent = 0.0 if lora else _all_gather(whole, layout.shard)
        return whole / shares.push + sent / card.between(layout.shard), sent
    sent = _all_gather(engine.bytes * model.parameters, layout.shard)
    return sent / card.between(layout.shard), sent


def _attention(model: ModelShape, context: float) -> float:
    """Give the products of a token's attention to `context` others, in all layers."""
    return 4 * context * model.heads * model.head * model.layers


def _all_gather(whole: float, members: int) -> float:
    return whole * (members - 1) / members


def _rounds(members: int) -> int:
    return (members - 1).bit_length()
