"""The loop, the recipes and what they are made of. Start with `trainer.Trainer.meta_step`.

What it exports is imported when it is asked for: `console` and `loggers` need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .recipes import RECIPES, recipe_of
    from .trainer import Trainer

__all__ = ["RECIPES", "Trainer", "recipe_of"]

_HOMES = {"RECIPES": "recipes", "Trainer": "trainer", "recipe_of": "recipes"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
