"""What a run is about to do, in words, from its options alone: said before torch is imported."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from .cards import card_here, shape_here
from .config import Config
from .cost import cost
from .hardware import CARDS, Card
from .mesh import Layout
from .mesh_plan import MODEL, of_cost, of_mesh, of_run, tables, warning
from .model_shape import ModelShape, shape_of
from .recipes import spec_of
from .workload import work_of

_WIDTH = 80  # of the narrowest terminal that people use


def plan(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    evaluate: bool = True,
    report: bool = True,
    layout: Layout | None = None,
    model: ModelShape | None = None,
    card: Card | None = None,
) -> str:
    """Say what a run will do: lines of at most 80 columns, where words allow.

    On several processes (layout), also who holds what, and bytes, of a model (None: its sizes are
    not known) on a card. The time that it takes is not known before something has been timed, and
    is not guessed.
    """
    policy, prompts = config.policy, config.prompts.train
    device = "a GPU where there is one, else the CPU" if policy.device == "auto" else policy.device
    more = f" and {config.prompts.benign}" if config.prompts.benign else ""
    tuning = f"LoRA of rank {policy.lora_rank}" if policy.tuning == "lora" else policy.tuning
    parts = [
        ("objectives", ", ".join(o.replace("=", " = ", 1) for o in config.objectives)),
        ("model", f"{policy.path}, tuning: {tuning}"),
        ("device", device),
        ("before", _before(config)),
        ("updates", _updates(config)),
        ("answers", f"to {prompts}{more}; {_sampled(config)}"),
    ]
    if layout is not None and layout.world > 1:
        parts += of_run(config, layout, model, card or CARDS["h100"])
    if evaluate:
        parts.append(("then", _evaluated(config)))
    shown = "report.html" if evaluate and report else "metrics.jsonl"
    kept = "; every update's answers: completions.jsonl" if config.completions else ""
    parts.append(("look at", f"{out / shown}{kept}"))
    verb = "goes on with" if resume else "trains"
    head = f"meal-fast {verb} {out} by {config.recipe} (Ctrl-C saves and stops)"
    return "\n".join([head, *(_line(*part) for part in parts if part[1])])


def cost_plan(
    config: Config,
    layout: Layout,
    card: Card,
    model: str,
    prompt_tokens: float | None = None,
    response_tokens: float | None = None,
) -> tuple[str, str]:
    """Say what a run costs on a layout of cards, and a warning where it does not fit, else "".

    model: whose sizes, a name of `model_shape.shape_of`. Raises ValueError for one not known, and
    for lengths that cannot be.
    """
    work = work_of(config, prompt_tokens, response_tokens)
    found = cost(work, shape_of(model), card, layout)
    head = f"meal-fast plan: {MODEL}"
    lines = [_line(*pair) for pair in [*of_mesh(config, layout), *of_cost(found)]]
    return "\n".join([head, *lines, tables(found)]), warning(found, config)


def run_plan(config: Config, out: Path, layout: Layout, **how: Any) -> str:
    """Say what a run will do as it starts, on this machine's processes."""
    shape = shape_here(config) if layout.world > 1 else None
    return plan(config, out, **how, layout=layout, model=shape, card=CARDS[card_here(config)])


def whole_plan(config: Config, out: Path, layout: Layout, card: Card, **how: Any) -> str:
    """Say what a run would do, and cost on a layout of cards: `train --plan`."""
    if shape_here(config) is None:
        return plan(config, out, **how, layout=layout)
    text, warned = cost_plan(config, layout, card, config.policy.path)
    return "\n".join([plan(config, out, **how), text, *([warned] if warned else [])])


def _line(name: str, text: str) -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=f"  {name:<11} ",
        subsequent_indent=" " * 14,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _before(config: Config) -> str:
    steps = [f"a supervised start of {config.warmup.steps} steps"] if config.warmup.steps else []
    if not config.score.statistics:
        steps.append(f"{config.score.calibration} answers of the model, to calibrate the rewards")
    return ", then ".join(steps)


def _updates(config: Config) -> str:
    meta = config.meta
    if meta.tokens:
        return f"until {meta.tokens:,} tokens have been generated"
    what = "model" if spec_of(config).models else "preference"
    what += "s" * (meta.tasks != 1)
    whole = meta.steps * meta.tasks * meta.n_inner
    return f"{whole} = {meta.steps} meta-steps x {meta.tasks} {what} x {meta.n_inner} updates"


def _sampled(config: Config) -> str:
    rollout, m = config.rollout, config.preference.per_prompt
    several = f" x {m} preferences" if m > 1 else ""
    return (
        f"an update samples {rollout.prompts} prompts{several} x {rollout.samples} answers of at "
        f"most {rollout.max_new_tokens} tokens"
    )


def _evaluated(config: Config) -> str:
    options = config.evaluation
    return (
        f"a sweep over preferences, {options.grid} a side, on {options.prompts} held-out prompts, "
        "the model before training beside it"
    )
