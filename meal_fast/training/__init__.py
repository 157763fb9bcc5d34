"""The loop, the recipes and what they are made of. Start with `trainer.Trainer.meta_step`."""

from .recipes import RECIPES, recipe_of
from .trainer import Trainer

__all__ = ["RECIPES", "Trainer", "recipe_of"]
