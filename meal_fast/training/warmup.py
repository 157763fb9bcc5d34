"""A short supervised start: opposed answers to one prompt, under opposed preferences [R].

A policy that never does what one end of the simplex asks for gives GRPO nothing to compare. So it
is shown first. One step holds, of each of its prompts x, all K pairs

    (x, w_k) -> y_k,    w_k = hi at k and (1 - hi)/(K - 1) elsewhere,    hi of `warmup.peaks`

where y_k is an answer that objective k likes: only the preference tells the pairs apart, so that it
is the preference which is learnt. Of an answer the first `warmup.tokens` count: what it will be is
decided there. Ordinary prompts have one answer under every w_k: no preference is to change it.

What the policy is afterwards is the base model of all that follows: of the KL term, of calibration,
and of LoRA's factors, which start anew. The run keeps its parameters in `warmup/`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from meal_fast.common import write_atomic
from meal_fast.config.config import Config
from meal_fast.config.run_dir import read_json
from meal_fast.config.sealed import sha256
from meal_fast.data import preferences
from meal_fast.data.objectives import Objectives
from meal_fast.data.prompts import by_turns
from meal_fast.data_types import Prompt, Weighted
from meal_fast.models.policy import Policy
from meal_fast.rollout import Request
from meal_fast.rollout.sequence import as_drawn, gathered

from .lessons import Lessons, Tell, gather
from .losses.sft import sft

FOLDER, PARAMETERS, REPORT = "warmup", "parameters.safetensors", "report.json"


def warm_up(
    policy: Policy,
    objectives: Objectives,
    prompts: Sequence[Prompt],
    config: Config,
    out: Path,
    tell: Tell = lambda stage: None,
) -> None:
    """Make the policy what its supervised start makes of it; read that from `out` where it is done.

    Raises ValueError as `lessons.gather` does.
    """
    folder = out / FOLDER
    if not (folder / PARAMETERS).is_file():
        started = time.perf_counter()
        lessons = gather(policy, objectives, prompts, config, tell)
        parameters, nll = taught(policy, lessons, config, tell)
        seconds = time.perf_counter() - started
        content = save(parameters)
        said = {
            "steps": len(nll),
            "nll": nll,
            "lessons": dict(lessons.counts),
            "seconds": seconds,
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / REPORT, json.dumps(said, indent=1))
        write_atomic(folder / PARAMETERS, content)
    policy.rebase(learned(out))


def learned(run: Path) -> dict[str, Tensor]:
    """Read the parameters, by name, that the supervised start of a run ended with.

    Raises ValueError where the run's folder has lost them, or they are not what was written.
    """
    path = run / FOLDER / PARAMETERS
    if not path.is_file():
        raise ValueError(f"run {str(run)!r}: {FOLDER}/{PARAMETERS} is missing; train it anew")
    report, written = run / FOLDER / REPORT, None
    if report.is_file():
        written = read_json(run, f"{FOLDER}/{REPORT}").get("sha256")  # None: of an older version
    try:
        if written not in (None, sha256(path)):
            raise ValueError(f"another digest than in {REPORT}")
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise ValueError(
            f"run {str(run)!r}: {FOLDER}/{PARAMETERS} is damaged ({error}); restore it from a "
            f"copy, or remove {FOLDER}/ where the run has no checkpoint yet, and it is made anew"
        ) from None


def taught(
    policy: Policy, lessons: Lessons, config: Config, tell: Tell = lambda stage: None
) -> tuple[dict[str, Tensor], list[float]]:
    """Give the parameters, by name, that learn the lessons, and each step's loss.

    A step is AdamW's along the mean negative log-likelihood of the answers' tokens, at a rate that
    falls linearly to zero. One whose loss or gradient is not finite is skipped, its loss given as
    0; `grpo.skip_limit` in a row raise ValueError. The policy is left as it was.
    """
    options = config.warmup
    if policy.in_parts:
        raise ValueError(
            "policy.tuning='full' with mesh.shard: the warm start trains parameters that are "
            "whole; make it before they are held in parts"
        )
    before = [p.detach().clone() for p in policy.trainable]
    adam = torch.optim.AdamW(policy.trainable, lr=options.lr, weight_decay=0.0, fused=True)
    loss = dataclasses.replace(config.grpo, beta=0.0, reduce="dapo")
    nll: list[float] = []
    skipped = 0  # in a row
    for step in range(options.steps):
        requests, answers = _asked(lessons, config, step)
        rolled = gathered(
            policy,
            requests,
            [as_drawn(policy, answer, options.tokens) for answer in answers],
            started=time.perf_counter(),
            prefill_tokens=0,
            on_policy=False,
        )
        ones_R = torch.ones(len(answers), device=policy.device)
        reward_RK = ones_R.new_zeros(len(answers), len(config.names))
        metrics = sft(policy, rolled, Weighted(reward_RK, ones_R, ones_R), loss, 1.0)
        norm = float(nn.utils.clip_grad_norm_(policy.trainable, 1.0))
        for group in adam.param_groups:
            left = (options.steps - step) / options.steps
            group["lr"] = options.lr * min((step + 1) / 2, left)
        nll.append(float(metrics["nll"]))
        sound = math.isfinite(norm) and math.isfinite(nll[-1])
        if sound:
            adam.step()
        adam.zero_grad(set_to_none=True)
        skipped = 0 if sound else skipped + 1
        if skipped:
            nll[-1] = 0.0  # of a step that is skipped; JSON has no number for it
            said = f"warm start, step {step}: gradient norm {norm:g} is not finite"
            warnings.warn(f"{said}; it is skipped", stacklevel=2)
            if skipped >= config.grpo.skip_limit:
                raise ValueError(
                    f"{said}, and so were the {skipped} steps up to it; lower warmup.lr="
                    f"{options.lr:g}, or leave the warm start out"
                )
        tell(f"warm start: step {step + 1}/{options.steps}, NLL {nll[-1]:.2f}")
    found = {name: p.detach().clone().contiguous() for name, p in policy.named.items()}
    with torch.no_grad():
        torch._foreach_copy_(list[Tensor](policy.trainable), before)
    return found, nll


def _asked(lessons: Lessons, config: Config, step: int) -> tuple[list[Request], list[str]]:
    """Ask a step's prompts under every objective's preference; give the answers beside."""
    options, k, n = config.warmup, len(config.names), config.warmup.batch
    taken = by_turns(
        lessons.opposed, lessons.ordinary, options.benign_share, step, n, config.seed, "warmup"
    )
    requests, answers = [], []
    for i, lesson in enumerate(taken):
        hi = options.peaks[(step * n + i) % len(options.peaks)]
        for own, answer in enumerate(lesson.answers):
            w = [hi if j == own else (1 - hi) / (k - 1) for j in range(k)]
            (at,) = preferences.snapped([w], config.preference.grid)
            requests.append(Request(lesson.prompt, at))
            answers.append(answer)
    return requests, answers
