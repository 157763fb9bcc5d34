"""Several models with a preference each, and what they make of a w between theirs.

`interpolate`, Rewarded Soups: theta(w) = sum_k w_k theta_k, of the models of the K corners [P].
`nearest`, MORLHF: the model whose own preference is nearest to w [R]; the method has no other w.

With LoRA, what is interpolated are the merged weights W + scale * B_k A_k [R]: so it is with all
parameters trained, and the interpolated factors would have the products w_j w_k B_j A_k besides
(the published code of Rewarded Soups interpolates factors). The sum is itself of low rank and kept
so, exactly: A = [A_1; ...; A_K] and B = [w_1 B_1, ..., w_K B_K] have the product sum_k w_k B_k A_k.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from meal_fast.common import require_simplex
from meal_fast.config.config import Config
from meal_fast.config.recipes import spec_of
from meal_fast.config.resume import how_to_finish
from meal_fast.config.run_dir import policy_folder
from meal_fast.config.sealed import FAMILY as FILE
from meal_fast.config.sealed import check_policy
from meal_fast.data.preferences import Preference

from .chat_template import kept_template
from .guided import Guides
from .policy import Policy, load_policy

Rule = Literal["interpolate", "nearest"]


@dataclass(frozen=True)
class Family:
    """M models of one architecture.

    Raises ValueError for models whose parameters differ in name or shape, for preferences that
    repeat, and where `interpolate` has other models than the K corners.
    """

    weights: tuple[Preference, ...]  # M, the preference of each model
    models: tuple[Mapping[str, Tensor], ...]  # M, its trained parameters by name, float32
    rule: Rule

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ValueError(f"rule={self.rule!r}: choose from {', '.join(get_args(Rule))}")
        if not len(set(self.weights)) == len(self.weights) == len(self.models) > 0:
            raise ValueError(
                f"weights={self.weights}: a family has one model or more, each of another "
                f"preference; here are {len(self.models)} models"
            )
        corners = sorted(self.weights) == sorted(_corners(len(self.weights[0])))
        if self.rule == "interpolate" and not corners:
            raise ValueError(
                f"weights={self.weights}: to interpolate takes the models of the corners, one an "
                "objective and no others"
            )
        for w, model in zip(self.weights[1:], self.models[1:], strict=True):
            _check_alike(
                f"the models of w={self.weights[0]} and w={w}",
                self.models[0],
                model,
                "train both from one model with the same options",
            )

    def shares(self, w: Preference) -> tuple[float, ...]:
        """Give each model's share (M,) in what serves w. Raises ValueError off the simplex."""
        require_simplex(w, [f"entry {i}" for i in range(len(self.weights[0]))])
        if self.rule == "interpolate":
            return tuple(w[corner.index(1.0)] for corner in self.weights)
        # Rounded, so that of equally near models the first is taken on every machine.
        distances = [
            round(sum((a - b) ** 2 for a, b in zip(w, own, strict=True)), 9) for own in self.weights
        ]
        nearest = distances.index(min(distances))
        return tuple(float(j == nearest) for j in range(len(self.weights)))

    def groups(self, weights: Sequence[Preference]) -> list[list[int]]:
        """Group the places in `weights` that the same parameters serve."""
        found: dict[tuple[float, ...], list[int]] = {}
        for place, w in enumerate(weights):
            found.setdefault(self.shares(w), []).append(place)
        return list(found.values())

    def theta(self, w: Preference) -> dict[str, Tensor]:
        """Give the parameters that serve w, by name. LoRA's of m models: m times the rank."""
        parts = [(s, model) for s, model in zip(self.shares(w), self.models, strict=True) if s]
        if len(parts) == 1 and parts[0][0] == 1:
            return dict(parts[0][1])
        merged = {}
        for name in self.models[0]:
            values = [(share, model[name]) for share, model in parts]
            if ".lora_A." in name:
                merged[name] = torch.cat([value for _, value in values])
            elif ".lora_B." in name:
                merged[name] = torch.cat([share * value for share, value in values], 1)
            else:
                merged[name] = torch.stack([share * value for share, value in values]).sum(0)
        return merged

    @contextmanager
    def at(self, policy: Policy, w: Preference) -> Iterator[None]:
        """Make the policy what serves w, within it; afterwards it is what it was before.

        Raises ValueError for a policy whose trained parameters are not the models'.
        """
        _check_alike(
            "the policy and the family's models",
            policy.named,
            self.models[0],
            "load the policy that they were trained from, with the run's own options",
        )
        with policy.holding(self.theta(w)):
            yield

    def to_bytes(self, names: Sequence[str]) -> bytes:
        """Write a safetensors file: tensors `0.NAME`, `1.NAME`, …; as metadata what they are of."""
        tensors = {
            f"{j}.{name}": value.detach().cpu().contiguous()
            for j, model in enumerate(self.models)
            for name, value in model.items()
        }
        about = {"rule": self.rule, "weights": self.weights, "objectives": names}
        # One entry: of several the order in the file would differ from run to run.
        return save(tensors, {"family": json.dumps(about)})

    @staticmethod
    def load(path: Path) -> Family:
        """Raise ValueError where there is no such file, or it holds no family."""
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["family"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            weights = tuple(tuple(map(float, w)) for w in about["weights"])
            models: list[dict[str, Tensor]] = [{} for _ in weights]
            for key, value in tensors.items():
                place, _, name = key.partition(".")
                models[int(place)][name] = value
            return Family(weights, tuple(models), about["rule"])
        except (
            *(OSError, SafetensorError, LookupError),
            *(ValueError, TypeError, RecursionError),
        ) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{str(path)!r}: no models of a family ({reason}); finish the run with "
                f"{how_to_finish(path.parent)}"
            ) from None


def load_served(run: Path, config: Config) -> tuple[Policy, Family | Guides | None]:
    """Load what answers for a finished run: its policy, or what `at` makes of it at a w.

    Of a family the policy is the base model until then. Raises ValueError for a run without them,
    and for files that are not what training wrote.
    """
    trained, template = policy_folder(run), kept_template(run)
    check_policy(run)
    if not config.model_points:
        try:
            policy = load_policy(
                config.policy, config.names, seed=config.seed, trained=trained, template=template
            )
        except (SafetensorError, RuntimeError, json.JSONDecodeError) as error:
            # of an older version, whose files have no digests
            raise ValueError(
                f"RUN={str(run)!r}: policy/ is damaged ({str(error).splitlines()[0]}); write it "
                f"anew with {how_to_finish(run)}"
            ) from None
        return policy, Guides(config.parm.beta) if spec_of(config).guide else None
    family = Family.load(run / FILE)
    policy = load_policy(config.policy, config.names, seed=config.seed, template=template)
    return policy, family


def _corners(k: int) -> list[Preference]:
    return [tuple(float(i == j) for j in range(k)) for i in range(k)]


def _check_alike(
    what: str, one: Mapping[str, Tensor], other: Mapping[str, Tensor], remedy: str, shown: int = 8
) -> None:
    differing = [f"{name} (in one alone)" for name in sorted(one.keys() ^ other.keys())]
    differing += [
        f"{name} {tuple(value.shape)} and {tuple(other[name].shape)}"
        for name, value in one.items()
        if name in other and value.shape != other[name].shape
    ]
    if differing:
        more = f" and {len(differing) - shown} more" if len(differing) > shown else ""
        raise ValueError(f"{what} differ in {', '.join(differing[:shown])}{more}; {remedy}")
