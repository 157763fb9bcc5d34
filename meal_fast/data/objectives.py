"""Objectives: anything that scores (prompts, responses), behind one interface.

An objective is given as `NAME=SOURCE`, or `NAME=SOURCE?key=value&key=value`. SOURCE is one of

    packaged:complied, packaged:harmless     the reward models of `make assets`
    Ray2333/gpt2-large-helpful-reward_model  a hub name in `HUB`: its right format is known
    PATH or owner/name                       any sequence-classification model, format given
    world:first, world:second                exact rewards of a toy world: meal_fast.data.toy
    module:function, module:Class.method     Python: (prompts, responses) -> R numbers, or None
                                             where the objective does not apply to a response
    http(s)://HOST:PORT/PATH                 a reward server: its keys are in `http_objective`

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

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from meal_fast.common import quiet
from meal_fast.config.schema import check_names
from meal_fast.config.sources import SCHEMES, WORLDS, is_outside

from .assets import NAMES as ASSETS
from .assets import asset
from .devices import device_of
from .http_objective import HttpObjective, Server, parse_server
from .objective_calls import ObjectiveError, Scorer, column, never, short
from .objective_sources import check_no_function, imported
from .reward_models import HUB, Classifier, ClassifierScorer, with_options
from .toy import world_objective

__all__ = ["ObjectiveError", "Objectives", "Scorer", "is_outside", "load_objectives"]


class Objectives:
    """K objectives in order. `rewards` is the only way in; it checks what comes out.

    An objective may give None for a response that it does not apply to: its reward is then NaN in
    what `rewards` returns, and nowhere else is there a NaN. `partial` says whether that has ever
    happened.

    Args:
        device: of the rewards, wherever the scorers run.
        limits: seconds that a call of an objective may take for each 256 responses; 0, or no
            entry: as long as it likes.
        needs_all: what cannot do without a reward, for the message that refuses a None; empty:
            None is allowed.
    """

    stopping: Callable[[], bool] = staticmethod(never)  # whether the run is to end

    def __init__(
        self,
        scorers: dict[str, Scorer],
        device: str | torch.device = "cpu",
        *,
        limits: dict[str, float] | None = None,
        needs_all: str = "",
    ) -> None:
        if len(scorers) < 2:
            raise ValueError(
                f"objectives={list(scorers)!r}: two or more are needed, there is nothing to steer"
            )
        self.names = tuple(scorers)
        self.device = torch.device(device)
        self.partial = False
        self._scorers, self._limits, self._needs_all = scorers, limits or {}, needs_all
        self._counted: dict[str, dict[str, int]] = {}

    def rewards(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Raw rewards (R, K), float32 on `device`; row r scores `responses[r]` to `prompts[r]`.

        Raises ObjectiveError when an objective raises, is late, returns another number of scores
        than R, or one that is NaN or infinite, and when no objective applies to a row.
        """
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts, but {len(responses)} responses")
        found = [
            column(name, scorer, prompts, responses, self._limits.get(name, 0.0), self.stopping)
            for name, scorer in self._scorers.items()
        ]
        # Looked at and copied together: every objective on a GPU has then been asked its work.
        columns = [values for values, _ in found]
        places = {values.device for values in columns}
        at = places.pop() if len(places) == 1 else self.device
        reward_RK = torch.stack([values.to(at) for values in columns], dim=1)
        _check_finite(self.names, reward_RK, responses)
        reward_RK = reward_RK.to(self.device)
        if all(none is None for _, none in found):
            return reward_RK
        return self._without(reward_RK, [none for _, none in found], prompts, responses)

    def counts(self) -> dict[str, dict[str, int]]:
        """Count the rows that had to be cut for a reward model since this was last asked.

        {"cut_prompts": {objective: rows}, "cut_responses": …}, with what is not zero alone.
        """
        counted: dict[str, dict[str, int]] = {}
        for name, scorer in self._scorers.items():
            if isinstance(scorer, ClassifierScorer):
                before = self._counted.get(name, {})
                self._counted[name] = scorer.cuts
                for what, n in scorer.cuts.items():
                    if more := n - before.get(what, 0):
                        counted.setdefault(what, {})[name] = more
        return counted

    def _without(
        self,
        reward_RK: Tensor,
        none: Sequence[Tensor | None],
        prompts: Sequence[str],
        responses: Sequence[str],
    ) -> Tensor:
        """NaN where an objective does not apply."""
        nowhere = torch.zeros(len(responses), dtype=torch.bool)
        none_RK = torch.stack([nowhere if one is None else one for one in none], dim=1)
        if self._needs_all:
            row, k = none_RK.nonzero()[0].tolist()
            raise ObjectiveError(
                f"objective {self.names[k]!r} returned None for row {row}, the response "
                f"{short(responses[row])}: {self._needs_all} needs every reward of every response; "
                "return a number, or choose another recipe"
            )
        if bool(none_RK.all(1).any()):
            row = int(none_RK.all(1).nonzero()[0, 0])
            raise ObjectiveError(
                f"every objective returned None for row {row}, the response "
                f"{short(responses[row])} to {short(prompts[row])}: one at least must apply"
            )
        self.partial = True
        return reward_RK.masked_fill(none_RK.to(reward_RK.device), torch.nan)


@quiet()
def load_objectives(
    specs: Sequence[str],
    device: str | torch.device = "auto",  # of the models whose spec names none; auto: `to`
    to: str | torch.device = "cpu",  # of the rewards: the policy's
    *,
    timeout: float = 0.0,  # seconds of a Python function's call, for each 256 responses; 0: no end
    needs_all: str = "",  # what cannot do without a reward, as `Objectives` has it
) -> Objectives:
    """The objectives that `specs` name (the grammar is at the head of this file).

    Raises ValueError for a broken spec, an unknown key or format, a device that is not there, a
    model that cannot be loaded, or a function that cannot be imported.
    """
    sources: dict[str, str] = {}
    for spec in specs:
        name, equals, source = spec.partition("=")
        if not name.strip() or not equals or not source.strip():
            raise ValueError(f"objectives: {spec!r} is not of the form NAME=SOURCE")
        check_names([*sources, name])
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
    # A server that is not there is told before a model is loaded.
    servers = {n: HttpObjective(n, s) for n, s in parsed.items() if isinstance(s, Server)}
    scorers: dict[str, Scorer] = {}
    for name, target in parsed.items():
        if isinstance(target, Classifier):
            scorers[name] = ClassifierScorer(name, target, runs_on[name])
        else:
            scorers[name] = servers[name] if isinstance(target, Server) else target
    limits = {name: timeout for name, source in sources.items() if is_outside(source)}
    return Objectives(scorers, to, limits=limits, needs_all=needs_all)


def _check_finite(names: Sequence[str], reward_RK: Tensor, responses: Sequence[str]) -> None:
    bad_RK = ~torch.isfinite(reward_RK)
    if bool(bad_RK.any()):
        k, row = bad_RK.T.nonzero()[0].tolist()
        raise ObjectiveError(
            f"objective {names[k]!r} returned {reward_RK[row, k].item()} for row {row}, "
            f"the response {short(responses[row])}"
        )


def _parse(name: str, spec: str) -> Classifier | Server | Scorer:
    source, _, query = spec.partition("?")
    _, _, of_world = source.partition(":")
    if source.startswith(WORLDS):
        if query:
            raise ValueError(f"objective {name!r}: {source} takes no options, got {query!r}")
        return world_objective(of_world)
    if source.startswith(SCHEMES):
        return parse_server(name, source, query)
    if is_outside(source):
        if query:
            raise ValueError(
                f"objective {name!r}: a Python function takes no options, got {query!r}"
            )
        function: Scorer = imported(name, source)
        return function
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
        check_no_function(name, source)
        base = HUB.get(source, Classifier(source))
    return with_options(name, base, query)
