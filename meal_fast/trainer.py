"""The loop: draw preferences, roll out, score, update; checkpoints, and resuming bit for bit."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from . import __version__, ops, preference
from .batch import Prompt, Rollout, Scored, key
from .config import Config, to_dict
from .objectives import Normalizer, Objectives, default_utopia, load_objectives
from .policy import Policy, load_policy
from .prompts import load_prompts
from .recipes import RECIPES
from .rollout import Request, backend
from .runs import read_config, shared_statistics

# What a resumed run may change: nothing that enters the mathematics of the steps.
FREE_ON_RESUME = ("checkpoint_every", "logger", "evaluation.")


@dataclass(frozen=True)
class Scales:
    """What turns raw rewards into scores: fixed once, from the base model, saved with the run."""

    normalizer: Normalizer
    utopia: tuple[float, ...]

    def save(self, path: Path, names: tuple[str, ...], mu: float, sample: dict[str, Any]) -> None:
        values = {
            "names": names,
            "normalizer": self.normalizer.to_dict(),
            "utopia": self.utopia,
            "mu_evaluation": mu,
            "calibration": sample,
        }
        write_atomic(path, json.dumps(values, indent=1).encode())

    @staticmethod
    def load(path: Path) -> Scales:
        values = json.loads(path.read_text())
        return Scales(Normalizer.from_dict(values["normalizer"]), tuple(values["utopia"]))


class Trainer:
    """One run in one folder. `train()` goes from wherever the folder's checkpoint stands.

    Raises ValueError, before anything expensive, for whatever is wrong with config, folder, prompts
    or objectives.
    """

    def __init__(
        self,
        config: Config,
        out: Path,
        *,
        resume: bool = False,
        on_update: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.config, self.out = config, out
        self.on_update = on_update or (lambda metrics: None)
        self.stop_requested = False
        self._checkpoint = open_run(config, out, resume)
        shared = shared_statistics(config) if self._checkpoint is None else None
        self.recipe = RECIPES[config.recipe]
        prompts = load_prompts(config.prompts.train, "train")
        self.objectives: Objectives = load_objectives(config.objectives)
        # A broken one fails here; two rows, so that one number for all of them is noticed.
        self.objectives.score(["How are you?", "Who are you?"], ["Fine, thank you.", "A model."])
        self.policy: Policy = load_policy(config.policy, config.names, seed=config.seed)
        self.prompts = fitting(self.policy, prompts, config)
        self.outer = self.recipe.outer(self.policy.trainable, config.meta, config.grpo)
        self.step = 0  # meta-steps done
        _check_space(out, self.policy)
        out.mkdir(parents=True, exist_ok=True)
        if self._checkpoint is None:
            write_atomic(out / "config.json", json.dumps(to_dict(config), indent=1).encode())
            if shared is None:
                self.scales = self._calibrate()
            else:
                write_atomic(out / "statistics.json", shared)
                self.scales = Scales.load(out / "statistics.json")
            self._metrics: BinaryIO = open(out / "metrics.jsonl", "wb")
        else:
            self.scales = Scales.load(out / "statistics.json")
            self.outer.load_state(self._checkpoint["outer"])
            self.step = self._checkpoint["step"]
            self._metrics = open(out / "metrics.jsonl", "r+b")
            self._metrics.truncate(self._checkpoint["metrics_bytes"])
            self._metrics.seek(0, os.SEEK_END)
            self._checkpoint = None

    @property
    def updates(self) -> int:
        """Inner updates of the whole run: the same with and without an outer loop."""
        meta = self.config.meta
        return meta.steps * meta.tasks * meta.n_inner

    def train(self) -> bool:
        """Runs to the end (True), or to the end of the meta-step in which a stop was requested."""
        meta = self.config.meta
        saved = self.step if (self.out / "checkpoint.pt").exists() else -1
        while self.step < meta.steps:
            self._meta_step(self.step)
            self.step += 1
            due = self.step % self.config.checkpoint_every == 0
            if due or self.stop_requested or self.step == meta.steps:
                self.save_checkpoint()
                saved = self.step
            if self.stop_requested:
                break
        if saved != self.step:
            self.save_checkpoint()
        self._metrics.close()
        self.policy.save(self.out / "policy")
        return self.step == meta.steps

    def _meta_step(self, step: int) -> None:
        config = self.config
        weights = preference.draw(
            len(config.names),
            alpha=config.preference.alpha,
            points=config.preference.grid,
            seed=config.seed,
            step=step,
            count=config.meta.tasks,
            rotate=config.preference.rotate,
        )
        self.outer.begin()
        for task, w in enumerate(weights):
            self.outer.begin_task(w)
            for inner in range(config.meta.n_inner):
                metrics = self._update(step, task, inner, w)
                if task + 1 == len(weights) and inner + 1 == config.meta.n_inner:
                    self.outer.end_task(w)
                    metrics |= self.outer.end(step)
                self._log(metrics)
            if task + 1 < len(weights):
                self.outer.end_task(w)

    def _update(self, step: int, task: int, inner: int, w: tuple[float, ...]) -> dict[str, Any]:
        """Rollout, score, update: one inner step for the preference w."""
        config = self.config
        update = (step * config.meta.tasks + task) * config.meta.n_inner + inner
        requests = [
            Request(prompt, w, config.rollout.samples) for prompt in self._prompts_of(update)
        ]
        rolled = backend(config.rollout.backend)(
            self.policy,
            requests,
            max_new_tokens=config.rollout.max_new_tokens,
            temperature=config.rollout.temperature,
            seed=config.seed,
            stream=("train", step, task, inner),
            max_cache_bytes=config.rollout.max_cache_bytes,
        )
        clock = Clock()
        scored = self.score(rolled)
        reward_seconds = clock.lap()
        lr = config.grpo.lr * 0.5 * (1.0 + math.cos(math.pi * update / self.updates))
        for group in self.outer.optimizer.param_groups:
            group["lr"] = lr
        for _ in range(config.grpo.epochs):
            self.outer.optimizer.zero_grad(set_to_none=True)
            learned = self.recipe.learner(
                self.policy, rolled, scored, config.grpo, config.rollout.temperature
            )
            limit = config.grpo.max_grad_norm or float("inf")
            learned["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.policy.trainable, limit)
            self.outer.optimizer.step()
        self.outer.optimizer.zero_grad(set_to_none=True)
        values = torch.stack([v.detach().float().cpu() for v in learned.values()]).tolist()
        names, raw, normal = config.names, scored.reward_RK, scored.normalized_RK
        return {
            "update": update,
            "meta_step": step,
            "task": task,
            "inner": inner,
            "w": w,
            **dict(zip(learned, values, strict=True)),
            "lr": lr,
            "score": float(scored.score_R.mean()),
            "rewards": dict(zip(names, raw.mean(0).tolist(), strict=True)),
            "normalized": dict(zip(names, normal.mean(0).tolist(), strict=True)),
            "above_utopia": int((normal > torch.tensor(self.scales.utopia)).any(1).sum()),
            "tokens": int(rolled.mask_RT.sum()),
            "prefill_tokens": rolled.prefill_tokens,
            "length": float(rolled.mask_RT.sum(1).float().mean()),
            "stopped": sum(f == "stop" for f in rolled.finish) / len(rolled.finish),
            "seconds": {
                "rollout": rolled.seconds,
                "reward": reward_seconds,
                "learn": clock.lap(),
            },
        }

    def score(self, rolled: Rollout) -> Scored:
        """Raw and normalised rewards, scores and group-relative advantages of a rollout."""
        reward = self.objectives.score(
            [rolled.prompts[g].text for g in rolled.group_R.tolist()], rolled.texts
        )
        normalized = self.scales.normalizer.apply(reward)
        score, advantage = ops.group_advantages(
            normalized,
            rolled.w_RK.to(normalized.device),
            rolled.group_R.to(normalized.device),
            utopia=torch.tensor(self.scales.utopia),
            mu=self.config.score.mu,
            scalarization=self.recipe.score,
        )
        return Scored(reward, normalized, score, advantage.to(rolled.mask_RT.device))

    def _prompts_of(self, update: int) -> list[Prompt]:
        """The next prompts, reshuffled whenever all have been seen; depends on (seed, update)."""
        n, b = len(self.prompts), self.config.rollout.prompts
        chosen = []
        for position in range(update * b, (update + 1) * b):
            epoch = np.random.Philox(key=key(self.config.seed, "prompts", position // n))
            order = np.random.Generator(epoch).permutation(n)
            chosen.append(self.prompts[order[position % n]])
        return chosen

    def _calibrate(self) -> Scales:
        """Statistics and z* from responses of the base model to training prompts."""
        config = self.config
        k, count = len(config.names), config.score.calibration
        grid = preference.lattice(k, config.preference.grid or 11)
        requests = [
            Request(prompt, grid[(i * 7) % len(grid)], max(1, count // len(self.prompts)))
            for i, prompt in enumerate(self.prompts[:count])
        ]
        with self.policy.reference() as base:
            rolled = backend(config.rollout.backend)(
                self.policy,
                requests,
                max_new_tokens=config.rollout.max_new_tokens,
                temperature=config.rollout.temperature,
                seed=config.seed,
                stream=("calibration",),
                network=base,
                max_cache_bytes=config.rollout.max_cache_bytes,
            )
        texts = [rolled.prompts[g].text for g in rolled.group_R.tolist()]
        reward = self.objectives.score(texts, rolled.texts)
        normalizer = Normalizer.fit(reward, config.score.normalization)
        normalized = normalizer.apply(reward)
        utopia = config.score.utopia or tuple(default_utopia(normalized).tolist())
        scales = Scales(normalizer, utopia)
        sample = {
            "responses": len(texts),
            "mean": reward.mean(0).tolist(),
            "std": reward.std(0).tolist(),
            "min": reward.amin(0).tolist(),
            "max": reward.amax(0).tolist(),
            # of a reward that never varies: undefined, written as 0 for JSON's sake
            "correlation": torch.nan_to_num(torch.corrcoef(reward.T)).tolist(),
        }
        scales.save(self.out / "statistics.json", config.names, config.score.mu, sample)
        return scales

    def _log(self, metrics: dict[str, Any]) -> None:
        self._metrics.write(json.dumps(metrics).encode() + b"\n")
        self._metrics.flush()
        self.on_update(metrics)

    def save_checkpoint(self) -> None:
        """Everything that the rest of the run depends on, in one file that is replaced whole."""
        os.fsync(self._metrics.fileno())
        state = {
            "version": __version__,
            "step": self.step,
            "metrics_bytes": self._metrics.tell(),
            "outer": self.outer.state(),
        }
        path = self.out / "checkpoint.pt"
        with replacing(path) as file:
            torch.save(state, file)


class Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        return seconds


def open_run(config: Config, out: Path, resume: bool) -> dict[str, Any] | None:
    """The checkpoint to go on from, or None for a new run. Refuses a folder that does not fit."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={str(out)!r}: is a file; name a folder")
    held = (out / "config.json").exists()
    if not resume:
        # A .tmp is what a process killed before its config was whole leaves: nothing to resume.
        if held or (out.exists() and any(p.suffix != ".tmp" for p in out.iterdir())):
            raise ValueError(f"out={str(out)!r}: exists; add --resume, or name another folder")
        return None
    if not held:
        raise ValueError(f"out={str(out)!r}: no run to resume; leave --resume out to start one")
    old, new = flat(to_dict(read_config(out))), flat(to_dict(config))
    changed = [
        f"{name} ({old.get(name)!r} -> {new.get(name)!r})"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not name.startswith(FREE_ON_RESUME)
    ]
    if changed:
        raise ValueError(f"--resume with a changed config: {', '.join(changed)}")
    path = out / "checkpoint.pt"
    if not path.exists():
        return None  # stopped before its first checkpoint: starts again
    return torch.load(path, map_location="cpu", weights_only=True)


def fitting(policy: Policy, prompts: tuple[Prompt, ...], config: Config) -> tuple[Prompt, ...]:
    """The prompts of at most `prompts.max_tokens` tokens. Raises ValueError for too few."""
    limit = config.prompts.max_tokens
    kept = tuple(p for p in prompts if len(policy.encode_prompt(p.text)) <= limit)
    if len(kept) < config.rollout.prompts:
        raise ValueError(
            f"prompts.train={config.prompts.train!r}: {len(kept)} of {len(prompts)} prompts have "
            f"at most {limit} tokens, but rollout.prompts={config.rollout.prompts}"
        )
    return kept


def flat(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Nested tables as one, with dotted names."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= flat(value, f"{where}{name}.") if isinstance(value, dict) else {where + name: value}
    return out


@contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """A file that takes `path`'s place when it is whole and on the disk, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:  # of a failure: on a full disk its remains are in the way
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def write_atomic(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def _check_space(out: Path, policy: Policy) -> None:
    """Room for two checkpoints (parameters, two moments): the old one goes last."""
    place = next(p for p in (out, *out.absolute().parents) if p.exists())
    trained = sum(p.numel() for p in policy.trainable)
    saved = sum(p.numel() * p.element_size() for p in policy.model.parameters())
    need = 2 * 3 * 4 * trained + 2 * saved
    free = shutil.disk_usage(place).free
    if free < need:
        raise ValueError(
            f"out={str(out)!r}: {free / 1e6:,.1f} MB free, checkpoints and the policy need "
            f"{need / 1e6:,.1f} MB; name a folder with more space"
        )
