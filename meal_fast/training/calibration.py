"""Before a run's first update: the statistics that rewards are brought to."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

from meal_fast.config.config import Config
from meal_fast.data import preferences
from meal_fast.data.objectives import Objectives
from meal_fast.data.preferences import Preference
from meal_fast.data.reward_statistics import Scales, vanishing
from meal_fast.data_types import Prompt
from meal_fast.models.policy import Policy
from meal_fast.rollout import Request

from .sampled import sampled


def spread(prompts: Sequence[Prompt], grid: Sequence[Preference], samples: int) -> list[Request]:
    """Ask each prompt for `samples` responses, all together under as many preferences as can be.

    Neighbours in the grid are far apart in the sample: step by step 7 places on, or as many near 7
    as share no divisor with the grid's length, so that the whole grid has its turn. Where there are
    fewer prompts than preferences, a prompt's samples are shared out among several.
    """
    n = len(grid)
    stride = min((s for s in range(1, 7 + n) if math.gcd(s, n) == 1), key=lambda s: abs(s - 7))
    wanted = min(n, len(prompts) * samples)
    each = min(-(-wanted // len(prompts)), samples)  # preferences of a prompt
    shares = [samples // each + (j < samples % each) for j in range(each)]
    return [
        Request(prompt, grid[((i * each + j) * stride) % n], share)
        for i, prompt in enumerate(prompts)
        for j, share in enumerate(shares)
    ]


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
    requests = spread(prompts[:count], grid, max(1, count // len(prompts)))
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
