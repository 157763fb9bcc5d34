"""What a run is about to do, in words, from its options alone: said before torch is imported."""

from __future__ import annotations

import textwrap
from pathlib import Path

from .config import Config
from .recipes import spec_of

_WIDTH = 80  # of the narrowest terminal that people use


def plan(
    config: Config, out: Path, *, resume: bool = False, evaluate: bool = True, report: bool = True
) -> str:
    """Say what a run will do: lines of at most 80 columns, where words allow.

    The time that it takes is not known before something has been timed, and is not guessed.
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
    if evaluate:
        parts.append(("then", _evaluated(config)))
    shown = "report.html" if evaluate and report else "metrics.jsonl"
    kept = "; every update's answers: completions.jsonl" if config.completions else ""
    parts.append(("look at", f"{out / shown}{kept}"))
    verb = "goes on with" if resume else "trains"
    head = f"meal-fast {verb} {out} by {config.recipe} (Ctrl-C saves and stops)"
    return "\n".join([head, *(_line(*part) for part in parts if part[1])])


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
