"""Objectives: anything that scores (prompts, responses), behind one interface.

An objective is given as `NAME=SOURCE`, or `NAME=SOURCE?key=value&key=value`. SOURCE is one of

    packaged:complied, packaged:harmless     the reward models of `make assets`
    Ray2333/gpt2-large-helpful-reward_model  a hub name in `HUB`: its right format is known
    PATH or owner/name                       any sequence-classification model, format given
    world:first, world:second                exact rewards of a toy world: meal_fast.data.toy
    module:function                          Python: (prompts, responses) -> R numbers

and the keys of a model, with `%0A` for a newline and `%26` for `&`, are

    format      pair                (prompt, response) as the tokenizer's pair: the default
                response            the response alone
                response+prompt     the tokenizer's pair in the reversed order
                chat                a user's and an assistant's turn, in the tokenizer's template
                template:TEXT       one text; {prompt}, {response}, {bos}, {eos}, {sep} are put in
    prompt      how the prompt is written, with {prompt}; `{post}` is a TL;DR prompt's post alone
    logit       which output is the reward; to be given where there are several
    label       the same by its name
    sign        1, or -1 when lower is better
    max_length  tokens; of longer inputs the prompt is cut from the left, and that is counted
                (default: what the model takes, 1024 at most)
    path        where the weights lie, when not at SOURCE
    device      where it runs: cpu, cuda, cuda:N (default: the option objectives_device)
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from meal_fast.common import quiet

from .assets import NAMES as ASSETS
from .assets import asset
from .devices import device_of
from .reward_models import HUB, Classifier, ClassifierScorer, with_options
from .toy import world_objective

Scorer = Callable[[Sequence[str], Sequence[str]], Any]


class ObjectiveError(ValueError):
    """An objective failed while scoring; the message names it, and the row where there is one."""


class Objectives:
    """K objectives in order. `rewards` is the only way in; it checks what comes out."""

    def __init__(self, scorers: dict[str, Scorer], device: str | torch.device = "cpu") -> None:
        if len(scorers) < 2:
            raise ValueError(
                f"objectives={list(scorers)!r}: two or more are needed, there is nothing to steer"
            )
        self.names = tuple(scorers)
        self.device = torch.device(device)  # of the rewards, wherever the scorers run
        self._scorers = scorers

    def rewards(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Raw rewards (R, K), float32 on `device`; row r scores `responses[r]` to `prompts[r]`.

        Raises ObjectiveError when an objective raises, returns another number of scores than R, or
        one that is NaN or infinite.
        """
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts, but {len(responses)} responses")
        columns = [
            _checked(name, scorer, prompts, responses) for name, scorer in self._scorers.items()
        ]
        # Looked at and copied together: every objective on a GPU has then been asked its work.
        places = {column.device for column in columns}
        at = places.pop() if len(places) == 1 else self.device
        reward_RK = torch.stack([column.to(at) for column in columns], dim=1)
        _check_finite(self.names, reward_RK, responses)
        return reward_RK.to(self.device)


@quiet()
def load_objectives(
    specs: Sequence[str],
    device: str | torch.device = "auto",  # of the models whose spec names none; auto: `to`
    to: str | torch.device = "cpu",  # of the rewards: the policy's
) -> Objectives:
    """The objectives that `specs` name (the grammar is at the head of this file).

    Raises ValueError for a broken spec, an unknown key or format, a device that is not there, or a
    model that cannot be loaded.
    """
    sources = {}
    for spec in specs:
        name, equals, source = spec.partition("=")
        if not name.strip() or not equals or not source.strip():
            raise ValueError(f"objectives: {spec!r} is not of the form NAME=SOURCE")
        if name in sources:
            raise ValueError(f"objectives: the name {name!r} is given twice")
        sources[name] = source
    # All are parsed before one is loaded: a misprint in the last must not cost the first's loading.
    parsed = {name: _parse(name, source) for name, source in sources.items()}
    if len(parsed) < 2:
        raise ValueError(f"objectives={list(specs)!r}: two or more are needed")
    given = device_of(str(to if str(device) == "auto" else device), "objectives_device")
    runs_on = {
        name: device_of(target.device, f"objective {name!r}: device") if target.device else given
        for name, target in parsed.items()
        if isinstance(target, Classifier)
    }
    scorers = {
        name: ClassifierScorer(name, target, runs_on[name])
        if isinstance(target, Classifier)
        else target
        for name, target in parsed.items()
    }
    return Objectives(scorers, to)


def _checked(
    name: str, scorer: Scorer, prompts: Sequence[str], responses: Sequence[str]
) -> Tensor:  # (R,) float32
    column = _column(scorer, prompts, responses)
    if isinstance(column, ObjectiveError):
        raise column
    if isinstance(column, Exception):
        row = _first_failing(scorer, prompts, responses)
        raise ObjectiveError(
            f"objective {name!r} raised {type(column).__name__}: {column} ({row})"
        ) from column
    if column.shape != (len(responses),):
        raise ObjectiveError(
            f"objective {name!r} returned shape {tuple(column.shape)} for {len(responses)} "
            f"responses: one number for each is needed"
        )
    return column


def _check_finite(names: Sequence[str], reward_RK: Tensor, responses: Sequence[str]) -> None:
    bad_RK = ~torch.isfinite(reward_RK)
    if bool(bad_RK.any()):
        k, row = bad_RK.T.nonzero()[0].tolist()
        raise ObjectiveError(
            f"objective {names[k]!r} returned {reward_RK[row, k].item()} for row {row}, "
            f"the response {_short(responses[row])}"
        )


def _column(scorer: Scorer, prompts: Sequence[str], responses: Sequence[str]) -> Tensor | Exception:
    """What the scorer says, float32; what it raised: a user's function, so anything."""
    try:
        return torch.as_tensor(scorer(prompts, responses), dtype=torch.float32).detach()
    except Exception as error:
        return error


def _first_failing(scorer: Scorer, prompts: Sequence[str], responses: Sequence[str]) -> str:
    """Which row alone makes the scorer raise; only called when it has raised."""
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if isinstance(_column(scorer, [prompt], [response]), Exception):
            return f"row {row}, the response {_short(response)}"
    return f"a batch of {len(responses)}, though no row of it alone"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _parse(name: str, spec: str) -> Classifier | Scorer:
    source, _, query = spec.partition("?")
    kind, _, of_world = source.partition(":")
    if kind in ("world", "meal_fast.worlds"):  # the latter in runs of before
        if query:
            raise ValueError(f"objective {name!r}: {source} takes no options, got {query!r}")
        return world_objective(of_world)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", source) and not source.startswith("packaged:"):
        if query:
            raise ValueError(
                f"objective {name!r}: a Python function takes no options, got {query!r}"
            )
        return _function(name, source)
    if source.startswith("packaged:"):
        model = source.removeprefix("packaged:")
        known = [a for a in ASSETS if a in ("complied", "harmless")]
        if model not in known:
            raise ValueError(
                f"objective {name!r}: no packaged reward model {model!r}; choose from "
                f"{', '.join(known)}"
            )
        base = Classifier(str(asset(model)))
    else:
        base = HUB.get(source, Classifier(source))
    return with_options(name, base, query)


def _function(name: str, source: str) -> Scorer:
    module_name, _, attribute = source.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"objective {name!r}: {source!r} cannot be imported ({error})") from error
    if not callable(function):
        raise ValueError(f"objective {name!r}: {source!r} is not a function")
    return function
