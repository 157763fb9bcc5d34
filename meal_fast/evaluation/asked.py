"""What an evaluation asks: held-out prompts, ordinary ones, one more; all known before training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from meal_fast.config.config import Config
from meal_fast.config.run_dir import read_statistics
from meal_fast.data.prompts import load_prompts
from meal_fast.data_types import Prompt

if TYPE_CHECKING:
    from meal_fast.models.policy import Policy
    from meal_fast.rollout.fitting import Say

Prompts = tuple[Prompt, ...]


def load_asked(policy: Policy, config: Config) -> tuple[Prompts, Prompts]:
    """Load the held-out prompts, and the ordinary ones: empty without `evaluation.benign`.

    Raises ValueError as `load_prompts` does: nothing may be left in the evaluation split.
    """
    limit = config.prompts.max_tokens
    # a set of its own is held out as a whole; of the training set, one split is
    prompts = load_prompts(
        config.prompts.evaluation or config.prompts.train,
        "evaluation",
        whole=bool(config.prompts.evaluation),
        count_tokens=lambda text: len(policy.encode_prompt(text)),
        max_tokens=limit,
    )
    more = config.evaluation.benign
    return prompts, load_prompts(more, "evaluation", max_tokens=limit) if more else ()


def choose_asked(
    policy: Policy, config: Config, prompts: Sequence[Prompt], benign: Sequence[Prompt], say: Say
) -> tuple[Prompts, Prompts, str]:
    """Choose of both the first in the order of their ids, and give `evaluation.ask`.

    What the model's context has no room for is left out, and `say` told. Raises ValueError where
    nothing is left.
    """
    from meal_fast.rollout.fitting import context_room, fitting

    def first(found: Sequence[Prompt], option: str) -> Prompts:
        fit = fitting(policy, found, config, option, say)
        return tuple(sorted(fit, key=lambda p: p.id)[: config.evaluation.prompts])

    ask = config.evaluation.ask
    if ask and len(policy.encode_prompt(ask)) > context_room(policy, config):
        say(f"evaluation.ask: is left out: it exceeds the model's context of {policy.context}")
        ask = ""
    ordinary = first(benign, "evaluation.benign") if benign else ()
    return first(prompts, "prompts.evaluation"), ordinary, ask


def check_ahead(policy: Policy, config: Config, say: Say) -> None:
    """Raise ValueError, before training, for what an evaluation after it would end with."""
    try:
        choose_asked(policy, config, *load_asked(policy, config), say)
        if shared := config.evaluation.statistics:
            names = tuple(read_statistics(Path(shared))["names"])
            if names != config.names:
                raise ValueError(
                    f"evaluation.statistics={shared!r}: of objectives {names}, not {config.names}"
                )
    except ValueError as error:
        raise ValueError(f"the evaluation after training: {error}; or add --no-evaluate") from None
