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

# An objective whose spread is this many times below another's: of the variance of their evenly
# weighted sum its part is a hundredth.
VANISHING = 10


def constant(values: Sequence[float], like: Tensor) -> Tensor:
    """(K,) in the dtype and on the device of `like`; copied there once, and not to be changed."""
    return _constant(tuple(values), like.dtype, like.device)


@lru_cache(maxsize=64)
def _constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def restricted(w_RK: Tensor, reward_RK: Tensor) -> Tensor:
    """Restrict preferences to the objectives that apply to a row, those whose reward is no NaN.

    w'_k = w_k / sum of w over those that apply, 0 for the others; where nothing of w is left, all
    that apply alike. A row to which all apply keeps its w.
    """
    there_RK = ~reward_RK.isnan()
    left_RK = w_RK * there_RK
    total_R1 = left_RK.sum(1, keepdim=True)
    alike_RK = there_RK / there_RK.sum(1, keepdim=True)
    narrowed_RK = torch.where(total_R1 > 0, left_RK / total_R1, alike_RK)
    return torch.where(there_RK.all(1, keepdim=True), w_RK, narrowed_RK.to(w_RK.dtype))


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
    def fit(cls, reward_RK: Tensor, mode: str, names: Sequence[str] = ()) -> Normalizer:
        """The statistics of a calibration sample (R, K), R ≥ 2, each of the rows it applies to.

        Raises ValueError for a reward that is infinite, and for an objective that applies to no
        response of the sample (all NaN) or gives every one the same reward: it cannot be
        normalised, nor steered. `names`: of the objectives, for that message.
        """
        if reward_RK.ndim != 2 or reward_RK.shape[0] < 2:
            raise ValueError(
                f"calibration rewards of shape {tuple(reward_RK.shape)}: at least 2 rows are needed"
            )
        reward = reward_RK.double()
        if torch.isinf(reward).any():
            raise ValueError("calibration rewards must be finite")
        for k, (low, high) in enumerate(zip(*_ends(reward), strict=True)):
            who = f"objective {names[k]!r}" if names else f"objective {k} (from 0)"
            if low > high:
                raise ValueError(
                    f"{who} applies to no response of the calibration sample: use a larger sample "
                    "(score.calibration), or other prompts"
                )
            if mode != "none" and low == high:
                raise ValueError(
                    f"{who} gives every response of the calibration sample "
                    f"the reward {low.item():g}: use a larger sample or another objective"
                )
        zero, one = torch.zeros(reward.shape[1]), torch.ones(reward.shape[1])
        if mode in ("standard", "tanh"):
            zero, one = _mean(reward), _std(reward)
        elif mode == "max":
            one = reward.abs().nan_to_num(0.0).amax(dim=0)
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
    low, high = _ends(normalized_RK)
    return high + 0.1 * (high - low)


def _ends(reward_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest of what is there (K,); inf and -inf where nothing is."""
    missing = reward_RK.isnan()
    low = reward_RK.masked_fill(missing, torch.inf).amin(dim=0)
    return low, reward_RK.masked_fill(missing, -torch.inf).amax(dim=0)


def _mean(reward_RK: Tensor) -> Tensor:
    """Means of what is there (K,)."""
    return reward_RK.nanmean(dim=0) if reward_RK.isnan().any() else reward_RK.mean(dim=0)


def _std(reward_RK: Tensor) -> Tensor:
    """Standard deviations (n - 1) of what is there (K,)."""
    if not reward_RK.isnan().any():
        return reward_RK.std(dim=0)
    n = (~reward_RK.isnan()).sum(0)
    return ((reward_RK - _mean(reward_RK)).square().nansum(0) / (n - 1)).sqrt()


def _correlation(reward_RK: Tensor) -> Tensor:
    """Correlations (K, K), each over the rows that both apply to; 0 where there is none."""
    if not reward_RK.isnan().any():
        return torch.nan_to_num(torch.corrcoef(reward_RK.T))
    k = reward_RK.shape[1]
    found = torch.zeros(k, k)
    for i in range(k):
        for j in range(k):
            both = ~reward_RK[:, [i, j]].isnan().any(1)
            if int(both.sum()) > 1:
                found[i, j] = torch.corrcoef(reward_RK[both][:, [i, j]].T)[0, 1]
    return torch.nan_to_num(found)


def vanishing(normalized_RK: Tensor, names: Sequence[str], mode: str) -> str:
    """Say which objective's spread vanishes beside another's, and the remedy; empty: none does.

    The scores of a group's responses differ by w_k times each objective's spread: where that is
    below a tenth of another's, it has next to no say at most w.
    """
    spread = _std(normalized_RK.double()).nan_to_num(0.0).tolist()
    least, most = min(spread), max(spread)
    if least * VANISHING >= most:
        return ""
    small, large = names[spread.index(least)], names[spread.index(most)]
    return (
        f"objective {small!r} hardly varies beside {large!r}: in the calibration sample its "
        f"normalised reward has a standard deviation of {least:.3g}, that of {large!r} {most:.3g} "
        f"(score.normalization={mode}), so that the policy will follow {large!r} alone; use "
        "--score.normalization standard, which gives all the same spread"
    )


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
    def fit(
        reward_RK: Tensor, config: ScoreConfig, *, standard: bool, names: Sequence[str] = ()
    ) -> Scales:
        """From the raw rewards of a calibration sample. Raises ValueError as `Normalizer.fit`."""
        normalizer = Normalizer.fit(reward_RK, config.normalization, names)
        utopia = config.utopia or tuple(default_utopia(normalizer.apply(reward_RK)).tolist())
        return Scales(
            normalizer, utopia, Normalizer.fit(reward_RK, "standard", names) if standard else None
        )

    def save(self, path: Path, names: tuple[str, ...], mu: float, reward_RK: Tensor) -> None:
        reward_RK = reward_RK.double()  # squares of large ones are no float32
        low, high = _ends(reward_RK)
        normalized_RK = self.normalizer.apply(reward_RK)
        values: dict[str, Any] = {
            "names": names,
            "normalizer": self.normalizer.to_dict(),
            "utopia": self.utopia,
            "mu_evaluation": mu,
            "calibration": {
                "responses": len(reward_RK),
                "applies_to": (~reward_RK.isnan()).sum(0).tolist(),
                "mean": _mean(reward_RK).tolist(),
                # of a reward that never varies, undefined ones are written as 0 for JSON's sake
                "std": _std(reward_RK).nan_to_num(0.0).tolist(),
                "min": low.tolist(),
                "max": high.tolist(),
                "correlation": _correlation(reward_RK).tolist(),
                "normalized_std": _std(normalized_RK).nan_to_num(0.0).tolist(),
            },
        }
        if warning := vanishing(normalized_RK, names, self.normalizer.mode):
            values["warning"] = warning
        if self.standard is not None:
            values["standard"] = self.standard.to_dict()
        try:
            text = json.dumps(values, indent=1, allow_nan=False)
        except ValueError:
            raise ValueError(
                f"rewards from {low.tolist()} to {high.tolist()} of {', '.join(names)}: too large "
                "to be averaged; give them in other units"
            ) from None
        write_atomic(path, text)

    @staticmethod
    def load(path: Path) -> Scales:
        values = read_statistics(path)
        standard, sample = None, values.get("calibration", {})
        if "standard" in values:
            standard = Normalizer.from_dict(values["standard"])
        elif sample and min(sample["std"]) > 0:  # of a run whose recipe did not ask for it
            standard = Normalizer("standard", tuple(sample["mean"]), tuple(sample["std"]))
        return Scales(Normalizer.from_dict(values["normalizer"]), tuple(values["utopia"]), standard)
