"""Before a run's first update: the statistics that rewards are brought to."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from meal_fast.config.config import Config
from meal_fast.data import preferences
from meal_fast.data.objectives import Objectives
from meal_fast.data.reward_statistics import Scales, vanishing
from meal_fast.data_types import Prompt
from meal_fast.models.policy import Policy
from meal_fast.rollout import Request

from .sampled import sampled


def calibrate(
    policy: Policy,
    objectives: Objectives,
    prompts: Sequence[Prompt],
    config: Config,
    out: Path,
    *,
    standard: bool,
) -> Scales:
    """Fit statistics and z* to the base model's responses to training prompts, and write them.

    standard: whether `Scales.standard` is needed too.
    """
    k, count = len(config.names), config.score.calibration
    grid = preferences.lattice(k, config.preference.grid or 11)
    requests = [
        Request(prompt, grid[(i * 7) % len(grid)], max(1, count // len(prompts)))
        for i, prompt in enumerate(prompts[:count])
    ]
    with policy.reference() as base:
        rolled = sampled(policy, requests, config, ("calibration",), base)
    texts = [rolled.prompts[g].text for g in rolled.group_R.tolist()]
    reward = objectives.rewards(texts, rolled.texts)
    scales = Scales.fit(reward, config.score, standard=standard, names=config.names)
    scales.save(out / "statistics.json", config.names, config.score.mu, reward)
    normalized = scales.normalizer.apply(reward)
    if warning := vanishing(normalized, config.names, config.score.normalization):
        warnings.warn(warning, stacklevel=2)
    return scales
