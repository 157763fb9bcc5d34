"""An update's requests cut into equal parts, and what was drawn for them put together again.

Parts are cut by position: which process draws one changes nothing. The rows come back in the order
of the requests, as if they had been drawn at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from meal_fast.data_types import Rollout
from meal_fast.rollout import Request

T = TypeVar("T")


def positions(requests: Sequence[Request], parts: int) -> list[list[int]]:
    """Give the places in `requests` of each part: neighbours, of every task as many.

    Raises ValueError for fewer requests of a task than parts.
    """
    by_task: dict[int, list[int]] = {}
    for place, request in enumerate(requests):
        by_task.setdefault(request.task_id, []).append(place)
    found: list[list[int]] = [[] for _ in range(parts)]
    for places in by_task.values():
        n = len(places)
        if n < parts:
            raise ValueError(f"mesh.virtual={parts}: an update has {n} requests; lower it")
        for part, own in enumerate(found):
            own += places[part * n // parts : (part + 1) * n // parts]
    return found


def together(parts: Sequence[Rollout], places: Sequence[Sequence[int]]) -> tuple[Rollout, Tensor]:
    """Make one rollout of those of an update's parts; give also where its rows were.

    The latter, (R,) int64, are places among the rows of all parts, one after the other.
    """
    if len(parts) == 1:
        (rolled,) = parts
        return rolled, torch.arange(len(rolled.groups), device=rolled.group_R.device)
    requests = sum(map(len, places))
    at: list[tuple[int, int]] = [(0, 0)] * requests  # part, and place in it, of each request
    for part, own in enumerate(places):
        for i, place in enumerate(own):
            at[place] = part, i
    rows: list[list[int]] = [[] for _ in range(requests)]
    number = 0
    for rolled, own in zip(parts, places, strict=True):
        for group in rolled.groups:
            rows[own[group]].append(number)
            number += 1
    order = [row for of_request in rows for row in of_request]
    groups = [place for place, of_request in enumerate(rows) for _ in of_request]
    lengths = [n for rolled in parts for n in rolled.lengths]
    device, width = parts[0].group_R.device, max(p.tokens_RT.shape[1] for p in parts)
    order_R = torch.tensor(order, dtype=torch.int64, device=device)

    def all_rows(name: str) -> Tensor:
        values = [getattr(p, name) for p in parts]
        if name.endswith("_RT"):
            values = [F.pad(x, (0, width - x.shape[1])) for x in values]
        return torch.cat(values)[order_R]

    def all_of(name: str) -> tuple[Any, ...]:
        values = [x for p in parts for x in getattr(p, name)]
        return tuple(values[i] for i in order)

    def of_requests(name: str) -> tuple[Any, ...]:
        return tuple(getattr(parts[part], name)[i] for part, i in at)

    learners = parts[0].behaviour_logp_RT is None  # logp_RT: no other program has sampled
    rolled = Rollout(
        prompts=of_requests("prompts"),
        prefix=of_requests("prefix"),
        group_R=torch.tensor(groups, dtype=torch.int64, device=device),
        condition_RK=all_rows("condition_RK"),
        tokens_RT=all_rows("tokens_RT"),
        mask_RT=all_rows("mask_RT"),
        logp_RT=all_rows("logp_RT"),
        behaviour_logp_RT=None if learners else all_rows("behaviour_logp_RT"),
        finish=all_of("finish"),
        texts=all_of("texts"),
        on_policy=all(p.on_policy for p in parts),
        prefill_tokens=sum(p.prefill_tokens for p in parts),
        reused_tokens=sum(p.reused_tokens for p in parts),
        seconds=max(p.seconds for p in parts),
        task_id=of_requests("task_id") if parts[0].task_id else (),
    )
    return rolled.told(groups, [lengths[i] for i in order]), order_R


def moved(value: T, device: torch.device | str) -> T:
    """Give a value of nested dataclasses, lists, tuples and tables with its tensors on a device."""
    return _moved(value, torch.device(device))


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to(device)
    if isinstance(value, Rollout):
        fields = {f.name: _moved(getattr(value, f.name), device) for f in dataclasses.fields(value)}
        return Rollout(**fields).told(value.groups, value.lengths)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _moved(getattr(value, f.name), device) for f in dataclasses.fields(value)}
        return type(value)(**fields)
    if isinstance(value, dict):
        return {name: _moved(part, device) for name, part in value.items()}
    if isinstance(value, list):
        return [_moved(part, device) for part in value]
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(_moved(part, device) for part in value)
    return value
