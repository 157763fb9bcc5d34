"""Options, presets, the command line, run folders. Imports no torch."""

from .algorithms import MealConfig, ParmConfig, RejectionConfig, RicConfig
from .config import (
    Config,
    EvaluationConfig,
    GRPOConfig,
    MetaConfig,
    PolicyConfig,
    PreferenceConfig,
    PromptConfig,
    RolloutConfig,
    ScoreConfig,
    from_dict,
    load_toml,
    to_dict,
)
from .presets import PRESETS, preset

__all__ = [
    "PRESETS",
    "Config",
    "EvaluationConfig",
    "GRPOConfig",
    "MealConfig",
    "MetaConfig",
    "ParmConfig",
    "PolicyConfig",
    "PreferenceConfig",
    "PromptConfig",
    "RejectionConfig",
    "RicConfig",
    "RolloutConfig",
    "ScoreConfig",
    "from_dict",
    "load_toml",
    "preset",
    "to_dict",
]
