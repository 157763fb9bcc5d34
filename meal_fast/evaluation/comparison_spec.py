"""What a comparison is to run: its command line, its methods, and what each run still needs."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from meal_fast.config.cli import (
    OneLineParser,
    add_options,
    as_flags,
    known,
    nested,
    option_named,
    typed,
    values_of,
)
from meal_fast.config.config import Config, from_dict
from meal_fast.config.presets import PRESETS, preset
from meal_fast.config.recipes import RECIPES
from meal_fast.config.run_dir import as_saved, read_config, read_json
from meal_fast.models.threads import automatic

from .claims import BPS_TABLE_2_PROMPT
from .comparison import Method
from .runner import Job

# What the command line of a comparison gives in another way.
NOT_OPTIONS = ("recipe", "seed", "meta.tokens", "score.statistics", "evaluation.statistics")
# What a run may differ in from the comparison and still be kept: what Trainer lets a resumed run
# change, where its statistics came from, and its last digits.
FREE = (
    "checkpoint_every",
    "completions",
    "logger",
    "objectives_timeout",
    "evaluation.",
    "score.statistics",
    "threads",
)
# A method that differs in these trains by statistics of its own; it is measured by everyone's.
OWN_SCALE = {"score.normalization", "score.utopia", "score.calibration"}


@dataclass(frozen=True)
class Ablation:
    """Methods of one recipe that differ in the named options, in the order asked for."""

    options: tuple[str, ...]
    methods: tuple[Method, ...]


@dataclass(frozen=True)
class Plan:
    """What is to be compared."""

    preset: str
    base: Config  # of every run, but for recipe, seed and what a method changes
    recipes: tuple[str, ...]
    seeds: tuple[int, ...]
    tokens: int
    ablations: tuple[Ablation, ...]
    out: Path

    @property
    def methods(self) -> tuple[Method, ...]:
        more = (method for ablation in self.ablations for method in ablation.methods)
        return tuple(dict.fromkeys([*map(Method, self.recipes), *more]))

    def config(self, method: Method, seed: int) -> Config:
        values = {"recipe": method.recipe, "seed": seed, **dict(method.changes)}
        return from_dict(nested(values), self.base)

    @property
    def statistics(self) -> Path:
        """The statistics and z* of all runs."""
        return self.out / "statistics.json"


@dataclass(frozen=True)
class Run:
    """One method with one seed, and its folder."""

    plan: Plan
    method: Method
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method.folder}/seed-{self.seed}"

    @property
    def folder(self) -> Path:
        return self.plan.out / "runs" / self.name

    @functools.cached_property
    def config(self) -> Config:
        return self.plan.config(self.method, self.seed)

    @property
    def own_scale(self) -> bool:
        return any(option in OWN_SCALE for option, _ in self.method.changes)

    def stage(self) -> str:
        """new, interrupted, unevaluated (or otherwise evaluated), or finished.

        Raises ValueError where the folder holds a run of another configuration.
        """
        if not (self.folder / "config.json").exists():
            return "new"
        made_with = read_config(self.folder)
        saved, wanted = values_of(made_with), values_of(as_saved(self.config, made_with))
        changed = [
            f"{option} {saved[option]!r}, now {value!r}"
            for option, value in wanted.items()
            if saved[option] != value and not option.startswith(FREE)
        ]
        if changed:
            raise ValueError(
                f"{self.folder}: made with {', '.join(changed)}; name another --out, or remove it"
            )
        if not (self.folder / "evaluation.json").exists():
            return "interrupted"
        asked, found = self.config.evaluation, read_json(self.folder, "evaluation.json")["settings"]
        same = all(found.get(k) == getattr(asked, k) for k in ("prompts", "samples", "grid", "ask"))
        same = same and tuple(found.get("marks", ())) == asked.marks  # an older one counted none
        return "finished" if same and found.get("benign", "") == asked.benign else "unevaluated"

    def job(self) -> Job | None:
        """What is left to do; None for nothing."""
        stage, folder = self.stage(), str(self.folder)
        # What the user named here, repeated for a folder that names it, too: see config.trust.
        limit = f"--objectives_timeout={self.config.objectives_timeout}"
        ours = (limit, "--objectives", *self.config.objectives)
        if stage == "finished":
            return None
        if stage == "unevaluated":
            e = self.config.evaluation
            size = [f"--prompts={e.prompts}", f"--samples={e.samples}", f"--grid={e.grid}"]
            more = [f"--ask={e.ask}", f"--benign={e.benign}", f"--marks={','.join(e.marks)}"]
            return Job("evaluate", (folder, "--no-report", *size, *more, *ours))
        if stage == "interrupted":
            # An older run does not say how many threads it has.
            known = read_config(self.folder).threads
            threads = () if known else (f"--threads={self.config.threads}",)
            known_as = ("--no-report", "--out", folder, f"--logger={self.config.logger}")
            return Job("train", ("--resume", *known_as, *threads, *ours))
        config = self.config
        shared = str(self.plan.statistics)
        if self.own_scale:
            measured = dataclasses.replace(config.evaluation, statistics=shared)
            config = dataclasses.replace(config, evaluation=measured)
        elif self.plan.statistics.exists():
            score = dataclasses.replace(config.score, statistics=shared)
            config = dataclasses.replace(config, score=score)
        flags = as_flags(config, preset(self.plan.preset))
        return Job("train", (self.plan.preset, "--no-report", "--out", folder, *flags))


def threaded(plan: Plan, jobs: int) -> Plan:
    """`plan` with a number of threads for all its runs: the one asked for, that of the runs which
    are there, or this machine's share for one of `jobs` at a time."""
    there = [
        read_config(run.folder).threads
        for run in (Run(plan, method, seed) for seed in plan.seeds for method in plan.methods)
        if (run.folder / "config.json").exists()
    ]
    threads = plan.base.threads or max(there, default=0) or max(1, automatic() // max(jobs, 1))
    return dataclasses.replace(plan, base=dataclasses.replace(plan.base, threads=threads))


def budgeted(config: Config, tokens: int) -> Config:
    """`config` for a run that generates `tokens` tokens. Raises ValueError for less than a step."""
    meta, rollout = config.meta, config.rollout
    step = meta.tasks * meta.n_inner * rollout.prompts * rollout.samples * rollout.max_new_tokens
    if tokens < step:
        raise ValueError(f"tokens={tokens}: a meta-step alone makes up to {step}; allow more")
    return from_dict({"meta": {"tokens": tokens}}, config)


def _parser(shown: str, about: str) -> argparse.ArgumentParser:
    p = OneLineParser(
        prog="python -m meal_fast.compare",
        usage="%(prog)s PRESET --tokens N [--recipes A,B] [--seeds 0,1,2] [--out FOLDER] "
        "[--section.option VALUE ...]",
        description=about,
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=34, width=110
        ),
    )
    p.add_argument("PRESET", help=", ".join(PRESETS))
    p.add_argument("--recipes", metavar="A,B", help="the methods (default: all)")
    p.add_argument("--seeds", metavar="I,J", default="0,1,2", help="(default: 0,1,2)")
    p.add_argument(
        "--tokens", type=int, required=True, metavar="N", help="that a run may generate in training"
    )
    p.add_argument("--out", metavar="FOLDER", help="(default: runs/compare-PRESET)")
    p.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="J",
        help="runs at a time, a process each (default: 1); 0: one by one in this process",
    )
    p.add_argument(
        "--ablate",
        action="append",
        default=[],
        metavar="OPTION=V,W",
        help="further runs with other values: alpha=0.5,1 or beta=0.1,0.6 or lam=… or tau=… or "
        "normalization=… or any section.option; OPTION=V+OPTION=W changes two at once; "
        "…@RECIPE,RECIPE for some of the recipes only",
    )
    add_options(p, preset(shown), NOT_OPTIONS)
    return p


def parse(argv: Sequence[str], about: str) -> tuple[Plan, int]:
    """The plan and the number of jobs. Raises ValueError for a wrong value."""
    shown = next((a for a in argv if a in PRESETS), "quickstart")
    found = vars(_parser(shown, about).parse_args(argv))
    name, tokens, jobs = found.pop("PRESET"), found.pop("tokens"), found.pop("jobs")
    recipes, seeds, out = (found.pop(k) for k in ("recipes", "seeds", "out"))
    ablate = found.pop("ablate")
    known("preset", name, PRESETS)
    if jobs < 0:
        raise ValueError(f"--jobs={jobs}: must be 0 (in this process) or more")
    base = preset(name)
    if len(from_dict(nested(found), base).names) == 2:
        found.setdefault("evaluation.grid", 28)  # BPS's Table 1, with weights unseen in training
    if not base.policy.path.startswith("world:"):
        found.setdefault("evaluation.ask", BPS_TABLE_2_PROMPT)
    plan = Plan(
        preset=name,
        base=budgeted(from_dict(nested(found), base), tokens),
        recipes=_listed("recipes", recipes or ",".join(RECIPES)),
        seeds=tuple(_seed(s) for s in _listed("seeds", seeds)),
        tokens=tokens,
        ablations=(),
        out=Path(out or f"runs/compare-{name}"),
    )
    for recipe in plan.recipes:
        known("recipe", recipe, RECIPES)
    parts = tuple(ablation for text in ablate for ablation in _ablations(text, plan))
    return dataclasses.replace(plan, ablations=parts), jobs


def _listed(what: str, text: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(","))
    twice = [part for part in parts if parts.count(part) > 1]
    if twice or "" in parts:
        raise ValueError(f"--{what}={text!r}: {repr(twice[0]) + ' twice' if twice else 'a gap'}")
    return parts


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"--seeds: {text!r} is no whole number")
    return int(text)


def _ablations(text: str, plan: Plan) -> list[Ablation]:
    """`beta=0.1,0.6@grid-grpo` as the methods that it means."""
    settings, at, only = text.partition("@")
    names, values = [], []
    for part in re.split(r"\+(?=[\w.]+=)", settings):
        name, given, listed = part.partition("=")
        if not given:
            raise ValueError(f"--ablate={text!r}: expected OPTION=VALUE,VALUE")
        option = option_named(name.strip(), plan.base)
        if option in NOT_OPTIONS or isinstance(values_of(plan.base)[option], tuple):
            raise ValueError(f"--ablate={text!r}: {option} cannot be ablated")
        names.append(option)
        values.append([typed(option, v, plan.base) for v in _listed("ablate", listed)])
    recipes = _listed("ablate", only) if at else plan.recipes
    shared, out = values_of(plan.base), []
    for recipe in recipes:
        if recipe not in plan.recipes:
            raise ValueError(f"--ablate={text!r}: {recipe!r} is not among --recipes")
        methods = []
        for chosen in product(*values):
            pairs = zip(names, chosen, strict=True)
            method = Method(recipe, tuple((o, v) for o, v in pairs if v != shared[o]))
            plan.config(method, 0)  # a wrong value is refused here
            methods.append(method)
        if len(methods) == 1:  # one variant: beside the recipe itself
            methods.insert(0, Method(recipe))
        out.append(Ablation(tuple(names), tuple(dict.fromkeys(methods))))
    return out
