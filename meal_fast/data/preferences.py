"""Preferences w on the simplex: where they are drawn from, and the text that tells the policy.

The policy reads w as text at the end of the user's turn, so that the keys and values of the prompt
before it are the same for every preference:

    <|im_start|>user
    How do tides work? [helpful=0.80 harmless=0.20] ++++++++--<|im_end|>
    <|im_start|>assistant

`preference_text` is the only place that writes it. The bar is for small models: between the two
ends of the simplex the numbers alone move the last hidden states of SmolLM2-135M by 4 % of their
spread over ten prompts, the bar by a third of it; runs with numbers alone hardly steered.

Where several models have a preference each, none of them reads one: the style `none`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from meal_fast.common import opening, parse_json
from meal_fast.config.config import Config, PreferenceConfig
from meal_fast.data_types import rng_seed

Preference = tuple[float, ...]
Weights = Preference  # the name that it had
Array = np.ndarray

# BPS, Table 1: the 28 weights of its evaluation (the first entry; the second is one minus it) [P].
BPS_EVALUATION = (
    *(1.00, 0.99, 0.98, 0.95, 0.90, 0.88, 0.85, 0.80, 0.78, 0.70, 0.65, 0.60, 0.58, 0.55),
    *(0.52, 0.50, 0.45, 0.40, 0.30, 0.20, 0.15, 0.12, 0.11, 0.10, 0.05, 0.02, 0.01, 0.00),
)

# The 13 preferences of three objectives in the evaluation of "Rewards-in-Context" (RiC), which Meal
# compares itself in; its (0.33, 0.33, 0.33) is written as thirds [P].
RIC_EVALUATION = (
    *((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (0.1, 0.1, 0.8), (0.1, 0.8, 0.1), (0.2, 0.2, 0.6)),
    *((0.2, 0.4, 0.4), (0.2, 0.6, 0.2), (1 / 3, 1 / 3, 1 / 3), (0.4, 0.4, 0.2), (0.4, 0.2, 0.4)),
    *((0.6, 0.2, 0.2), (0.8, 0.1, 0.1), (1.0, 0.0, 0.0)),
)
# BPS, Table 2: the four weights at which it shows its answers [P].
BPS_SHOWN = ((1.0, 0.0), (0.8, 0.2), (0.2, 0.8), (0.0, 1.0))

MARKS = "+-*#=~^%&@!?<>/|"  # of the bar, one an objective
_BAR = 10


def preference_text(w: Sequence[float], names: Sequence[str], style: str = "bar") -> str:
    """The form in which the policy reads a preference.

    `numbers`: `[helpful=0.80 harmless=0.20]`. `bar`: the same and ` ++++++++--`, ten marks shared
    out by largest remainder, so that a difference of preferences is one of which tokens are there.
    `scores`: `<rm1_score> 0.3 <rm2_score> -1.2`; here `w` are K rewards, see `Goals`. `none`: "".
    """
    if style == "none":
        return ""
    if style == "scores":
        # Adding 0.0 makes a -0.0 of the rounding 0.0: one value has one text.
        rounded = (round(value, 1) + 0.0 for value in w)
        return " ".join(f"<rm{k}_score> {value:.1f}" for k, value in enumerate(rounded, 1))
    pairs = (f"{name}={value:.2f}" for name, value in zip(names, w, strict=True))
    numbers = f"[{' '.join(pairs)}]"
    if style == "numbers":
        return numbers
    counts = [int(value * _BAR + 1e-9) for value in w]
    left = [value * _BAR - count for value, count in zip(w, counts, strict=True)]
    for i in sorted(range(len(w)), key=lambda i: -round(left[i], 6))[: _BAR - sum(counts)]:
        counts[i] += 1
    marks = (MARKS[i % len(MARKS)] * count for i, count in enumerate(counts))
    return f"{numbers} {''.join(marks)}"


@dataclass(frozen=True)
class Goals:
    """How a preference becomes the rewards to ask for: g_k = w_k/‖w‖₂ (hi_k − lo_k) + lo_k (RiC).

    For a policy that was trained on rewards in its prompt (`scores`), each between lo_k and hi_k.
    The largest w_k = 1 asks for hi_k; equal weights for more than a mean of the ends, since the
    rewards can be high together. Raises ValueError for lengths that differ, and for hi_k < lo_k.
    """

    lo: tuple[float, ...]  # (K,), standardised
    hi: tuple[float, ...]

    def __post_init__(self) -> None:
        pairs = zip(self.lo, self.hi, strict=False)
        fit = len(self.lo) == len(self.hi) and all(low <= high for low, high in pairs)
        if not fit or not np.isfinite([*self.lo, *self.hi]).all():
            raise ValueError(f"goals from {self.lo} to {self.hi}: need K finite ends, lo <= hi")

    def of(self, w: Preference) -> Preference:
        """The K standardised rewards that stand for w (not all zero)."""
        length = float(np.linalg.norm(w))
        ends = zip(w, self.lo, self.hi, strict=True)
        return tuple(x / length * (high - low) + low for x, low, high in ends)

    @staticmethod
    def load(path: Path, k: int) -> Goals:
        """Those of K objectives that `Policy.save` wrote. Raises ValueError where it wrote none."""
        held = None
        if path.is_file():
            with opening(f"{str(path)!r}"):
                held = parse_json(path.read_bytes()).get("goals")
                sides = {} if held is None else {side: list(held[side]) for side in ("lo", "hi")}
                assert all(math.isfinite(x) for side in sides.values() for x in side)
                assert len({len(side) for side in sides.values()}) < 2
        if held is None or len(held["lo"]) != k:
            what = "no goals" if held is None else f"goals of {len(held['lo'])} objectives"
            raise ValueError(
                f"RiC statistics missing: {str(path)!r} holds {what}, for {k} objectives; without "
                "them no preference can be asked for: train the run of recipe ric to its end"
            )
        return Goals(tuple(held["lo"]), tuple(held["hi"]))


def lattice(k: int, points: int) -> tuple[Preference, ...]:
    """The simplex lattice with `points` values a side, from (1, 0, …) to (0, …, 1).

    K = 2 and 11 points: BPS's W_train = {(1,0), (0.9,0.1), …, (0,1)} [P].
    """
    if points < 2 or k < 2:
        raise ValueError(f"points={points}, k={k}: a simplex lattice needs at least 2 of each")
    steps = points - 1

    def compositions(total: int, parts: int) -> list[tuple[int, ...]]:
        if parts == 1:
            return [(total,)]
        return [
            (first, *rest)
            for first in range(total, -1, -1)
            for rest in compositions(total - first, parts - 1)
        ]

    return tuple(tuple(n / steps for n in counts) for counts in compositions(steps, k))


def evaluation_weights(k: int, points: int) -> tuple[Preference, ...]:
    """The sweep of an evaluation: the simplex lattice with `points` a side; for K = 2 and 28 the
    weights of BPS's Table 1, for K = 3 and 13 those of RiC's evaluation."""
    if k == 2 and points == 28:
        return tuple((a, round(1.0 - a, 2)) for a in BPS_EVALUATION)
    if k == 3 and points == 13:
        return RIC_EVALUATION
    return lattice(k, points)


def drawn_tasks(config: Config, step: int) -> list[Preference]:
    """The preferences of meta-step `step` for one model that reads them: see `draw`."""
    options = config.preference
    return draw(
        len(config.names),
        alpha=options.alpha,
        points=options.grid,
        seed=config.seed,
        step=step,
        count=config.meta.tasks,
        rotate=options.rotate,
    )


def model_tasks(config: Config, step: int) -> list[Preference]:
    """Those of several models with a preference each: at every meta-step, all of them."""
    return list(lattice(len(config.names), config.model_points))


def on_lattice(weights: Sequence[Preference], points: int) -> list[bool]:
    """Whether training on that lattice could draw each weight; points = 0, continuous: none."""
    if not points:
        return [False] * len(weights)
    grid = np.asarray(lattice(len(weights[0]), points))
    return [bool((np.abs(grid - np.asarray(w)).max(1) < 1e-9).any()) for w in weights]


def shown_weights(weights: Sequence[Preference]) -> tuple[Preference, ...]:
    """The weights at which a single prompt's answers are shown: K = 2 BPS's four [P], else corners.

    `weights` are those of the sweep, for its K.
    """
    k = len(weights[0])
    return BPS_SHOWN if k == 2 else tuple(tuple(float(i == j) for j in range(k)) for i in range(k))


def draw(
    k: int,
    *,
    alpha: float,
    points: int,
    seed: int,
    step: int,
    count: int,
    rotate: bool = False,
) -> list[Preference]:
    """`count` preferences w ~ Dir(alpha), mapped onto the nearest lattice point (points = 0: not).

    BPS A.3 [P]; nearest-point mapping is our reading of "over W_train" [R]. Depends on (seed, step)
    alone. Among equally near lattice points the first is taken.

    rotate: a draw is followed by its k - 1 rotations, (0.9, 0.1) by (0.1, 0.9). Each is Dir(alpha)
    as before, and what they pull the policy to in common cancels in the meta-step [R].
    """
    rng = np.random.Generator(np.random.Philox(key=rng_seed(seed, "preference", step)))
    drawn = rng.dirichlet([alpha] * k, size=-(-count // k) if rotate else count)
    if rotate:
        turns = [np.roll(drawn, shift, axis=1) for shift in range(k)]
        drawn = np.stack(turns, 1).reshape(-1, k)[:count]
    return snapped(drawn, points)


def mates(
    w: Preference, count: int, options: PreferenceConfig, rng_key: Sequence[int | str]
) -> list[tuple[Preference, int]]:
    """Give the preferences that prompts are asked under beside w, w first, and how often each.

    `count` in all: w and its rotations (`options.mates`), (0.9, 0.1) and (0.1, 0.9), whose common
    pull on the policy cancels in one gradient; or w and further draws. Equal ones are one, counted:
    two requests for it would be sampled by one key, and answer alike.
    """
    joined = [w[shift:] + w[:shift] for shift in range(len(w))][:count]
    if options.mates == "draws":
        seed, points = rng_seed("mates", *rng_key), options.grid
        joined = [w]
        if count > 1:
            joined += draw(
                len(w), alpha=options.alpha, points=points, seed=seed, step=0, count=count - 1
            )
    return list(Counter(joined).items())


def snapped(w: Sequence[Sequence[float]] | Array, points: int) -> list[Preference]:
    """Each preference's nearest lattice point (points = 0: itself); the first of equally near."""
    w_RK = np.asarray(w, dtype=np.float64)
    if points:
        grid = np.asarray(lattice(w_RK.shape[1], points))
        w_RK = grid[((w_RK[:, None, :] - grid[None]) ** 2).sum(-1).argmin(-1)]
    return [tuple(float(x) for x in row) for row in w_RK]
