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

    rule: RejectionRule = opt("combined", "combined: top-fraction and trade-off [R]")
    q: float = opt(0.5, "acceptance fraction: the share of a group's scores that passes [R]")
    threshold: float = opt(0.0, "threshold: the lowest score that passes [R]")
    tau_a: float = opt(0.2, "statistical: passes with probability exp((S - S_max)/tau_a) [R]")
    realized: Realized = opt(
        "ray", "the realised preference: the score's own inverse, or softmax(r/tau) [R]"
    )
    tau: float = opt(1.0, "temperature of the realised preference; 1, .5, .3 or .2 [P]")
    delta: float = opt(0.5, "trade-off: the largest distance of realised and asked preference [R]")
    keep: int = opt(0, "responses to keep a group; 0: all that pass")
    rounds: int = opt(0, "redraw rounds of groups that have kept fewer; cut-backs of a row [R]")
    draws: int = opt(0, "responses drawn a group in all rounds; 0: the rounds alone limit it [R]")
    fallback: Fallback = opt("best", "what a group keeps when nothing passes: its best score [R]")
    segment: int = opt(
        0, "a row is scored after so many tokens, and cut back if hopeless; 0: not [R]"
    )
    slack: float = opt(0.1, "how far below the bar an unfinished response may score [R]")

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

    policy: PolicyUpdate = opt("sft", "policy's learner: on kept responses, or GRPO on all [R]")
    outer: MealOuter = opt("net", "the outer loop: the net, or Reptile over preferences as well")
    update: NetUpdate = opt(
        "alternating", "how the net learns; see training/collectors/meal.py [R]"
    )
    lam: float = opt(0.5, "λ: 1 keeps the asked preference, 0 takes the realised one [R]")
    mode: WeightMode = opt("closed", "how the preference learns: closed form, or gradient steps")
    rho: float = opt(0.5, "chance that a prompt's preference is drawn, not the net's [R]")
    gamma: float = opt(0.01, "weight of the net's entropy in its loss [R]")
    every: int = opt(8, "policy steps between two updates of the net, M [R]")
    net_steps: int = opt(8, "Adam steps of an update of the net, each over the whole buffer [R]")
    buffer: int = opt(256, "recent prompts that the net learns from [R]")
    net_lr: float = opt(1e-3, "learning rate of the net's own Adam [R]")
    hidden: int = opt(256, "units of the net's one hidden layer [R]")
    eta: float = opt(0.1, "hypergradient: step of the policy's one-step look-ahead, plain SGD [R]")

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

    alpha: float = opt(0.5, "w ~ Dir(alpha), for each prompt of an update [P]")
    # 0.01 in the paper's runs, for responses of some hundred tokens; ours are shorter.
    beta_r: float = opt(0.1, "scale of the guide's reward in the loss of a pair [R]")
    beta: float = opt(1.0, "decoding: logits = base + guide / beta [P]")

    def __post_init__(self) -> None:
        for name in ("alpha", "beta_r", "beta"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"parm.{name}", value, "must be positive and finite")


@dataclass(frozen=True)
class RicConfig:
    """Rewards-in-Context, where [P] is its own paper: meal_fast.training.collectors.ric."""

    offline: float = opt(0.25, "share of the run on the base model's responses; then online [R]")
    quantile: float = opt(0.7, "online: kept is what reaches it in any reward of its update [P]")
    replay: float = opt(0.5, "online: offline responses learnt beside each one that is kept [R]")
    buffer: int = opt(1024, "recent offline responses: replayed, and drawn for goals [R]")
    data: str = opt(
        "", ".jsonl of prompt and response, learnt offline; empty: the base model's samples [R]"
    )

    def __post_init__(self) -> None:
        for name, ok, remedy in (
            ("offline", 0 < self.offline <= 1, "a share of the run, in (0, 1]: goals come from it"),
            ("quantile", 0 <= self.quantile < 1, "must be in [0, 1)"),
            ("replay", 0 <= self.replay < math.inf, "must not be negative"),
            ("buffer", self.buffer >= 1, "must be at least 1"),
        ):
            require(ok, f"ric.{name}", getattr(self, name), remedy)
