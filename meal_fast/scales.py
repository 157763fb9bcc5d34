"""What turns raw rewards into scores: fixed once, from the base model, saved with the run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import ScoreConfig
from .objectives import Normalizer, default_utopia
from .runs import write_atomic


@dataclass(frozen=True)
class Scales:
    """The calibration sample's statistics.

    `standard` are its mean and standard deviation, whatever normalisation the score uses: by them a
    response realises a preference (`rejection.realized=softmax`). Recipes that ask for
    no such preference fit none; a file has it for whoever does, unless a reward never varied.
    """

    normalizer: Normalizer
    utopia: tuple[float, ...]
    standard: Normalizer | None = None

    @staticmethod
    def fit(reward_RK: Tensor, config: ScoreConfig, *, standard: bool) -> Scales:
        """From the raw rewards of a calibration sample. Raises ValueError as `Normalizer.fit`."""
        normalizer = Normalizer.fit(reward_RK, config.normalization)
        utopia = config.utopia or tuple(default_utopia(normalizer.apply(reward_RK)).tolist())
        return Scales(
            normalizer, utopia, Normalizer.fit(reward_RK, "standard") if standard else None
        )

    def save(self, path: Path, names: tuple[str, ...], mu: float, reward_RK: Tensor) -> None:
        values: dict[str, Any] = {
            "names": names,
            "normalizer": self.normalizer.to_dict(),
            "utopia": self.utopia,
            "mu_evaluation": mu,
            "calibration": {
                "responses": len(reward_RK),
                "mean": reward_RK.mean(0).tolist(),
                "std": reward_RK.std(0).tolist(),
                "min": reward_RK.amin(0).tolist(),
                "max": reward_RK.amax(0).tolist(),
                # of a reward that never varies: undefined, written as 0 for JSON's sake
                "correlation": torch.nan_to_num(torch.corrcoef(reward_RK.T)).tolist(),
            },
        }
        if self.standard is not None:
            values["standard"] = self.standard.to_dict()
        write_atomic(path, json.dumps(values, indent=1).encode())

    @staticmethod
    def load(path: Path) -> Scales:
        values = json.loads(path.read_text())
        standard, sample = None, values.get("calibration", {})
        if "standard" in values:
            standard = Normalizer.from_dict(values["standard"])
        elif sample and min(sample["std"]) > 0:  # of a run whose recipe did not ask for it
            standard = Normalizer("standard", tuple(sample["mean"]), tuple(sample["std"]))
        return Scales(Normalizer.from_dict(values["normalizer"]), tuple(values["utopia"]), standard)
