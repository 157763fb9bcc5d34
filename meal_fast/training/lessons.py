"""What a supervised start learns from: prompts, and the answer to each that every objective likes.

The base model answers prompts of its own, `SAMPLES` times each. An objective's own answer is the
best of these by its reward; or it comes from a file (`warmup.answers`). An ordinary prompt has one
answer for all objectives: the best by the mean of the rewards, each in standard deviations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from meal_fast.config.config import Config
from meal_fast.data.answers import AnswerRows, read_answer_rows
from meal_fast.data.objectives import Objectives
from meal_fast.data.prompts import held_out, in_turn, load_prompts
from meal_fast.data_types import Prompt
from meal_fast.models.policy import Policy
from meal_fast.rollout import Request, Sampling, open_backend

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


def read_sources(config: Config) -> dict[int, AnswerRows]:
    """Read the answers that do not come from the base model, by objective. Cheap: files alone.

    Raises ValueError for a file that has none, or none but to prompts of the evaluation.
    """
    sources = dict(entry.split("=", 1) for entry in config.warmup.answers)
    unseen = held_out(config.prompts.train, config.prompts.evaluation)
    return {
        k: read_answer_rows(sources[name], unseen)
        for k, name in enumerate(config.names)
        if sources.get(name, "own") != "own"
    }


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
    options, given = config.warmup, read_sources(config)
    count = max(options.draws // SAMPLES, 1)
    unseen = held_out(config.prompts.train, config.prompts.evaluation)
    refused = 0
    chosen: list[list[Prompt]] = []
    for source, own, most in (
        (options.prompts, prompts, count),
        (options.benign, (), round(count * options.benign_share)),
    ):
        found = load_prompts(source, "train") if source else own
        seen = [p for p in found if p.id not in unseen]
        refused += len(found) - len(seen)
        limit = config.prompts.max_tokens
        fit = [p for p in seen if len(policy.encode_prompt(p.text)) <= limit]
        chosen.append(in_turn(fit, 0, min(most, len(fit)), config.seed, f"warmup {source}"))
    divided, plain = chosen
    answers = _own_answers(policy, [*divided, *plain], config, tell)
    tell(f"warm start: scoring {sum(map(len, answers))} answers")
    asked = [p for p, own in zip([*divided, *plain], answers, strict=True) for _ in own]
    reward_RK = _rewards(objectives, asked, [a for own in answers for a in own])
    mean_K, std_K = reward_RK.mean(0), reward_RK.std(0).clamp(min=1e-6)
    z_PSK = ((reward_RK - mean_K) / std_K).view(len(answers), SAMPLES, -1)
    lessons = []
    for i, prompt in enumerate(divided):
        best = [answers[i][int(s)] for s in z_PSK[i].argmax(0)]
        other = {k: rows.of(prompt, config.seed, "warmup", k) for k, rows in given.items()}
        if None not in other.values():
            whole = tuple(other.get(k) or own for k, own in enumerate(best))
            lessons.append(Lesson(prompt, whole))
    if not lessons:
        raise ValueError(
            f"warmup.answers={config.warmup.answers}: of {len(divided)} prompts none has an answer "
            "for every objective; give rows to the prompts of warmup.prompts, or rows without one"
        )
    apart_P = _apart(objectives, lessons, mean_K, std_K)
    kept = sorted(apart_P.argsort(descending=True, stable=True)[: -(-len(lessons) // 2)].tolist())
    ordinary = tuple(
        Lesson(prompt, (answers[i][int(z_PSK[i].mean(1).argmax())],) * len(config.names))
        for i, prompt in enumerate(plain, start=len(divided))
    )
    counts = {
        "tried": len(divided),
        "without_answer": len(divided) - len(lessons),
        "opposed": len(kept),
        "ordinary": len(ordinary),
        "apart": float(apart_P[kept].mean()),
        "prompts_of_the_evaluation": refused,
        "refused_rows": {config.names[k]: dict(rows.refused) for k, rows in given.items()},
    }
    return Lessons(tuple(lessons[i] for i in kept), ordinary, counts)


def _apart(
    objectives: Objectives, lessons: Sequence[Lesson], mean_K: Tensor, std_K: Tensor
) -> Tensor:
    """Measure how differently each lesson's answers (P,) are liked."""
    k = len(mean_K)
    asked = [lesson.prompt for lesson in lessons for _ in range(k)]
    reward_RK = _rewards(objectives, asked, [a for lesson in lessons for a in lesson.answers])
    z_PAK = ((reward_RK - mean_K) / std_K).view(len(lessons), k, k)  # answer, judge
    own_PK = z_PAK.diagonal(dim1=1, dim2=2)
    return (own_PK - (z_PAK.sum(1) - own_PK) / (k - 1)).sum(1)


def _rewards(objectives: Objectives, prompts: Sequence[Prompt], answers: Sequence[str]) -> Tensor:
    return objectives.rewards([p.text for p in prompts], list(answers)).float().cpu()


def _own_answers(
    policy: Policy, prompts: Sequence[Prompt], config: Config, tell: Tell
) -> list[tuple[str, ...]]:
    """Sample the base model, which is told no preference, `SAMPLES` times a prompt."""
    options = config.rollout
    tell(f"warm start: the base model answers {len(prompts)} prompts")
    sampling = Sampling(options.max_new_tokens, options.temperature, config.seed, ("warmup",))
    with (
        policy.reference() as base,
        open_backend(
            options.backend,
            policy,
            network=base,
            max_cache_bytes=options.max_cache_bytes,
            join=True,
        ) as sampler,
    ):
        rolled = sampler.generate([Request(p, None, SAMPLES) for p in prompts], sampling)
    return [rolled.texts[i * SAMPLES : (i + 1) * SAMPLES] for i in range(len(prompts))]
