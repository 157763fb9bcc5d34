"""A layout of processes, and what it costs, in words: (name, text) pairs of a plan. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from .config import Config, from_dict
from .cost import Cost, cost
from .hardware import Card
from .mesh import Layout, layout
from .model_shape import ModelShape
from .workload import work_of

Lines = list[tuple[str, str]]

MODEL = "arithmetic from the figures below, not a measurement"


def of_mesh(config: Config, laid: Layout) -> Lines:
    """Say which process learns what: preferences, prompts, part of the weights."""
    tasks, prompts = config.meta.tasks, config.rollout.prompts
    parts = f"{laid.groups} group{_s(laid.groups)} x {laid.data} data x {laid.shard} shard"
    head = f"{laid.world:,} process{'es' * (laid.world > 1)} = {parts}{_s(laid.shard)}"
    if laid.groups > 1:
        last = laid.parts - 1
        ranks = f"{laid.parts} g" if last else "g"
        head += f"; group g is rank {ranks}" + (f" to {ranks} + {last}" if last else "")
    counts = sorted({len(laid.tasks(g, tasks)) for g in range(laid.groups)})
    each = " or ".join(map(str, counts))
    preferences = f"{each} of a meta-step's {tasks} a group"
    if 1 < laid.groups <= 4:
        held = (laid.tasks(g, tasks) for g in range(laid.groups))
        shown = (f"{r[0]}" if len(r) == 1 else f"{r[0]} to {r[-1]}" for r in held)
        preferences += f": number {', '.join(shown)}"
    a_process = prompts / laid.parts
    samples = config.preference.per_prompt * config.rollout.samples
    cut = laid.virtual // laid.parts
    asked = f"{a_process:g} of an update's {prompts} a process, {a_process * samples:g} answers"
    if laid.virtual > 1:
        asked += f"; {laid.virtual} virtual shards, {cut} a process"
    weights = "whole in every process"
    if laid.shard > 1:
        weights = f"1/{laid.shard} in a process (FSDP2), {laid.shard} neighbours hold them all"
    return [("mesh", head), ("preferences", preferences), ("prompts", asked), ("weights", weights)]


def of_run(config: Config, laid: Layout, model: ModelShape | None, card: Card) -> Lines:
    """Say of a run on several processes who holds what, bytes a process, bytes on the wire."""
    lines = of_mesh(config, laid)
    if model is None:
        return [*lines, ("bytes", "not known before the model's config.json is here")]
    found = cost(work_of(config), model, card, laid)
    most = sorted(_merged(found).items(), key=lambda item: -item[1])[:3]
    shown = ", ".join(f"{name} {size(value)}" for name, value in most)
    sent = sum(found.wire.values())
    between = found.wire.get("deltas between groups", 0.0)
    of_groups = f", {size(between)} of it between groups" if laid.groups > 1 else ""
    wire = f"{size(sent)} sent by a process in a meta-step{of_groups} (arithmetic)"
    held = f"about {size(found.memory.most)} a process at most: {shown} (arithmetic)"
    return [*lines, ("bytes", held), ("on the wire", wire)]


def of_cost(found: Cost) -> Lines:
    """Say what a layout costs: the model, the cards, bytes, seconds, and what is assumed."""
    work, model, card, laid = found.work, found.model, found.card, found.layout
    memory, shares = found.memory, card.shares
    how = {
        "lora": f"LoRA of rank {work.rank}",
        "bilinear": f"bilinear, rank {work.rank}",
    }
    trained = f"{how.get(work.tuning, 'all parameters')}: {count(memory.trained)} trained"
    about = f"{count(model.parameters)} parameters, {model.layers} layers of {model.width:,}"
    nodes = -(-laid.world // card.node)
    speed = f"{card.products(memory.dtype) / 1e12:g} TFLOP/s, {card.bandwidth / 1e12:.3g} TB/s"
    cards = (
        f"{laid.world:,} x {card.name} of {size(card.memory)} ({speed}), {nodes:,} "
        f"node{_s(nodes)} of {card.node}"
    )
    lengths = f"{work.prompt_tokens:g} tokens a prompt, {work.response_tokens:g} an answer"
    engine = f"sampler {work.backend}, {found.engine.slots} rows at a time"
    micro = f"micro-batches of {memory.micro_tokens:,} tokens"
    lines: Lines = [
        ("model", f"{model.name}: {about}; {trained}"),
        ("cards", cards),
        ("assumed", f"{lengths}; {engine}; {micro}"),
        ("shares", f"of the peaks, assumed: products {shares.learn:.0%} to learn, "
         f"{shares.prefill:.0%} to read, {shares.decode:.0%} to sample; memory {shares.read:.0%}; "
         f"links {shares.link:.0%}"),
    ]  # fmt: skip
    if work.unknown:
        lines.append(("left out", f"reward models of sizes not known: {', '.join(work.unknown)}"))
    return lines


def tables(found: Cost) -> str:
    """Write bytes a card, bytes on the wire and seconds as columns, at most 80 characters wide."""
    memory, card = found.memory, found.card
    total = memory.most
    rows = ["  a card holds, at most"]
    for when, part in memory.phases.items():
        rows += [_row(name, size(value), when) for name, value in part.items()]
    share = f"{total / card.memory:.0%} of {size(card.memory)}"
    rows += [_row("together, at most at a time", size(total), share)]
    rows += ["  a card sends in a meta-step"]
    wire = {name: value for name, value in found.wire.items() if value}
    rows += [_row(name, size(value)) for name, value in wire.items()] or [_row("nothing", "0 B")]
    if wire:
        rows += [_row("floor: one delta and second moment", size(found.floor))]
    rows += [f"  a meta-step, {found.updates} updates of a group one after the other"]
    for name, value in found.seconds.items():
        if value:
            rows.append(_row(name, time(value), f"{value / found.total:.1%}"))
    rows += [_row("together", time(found.total), f"{count(found.tokens_per_second)} tokens/s")]
    rows += [_row("a checkpoint", size(found.checkpoint))]
    return "\n".join(rows)


def warning(found: Cost, config: Config) -> str:
    """Say what does not fit on a card, with options that make it; empty where all does."""
    if found.fits:
        return ""
    card, changes = found.card, remedies(found, config)
    remedy = " ".join(changes) + " would" if changes else "take more cards, or of more memory"
    if found.work.tuning == "full":
        remedy += "; or policy.tuning=lora"
    return f"{size(found.memory.most)} do not fit on a card of {size(card.memory)}: {remedy}"


def remedies(found: Cost, config: Config) -> list[str]:
    """Find the fewest options, and of them the fewest shards, with which it fits; [] for none.

    Tried: shards, vLLM, activations recomputed, micro-batches; of
    these what the recipe and the number of cards allow.
    """
    now, world, work = found.layout.shard, found.layout.world, found.work
    backend, recompute, micro = work.backend, work.recompute, work.micro_tokens
    each = (
        [{"mesh.shard": now << i} for i in range(world.bit_length()) if now << i <= world],
        [{"rollout.backend": name} for name in dict.fromkeys((backend, "vllm"))],
        [{"grpo.recompute": value} for value in dict.fromkeys((recompute, True))],
        [{"grpo.micro_tokens": n} for n in dict.fromkeys((micro, 1024))],
    )
    before = [options[0] for options in each]

    def changed(options: Sequence[dict[str, Any]]) -> dict[str, Any]:
        both = zip(options, before, strict=True)
        return {k: v for one, old in both if one != old for k, v in one.items()}

    tried = sorted(map(changed, product(*each)), key=len)  # of like many, the fewest shards first
    for options in tried:
        if options and _fits(found, config, options):
            return [f"{name}={value}".replace("True", "true") for name, value in options.items()]
    return []


def _fits(found: Cost, config: Config, options: dict[str, Any]) -> bool:
    sections: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        section, _, option = name.partition(".")
        sections.setdefault(section, {})[option] = value
    if "mesh" in sections:  # what must agree with the shards is left open
        sections["mesh"] |= {"data": 0, "virtual": 0}
    work = found.work
    try:
        config = from_dict(sections, config)
        laid = layout(config, found.layout.world)
        other = work_of(config, work.prompt_tokens, work.response_tokens)
        return cost(other, found.model, found.card, laid).fits
    except ValueError:  # the recipe, or the number of cards, does not allow it
        return False


def _merged(found: Cost) -> dict[str, float]:
    memory = found.memory
    return memory.phases["always"] | memory.phases[memory.fullest]


def _row(name: str, value: str, more: str = "") -> str:
    return f"    {name:<36}{value:>10}  {more}".rstrip()


def _s(n: int) -> str:
    return "s" * (n != 1)


def size(value: float) -> str:
    """Write bytes in decimal units, three digits."""
    return f"{_scaled(value)}B"


def count(value: float) -> str:
    """Write a number with K, M, B (10^9) or T, three digits."""
    return _scaled(value).replace("G", "B").replace("k", "K").rstrip()


def _scaled(value: float) -> str:
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * factor:
            return f"{_three(value / factor)} {unit}"
    return f"{value:.0f} "


def time(value: float) -> str:
    """Write seconds, three digits; days and hours where they are many."""
    if value >= 2 * 86400:
        return f"{_three(value / 86400)} d"
    if value >= 2 * 3600:
        return f"{_three(value / 3600)} h"
    return f"{_three(value)} s" if value >= 0.9995e-3 else f"{value * 1e6:.0f} us"


def _three(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"
