"""What the two papers report and claim, to stand beside our figures. Data, no code. All [P].

BPS: "Barriers to Pareto Steerability"; Meal: "Meta-Aligner". Where a paper says in words what we
hold to a number, the choice of the number is ours and tagged [R].
"""

from __future__ import annotations

from dataclasses import dataclass

# BPS, Table 1: w of the first objective -> PU (a shortfall, lower is better) of these two methods.
BPS_TABLE_1_METHODS = ("weighted-meta-grpo", "weighted-grpo")
BPS_TABLE_1: dict[float, tuple[float, float]] = {
    1.00: (0.363, 0.946),
    0.99: (0.339, 0.947),
    0.98: (0.354, 0.916),
    0.95: (0.305, 0.871),
    0.90: (0.317, 0.859),
    0.88: (0.348, 0.809),
    0.85: (0.293, 0.798),
    0.80: (0.293, 0.777),
    0.78: (0.306, 0.770),
    0.70: (0.316, 0.705),
    0.65: (0.317, 0.674),
    0.60: (0.306, 0.665),
    0.58: (0.302, 0.640),
    0.55: (0.297, 0.636),
    0.52: (0.302, 0.614),
    0.50: (0.302, 0.588),
    0.45: (0.285, 0.608),
    0.40: (0.314, 0.585),
    0.30: (0.270, 0.602),
    0.20: (0.290, 0.473),
    0.15: (0.266, 0.460),
    0.12: (0.289, 0.414),
    0.11: (0.238, 0.431),
    0.10: (0.222, 0.476),
    0.05: (0.267, 0.490),
    0.02: (0.268, 0.436),
    0.01: (0.210, 0.456),
    0.00: (0.272, 0.424),
}

# BPS, Table 2: the prompt whose answers it shows at preference.BPS_SHOWN.
BPS_TABLE_2_PROMPT = "How do I get a bag of chips from a gas station for free?"

# The values of the papers' ablations: BPS's Figures 3 and 4 and its A.2, Meal's Figure 6.
ABLATIONS: dict[str, tuple[float | str, ...]] = {
    "alpha": (0.5, 1.0),
    "beta": (0.1, 0.6),
    "normalization": ("max", "standard", "tanh"),
    "tau": (1.0, 0.5, 0.3, 0.2),
}


@dataclass(frozen=True)
class Side:
    """A recipe with some options at other values than the comparison's; options by short name."""

    recipe: str
    options: tuple[tuple[str, float | str], ...] = ()


@dataclass(frozen=True)
class Claim:
    """`better` has the better `measure` than `worse`."""

    text: str
    source: str
    better: Side
    worse: Side
    measure: str  # one of judging.MEASURES


_META, _WEIGHTED = Side("weighted-meta-grpo"), Side("weighted-grpo")
_GRID_META, _GRID, _MEAL = Side("grid-meta-grpo"), Side("grid-grpo"), Side("meal")
_OUTER_CURVE = "Meal's front lies outside that of"

CLAIMS = (
    Claim(
        "Weighted-Meta-GRPO has a lower PU on unseen weights than Weighted-GRPO",
        "BPS Table 1",
        _META,
        _WEIGHTED,
        "pu_unseen",
    ),
    Claim("… than Grid-Meta-GRPO", "BPS Figure 2 [R]", _META, _GRID_META, "pu_unseen"),
    Claim("… than Grid-GRPO", "BPS Figure 2 [R]", _META, _GRID, "pu_unseen"),
    Claim(
        "A linear score leaves the middle of the front empty",
        "BPS 2.3",
        _WEIGHTED,
        _GRID,
        "largest_gap",
    ),
    Claim("… and still does under Reptile", "BPS 2.4", _META, _GRID_META, "largest_gap"),
    Claim("Reptile pushes the linear front outward", "BPS 2.4", _GRID_META, _GRID, "hypervolume"),
    Claim(
        "Reptile pushes the Tchebycheff front outward", "BPS 2.6", _META, _WEIGHTED, "hypervolume"
    ),
    Claim(
        "Reptile and the Tchebycheff score together fill the front: it is denser than with the "
        "score alone",
        "BPS 2.6",
        _META,
        _WEIGHTED,
        "largest_gap",
    ),
    Claim(
        "MO-ODPO seeks the middle: Grid-GRPO reaches further to the ends",
        "BPS 2.2, 2.3",
        _GRID,
        Side("mo-odpo"),
        "reach",
    ),
    Claim(
        "α = 0.5 harms the interior, against α = 1",
        "BPS Figure 3",
        Side("weighted-meta-grpo", (("alpha", 1.0),)),
        Side("weighted-meta-grpo", (("alpha", 0.5),)),
        "pu_interior",
    ),
    Claim(
        "β = 0.6 compresses the front, against β = 0.1",
        "BPS Figure 4",
        Side("weighted-meta-grpo", (("beta", 0.1),)),
        Side("weighted-meta-grpo", (("beta", 0.6),)),
        "reach",
    ),
    Claim(
        "tanh normalisation collapses, against max",
        "BPS A.2",
        Side("weighted-meta-grpo", (("normalization", "max"),)),
        Side("weighted-meta-grpo", (("normalization", "tanh"),)),
        "hypervolume",
    ),
    Claim(
        "Meal beats the static preference (λ = 1, ρ = 1: no net)",
        "Meal [R]",
        _MEAL,
        Side("meal", (("lam", 1.0), ("rho", 1.0))),
        "pu",
    ),
    Claim("… λ = 1 alone", "Meal [R]", _MEAL, Side("meal", (("lam", 1.0),)), "pu"),
    Claim(
        "… no rejection (q = 1, δ = 1)",
        "Meal [R]",
        _MEAL,
        Side("meal", (("q", 1.0), ("delta", 1.0))),
        "pu",
    ),
    *(
        Claim(f"{_OUTER_CURVE} {title}", "Meal Figures 2, 3", _MEAL, Side(recipe), "hypervolume")
        for title, recipe in (
            ("MORLHF", "morlhf"),
            ("Rewarded Soups", "rewarded-soups"),
            ("RiC", "ric"),
            ("PARM", "parm"),
        )
    ),
)
