"""What a supervised start learns from: prompts, and the answer to each that every objective likes.

The base model answers prompts, `SAMPLES` times each, told nothing or an instruction that the policy
is not shown later (`own:INSTRUCTION`). An objective's own answer is the best of these by its
reward; or it comes from a file (`warmup.answers`). An ordinary prompt has one answer for all
objectives: the best by the mean of the rewards, each in standard deviations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meal_fast.config.config import Config
from meal_fast.data.answers import AnswerRows, read_answer_rows
from meal_fast.data.objectives import Objectives
from meal_fast.data.prompts import held_out, in_turn, load_prompts
from meal_fast.data_types import Prompt
from meal_fast.models.policy import Policy
from meal_fast.rollout import Request
from meal_fast.rollout.fitting import context_room

from .sampled import sampled

SAMPLES = 4
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Lesson:
    """Hold one prompt and K answers, of which the k-th is what objective k likes."""

    prompt: Prompt
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Lessons:
    """Hold what a supervised start learns from."""

    opposed: tuple[Lesson, ...]
    ordinary: tuple[Lesson, ...]  # all answers are one: no preference is to change it
    counts: Mapping[str, Any]  # what was taken and refused, for the run's record


def check_sources(config: Config) -> None:
    """Raise ValueError for a file of answers that has none, or none but to evaluation prompts.

    Cheap: it reads files alone.
    """
    if any(_told(source) is None for source in _sources(config)):
        _answer_rows(config, held_out(config.prompts.train, config.prompts.evaluation))


def _answer_rows(config: Config, unseen: frozenset[str]) -> dict[int, AnswerRows]:
    """Read the answers that do not come from the base model, by objective."""
    return {
        k: read_answer_rows(source, unseen)
        for k, source in enumerate(_sources(config))
        if _told(source) is None
    }


def _sources(config: Config) -> list[str]:
    named = dict(entry.split("=", 1) for entry in config.warmup.answers)
    return [named.get(name, "own") for name in config.names]


def _told(source: str) -> str | None:
    """Give what the base model is told beside a prompt; None where its answers are not wanted."""
    own, _, instruction = source.partition(":")
    return instruction.strip() if own == "own" else None


def gather(
    policy: Policy,
    objectives: Objectives,
    prompts: Sequence[Prompt],
    config: Config,
    tell: Tell = lambda stage: None,
) -> Lessons:
    """Gather lessons: half of the prompts tried, those whose K answers differ most.

    They differ by sum_k of how much better objective k finds y_k than the other objectives'
    answers, in standard deviations. prompts: the run's, for `warmup.prompts` = "".

    Raises ValueError where no prompt is left that has an answer for every objective.
    """
    options = config.warmup
    unseen = held_out(config.prompts.train, config.prompts.evaluation)
    given = _answer_rows(config, unseen)
    count = max(options.draws // SAMPLES, 1)
    told = {k: t for k, source in enumerate(_sources(config)) if (t := _told(source)) is not None}
    tellings = list(dict.fromkeys(told.values()))
    refused = 0
    chosen: list[list[Prompt]] = []
    limit, room = config.prompts.max_tokens, context_room(policy, config)
    for source, own, most, behind in (
        (options.prompts, prompts, count, tellings),
        (options.benign, (), round(count * options.benign_share), []),
    ):
        found = load_prompts(source, "train") if source else own
        seen = [p for p in found if p.id not in unseen]
        refused += len(found) - len(seen)
        short = [p for p in seen if len(policy.encode_prompt(p.text)) <= limit]
        fit = [
            p
            for p in short
            if all(len(policy.encode_prompt(_with(p, t).text)) <= room for t in ("", *behind))
        ]
        if len(fit) < len(short):
            tell(
                f"warm start: {len(short) - len(fit)} of {len(found)} prompts are left out: they "
                f"exceed the model's context of {policy.context}"
            )
        chosen.append(in_turn(fit, 0, min(most, len(fit)), config.seed, f"warmup {source}"))
    divided, plain = chosen
    asked = [(p, t) for t in tellings for p in divided] + [(p, "") for p in plain]
    drawn = dict(zip(asked, _own_answers(policy, asked, config, tell), strict=True))
    pairs = [(prompt, a) for (prompt, _), answers in drawn.items() for a in answers]
    tell(f"warm start: scoring {len(pairs)} answers")
    scored = _rewards(objectives, pairs).split(SAMPLES) if pairs else ()  # all may be of files
    rewards = dict(zip(drawn, scored, strict=True))
    lessons = []
    for prompt in divided:
        answers = {k: rows.of(prompt, config.seed, "warmup", k) for k, rows in given.items()}
        for k, t in told.items():
            own_S = rewards[prompt, t][:, k].nan_to_num(-torch.inf)
            applies = bool(own_S.isfinite().any())
            answers[k] = drawn[prompt, t][int(own_S.argmax())] if applies else None
        if None not in answers.values():
            whole = tuple(answers[k] or "" for k in range(len(config.names)))
            lessons.append(Lesson(prompt, whole))
    if not lessons:
        raise ValueError(
            f"warmup.answers={config.warmup.answers}: of {len(divided)} prompts none has an answer "
            "for every objective; give rows to the prompts of warmup.prompts, or rows without one"
        )
    apart_P = _apart(objectives, lessons)
    kept = sorted(apart_P.argsort(descending=True, stable=True)[: -(-len(lessons) // 2)].tolist())
    ordinary = []
    if plain:
        z_PSK = _standard(torch.stack([rewards[prompt, ""] for prompt in plain]))
        for prompt, best in zip(plain, z_PSK.mean(2).argmax(1).tolist(), strict=True):
            ordinary.append(Lesson(prompt, (drawn[prompt, ""][best],) * len(config.names)))
    counts = {
        "tried": len(divided),
        "without_answer": len(divided) - len(lessons),
        "opposed": len(kept),
        "ordinary": len(ordinary),
        "apart": float(apart_P[kept].mean()),
        "prompts_of_the_evaluation": refused,
        "refused_rows": {config.names[k]: dict(rows.refused) for k, rows in given.items()},
    }
    return Lessons(tuple(lessons[i] for i in kept), tuple(ordinary), counts)


def _apart(objectives: Objectives, lessons: Sequence[Lesson]) -> Tensor:
    """Measure how differently each lesson's answers (P,) are liked."""
    k = len(objectives.names)
    reward_RK = _rewards(objectives, [(x.prompt, a) for x in lessons for a in x.answers])
    z_PAK = _standard(reward_RK.view(len(lessons), k, k))  # answer, judge
    own_PK = z_PAK.diagonal(dim1=1, dim2=2)
    return (own_PK - (z_PAK.sum(1) - own_PK) / (k - 1)).sum(1)


def _standard(reward: Tensor) -> Tensor:
    """Bring the rewards of each objective, the last axis, to mean 0 and standard deviation 1.

    One that is missing (NaN), as the objective does not apply, is 0 then: no better, no worse.
    """
    flat_RK = reward.reshape(-1, reward.shape[-1])
    if not bool(flat_RK.isnan().any()):
        return (reward - flat_RK.mean(0)) / flat_RK.std(0, correction=0).clamp(min=1e-6)
    centred_RK = flat_RK - flat_RK.nanmean(0)
    std_K = centred_RK.square().nanmean(0).sqrt().clamp(min=1e-6)
    return (centred_RK / std_K).nan_to_num(0.0).view_as(reward)


def _rewards(objectives: Objectives, pairs: Sequence[tuple[Prompt, str]]) -> Tensor:
    return objectives.rewards([p.text for p, _ in pairs], [a for _, a in pairs]).float().cpu()


def _with(prompt: Prompt, told: str) -> Prompt:
    return dataclasses.replace(prompt, text=f"{prompt.text}\n{told}".strip())


def _own_answers(
    policy: Policy, asked: Sequence[tuple[Prompt, str]], config: Config, tell: Tell
) -> list[tuple[str, ...]]:
    """Sample the base model, `SAMPLES` times a prompt with what is told beside it, and no w."""
    if not asked:
        return []
    tell(f"warm start: the base model answers {len(asked)} prompts")
    prompts = [_with(p, t) for p, t in asked]
    requests = [Request(prompt, None, SAMPLES) for prompt in prompts]
    with policy.reference() as base:
        rolled = sampled(policy, requests, config, ("warmup",), base)
    return [rolled.texts[i * SAMPLES : (i + 1) * SAMPLES] for i in range(len(prompts))]
