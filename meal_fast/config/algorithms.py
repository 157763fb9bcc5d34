"""The options of single recipes, as frozen dataclasses; no torch. Part of `config.Config`.

Tags as there: [P] stated in a paper, [R] our reading of what it leaves open.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from meal_fast.common import require

from .schema import opt

RejectionRule = Literal["top-fraction", "threshold", "statistical", "trade-off", "combined"]
Fallback = Literal["best", "none"]
Realized = Literal["softmax", "ray"]
WeightMode = Literal["closed", "gradient"]
PolicyUpdate = Literal["sft", "grpo"]
MealOuter = Literal["net", "reptile+net"]
NetUpdate = Literal["alternating", "hypergradient"]
CHOICES: dict[str, Any] = {
    "RejectionRule": RejectionRule,
    "Fallback": Fallback,
    "Realized": Realized,
    "WeightMode": WeightMode,
    "PolicyUpdate": PolicyUpdate,
    "MealOuter": MealOuter,
    "NetUpdate": NetUpdate,
}


@dataclass(frozen=True)
class RejectionConfig:
    """Which sampled responses are kept; the rules are in meal_fast.rollout.rejection_rules.

    Meta-Aligner ablates a constant τ of 1, 0.5, 0.3 and 0.2 [P], and its public text does not say
    of what: it could be the temperature of the realised preference (`tau`), or the fraction of the
    responses that is accepted (`q`). They are two options [R].
    """

    rule: RejectionRule = opt(
        "combined", "Which responses pass; combined means top-fraction and trade-off [R]."
    )
    q: float = opt(0.5, "Top-fraction: the share of a group's scores that passes [R].")
    threshold: float = opt(0.0, "Threshold: the lowest score that passes [R].")
    tau_a: float = opt(
        0.2, "Statistical: a response passes with probability exp((S - S_max)/tau_a) [R]."
    )
    realized: Realized = opt(
        "ray",
        "How the realised preference is computed: as the score's own inverse (ray), or "
        "as softmax(r/tau) [R].",
    )
    tau: float = opt(
        1.0, "Temperature of the realised preference; the paper ablates 1, 0.5, 0.3 and 0.2 [P]."
    )
    delta: float = opt(
        0.5,
        "Trade-off: the largest distance between realised and asked preference that passes [R].",
    )
    keep: int = opt(0, "Responses that are kept of a group; 0 keeps all that pass.")
    rounds: int = opt(
        0,
        "Rounds in which groups that kept fewer are redrawn, and times that a row is cut back [R].",
    )
    draws: int = opt(
        0, "Responses drawn for a group in all rounds; 0 leaves the limit to the rounds [R]."
    )
    fallback: Fallback = opt(
        "best", "What a group keeps when nothing passes: its best response, or none [R]."
    )
    segment: int = opt(
        0, "A row is scored after every so many tokens, and cut back if hopeless; 0 does not [R]."
    )
    slack: float = opt(0.1, "How far below the bar an unfinished response may score [R].")

    def __post_init__(self) -> None:
        for name in ("keep", "rounds", "draws", "segment", "slack"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"rejection.{name}", value, "must not be negative")
        rules, enough = get_args(RejectionRule), self.draws == 0 or self.draws >= self.keep
        for name, ok, remedy in (
            ("q", 0 < self.q <= 1, "must be in (0, 1]"),
            ("threshold", math.isfinite(self.threshold), "must be finite"),
            ("tau_a", 0 < self.tau_a < math.inf, "must be positive and finite"),
            ("tau", 0 < self.tau < math.inf, "must be positive and finite"),
            ("delta", 0 <= self.delta <= 1, "must be a distance, in [0, 1]"),
            ("rounds", self.rounds == 0 or self.keep > 0, "set rejection.keep: redraw until when?"),
            ("draws", enough, f"must be 0 or reach rejection.keep={self.keep}"),
            ("rule", self.rule in rules, f"choose from {', '.join(rules)}"),
            ("realized", self.realized in get_args(Realized), "choose from softmax, ray"),
            ("fallback", self.fallback in get_args(Fallback), "choose from best, none"),
        ):
            require(ok, f"rejection.{name}", getattr(self, name), remedy)


@dataclass(frozen=True)
class MealConfig:
    """The preference-weight-net and what couples it to the policy [R].

    See meal_fast.training.collectors.meal.
    """

    policy: PolicyUpdate = opt(
        "sft", "How the policy learns: from kept responses (sft), or by GRPO from all of them [R]."
    )
    outer: MealOuter = opt(
        "net", "The outer loop: the net alone, or Reptile over preferences as well."
    )
    update: NetUpdate = opt(
        "alternating",
        "How the net learns: by turns with the policy, or along the hypergradient [R].",
    )
    lam: float = opt(
        0.5, "The exponent λ: 1 keeps the asked preference, 0 takes the realised one [R]."
    )
    mode: WeightMode = opt(
        "closed", "How a preference learns from a response: in closed form, or by gradient steps."
    )
    rho: float = opt(0.5, "Chance that a prompt's preference is drawn, and not the net's [R].")
    gamma: float = opt(0.01, "Weight of the net's entropy in its loss [R].")
    every: int = opt(8, "Policy updates between two updates of the net, M [R].")
    net_steps: int = opt(8, "Adam steps in an update of the net, each over the whole buffer [R].")
    buffer: int = opt(256, "Recent prompts that the net learns from [R].")
    net_lr: float = opt(1e-3, "Learning rate of the net's own Adam [R].")
    hidden: int = opt(256, "Units of the net's one hidden layer [R].")
    eta: float = opt(
        0.1, "Hypergradient: step size of the policy's one-step look-ahead, plain SGD [R]."
    )

    def __post_init__(self) -> None:
        for name in ("every", "net_steps", "buffer", "hidden"):
            value = getattr(self, name)
            require(value >= 1, f"meal.{name}", value, "must be at least 1")
        for name, ok, remedy in (
            ("lam", 0 <= self.lam <= 1, "λ must be in [0, 1]"),
            ("policy", self.policy in get_args(PolicyUpdate), "choose from sft, grpo"),
            ("outer", self.outer in get_args(MealOuter), "choose from net, reptile+net"),
            (
                "update",
                self.update in get_args(NetUpdate),
                "choose from alternating, hypergradient",
            ),
            ("mode", self.mode in get_args(WeightMode), "choose from closed, gradient"),
            ("rho", 0 <= self.rho <= 1, "a chance, in [0, 1]"),
            ("gamma", 0 <= self.gamma < math.inf, "must not be negative"),
            ("net_lr", 0 < self.net_lr < math.inf, "must be positive"),
            ("eta", 0 < self.eta < math.inf, "must be positive"),
        ):
            require(ok, f"meal.{name}", getattr(self, name), remedy)


@dataclass(frozen=True)
class ParmConfig:
    """PARM's guide: meal_fast.models.pblora and meal_fast.training.losses.parm."""

    alpha: float = opt(0.5, "Each prompt's preference is drawn from Dir(alpha) [P].")
    # 0.01 in the paper's runs, for responses of some hundred tokens; ours are shorter.
    beta_r: float = opt(0.1, "Scale of the guide's reward in the loss of a pair [R].")
    beta: float = opt(1.0, "Decoding adds guide/beta to the base model's logits [P].")

    def __post_init__(self) -> None:
        for name in ("alpha", "beta_r", "beta"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"parm.{name}", value, "must be positive and finite")


@dataclass(frozen=True)
class RicConfig:
    """Rewards-in-Context, where [P] is its own paper: meal_fast.training.collectors.ric."""

    offline: float = opt(
        0.25, "Share of the run that learns from the base model's responses, before its own [R]."
    )
    quantile: float = opt(
        0.7,
        "Online: a response is kept that reaches this quantile of its update in any reward [P].",
    )
    replay: float = opt(
        0.5, "Online: offline responses that are learnt beside each one that is kept [R]."
    )
    buffer: int = opt(
        1024, "Recent offline responses, which are replayed and from which goals are drawn [R]."
    )
    data: str = opt(
        "",
        "A .jsonl file of prompts and responses that is learnt offline; empty takes the"
        " base model's samples [R].",
    )

    def __post_init__(self) -> None:
        for name, ok, remedy in (
            ("offline", 0 < self.offline <= 1, "a share of the run, in (0, 1]: goals come from it"),
            ("quantile", 0 <= self.quantile < 1, "must be in [0, 1)"),
            ("replay", 0 <= self.replay < math.inf, "must not be negative"),
            ("buffer", self.buffer >= 1, "must be at least 1"),
        ):
            require(ok, f"ric.{name}", getattr(self, name), remedy)
