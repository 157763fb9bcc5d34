"""What turns raw rewards into scores: fixed once, from the base model, saved with the run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meal_fast.common import write_atomic
from meal_fast.config.config import ScoreConfig
from meal_fast.config.run_dir import read_statistics


def constant(values: Sequence[float], like: Tensor) -> Tensor:
    """(K,) in the dtype and on the device of `like`; copied there once, and not to be changed."""
    return _constant(tuple(values), like.dtype, like.device)


@lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


@dataclass(frozen=True)
class Normalizer:
    """Reward normalisation, fitted once on a calibration sample and saved with the run [P].

    r̃ = (r − offset) / divisor, per objective: `max` offset 0, divisor max|r| (the default);
    `standard` mean and standard deviation (n − 1); `tanh` that, then tanh; `none` 0 and 1.
    """

    mode: str
    offset: tuple[float, ...]  # (K,)
    divisor: tuple[float, ...]  # (K,)

    def __post_init__(self) -> None:
        if self.mode not in ("max", "standard", "tanh", "none"):
            raise ValueError(
                f"score.normalization={self.mode!r}: choose from max, standard, tanh, none"
            )
        if len(self.offset) != len(self.divisor) or not self.offset:
            raise ValueError("a normaliser needs one offset and one divisor per objective")
        values = torch.tensor([self.offset, self.divisor], dtype=torch.float64)
        if not torch.isfinite(values).all() or not (values[1] > 0).all():
            raise ValueError(f"divisors must be positive and finite, got {self.divisor}")

    @classmethod
    def fit(cls, reward_RK: Tensor, mode: str) -> Normalizer:
        """The statistics of a calibration sample (R, K), R ≥ 2.

        Raises ValueError for a reward that is not finite, and for an objective that gives every
        response of the sample the same reward: it cannot be normalised, nor steered.
        """
        if reward_RK.ndim != 2 or reward_RK.shape[0] < 2:
            raise ValueError(
                f"calibration rewards of shape {tuple(reward_RK.shape)}: at least 2 rows are needed"
            )
        reward = reward_RK.double()
        if not torch.isfinite(reward).all():
            raise ValueError("calibration rewards must be finite")
        if mode != "none":
            for k, (low, high) in enumerate(zip(*reward.aminmax(dim=0), strict=True)):
                if low == high:
                    raise ValueError(
                        f"objective {k} (from 0) gives every response of the calibration sample "
                        f"the reward {low.item():g}: use a larger sample or another objective"
                    )
        zero, one = torch.zeros(reward.shape[1]), torch.ones(reward.shape[1])
        if mode in ("standard", "tanh"):
            zero, one = reward.mean(dim=0), reward.std(dim=0)
        elif mode == "max":
            one = reward.abs().amax(dim=0)
        return cls(mode, tuple(zero.tolist()), tuple(one.tolist()))

    @property
    def linear(self) -> bool:
        """Whether offset and divisor are all there is to it (not so for `tanh`)."""
        return self.mode != "tanh"

    def apply(self, reward_RK: Tensor) -> Tensor:
        """r̃ (R, K) in the dtype and on the device of `reward_RK`."""
        if reward_RK.shape[-1] != len(self.offset):
            raise ValueError(
                f"rewards of {reward_RK.shape[-1]} objectives, statistics of {len(self.offset)}"
            )
        offset, divisor = (constant(v, reward_RK) for v in (self.offset, self.divisor))
        scaled = (reward_RK - offset) / divisor
        return scaled.tanh() if self.mode == "tanh" else scaled

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; `from_dict` reads them back exactly."""
        return {"mode": self.mode, "offset": list(self.offset), "divisor": list(self.divisor)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Normalizer:
        """What `to_dict` gave. Raises ValueError for anything else."""
        if not isinstance(values, dict) or set(values) != {"mode", "offset", "divisor"}:
            raise ValueError(f"not a normaliser's values: {values!r}")
        return cls(values["mode"], tuple(values["offset"]), tuple(values["divisor"]))


def default_utopia(normalized_RK: Tensor) -> Tensor:
    """z* (K,): per objective the calibration sample's maximum plus a tenth of its range [R]."""
    low, high = normalized_RK.aminmax(dim=0)
    return high + 0.1 * (high - low)


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
        write_atomic(path, json.dumps(values, indent=1))

    @staticmethod
    def load(path: Path) -> Scales:
        values = read_statistics(path)
        standard, sample = None, values.get("calibration", {})
        if "standard" in values:
            standard = Normalizer.from_dict(values["standard"])
        elif sample and min(sample["std"]) > 0:  # of a run whose recipe did not ask for it
            standard = Normalizer("standard", tuple(sample["mean"]), tuple(sample["std"]))
        return Scales(Normalizer.from_dict(values["normalizer"]), tuple(values["utopia"]), standard)
