"""The loop: draw preferences, roll out, score, update; checkpoints, and resuming bit for bit."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from . import __version__, preference
from .batch import Prompt, key
from .config import Config, to_dict
from .experience import Experience
from .family import FILE, Family
from .objectives import Objectives, load_objectives
from .policy import Policy, load_policy
from .prompts import load_prompts
from .recipes import recipe_of
from .rollout import Request, backend
from .runs import read_config, replacing, shared_statistics, write_atomic
from .scales import Scales

# What a resumed run may change: nothing that enters the mathematics of the steps.
FREE_ON_RESUME = ("checkpoint_every", "logger", "evaluation.")


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
        self.recipe = recipe_of(config)
        prompts = load_prompts(config.prompts.train, "train")
        self.objectives: Objectives = load_objectives(config.objectives)
        # A broken one fails here; two rows, so that one number for all of them is noticed.
        self.objectives.score(["How are you?", "Who are you?"], ["Fine, thank you.", "A model."])
        self.policy: Policy = load_policy(config.policy, config.names, seed=config.seed)
        self.prompts = fitting(self.policy, prompts, config)
        self.outer = self.recipe.outer(self.policy.trainable, config.meta, config.grpo)
        self.step = 0  # meta-steps done
        self.tokens = 0  # generated
        _check_space(out, self.policy, config.meta.tasks if config.model_points else 1)
        out.mkdir(parents=True, exist_ok=True)
        if self._checkpoint is None:
            write_atomic(out / "config.json", json.dumps(to_dict(config), indent=1).encode())
            if shared is None:
                scales = self._calibrate()
            else:
                write_atomic(out / "statistics.json", shared)
                scales = Scales.load(out / "statistics.json")
            self._metrics: BinaryIO = open(out / "metrics.jsonl", "wb")
        else:
            scales = Scales.load(out / "statistics.json")
            self._metrics = open(out / "metrics.jsonl", "r+b")
            self._metrics.truncate(self._checkpoint["metrics_bytes"])
            self._metrics.seek(0, os.SEEK_END)
        self.experience = self.recipe.experience(
            self.policy, self.objectives, scales, config, self.recipe.score
        )
        if self._checkpoint is not None:
            self.outer.load_state(self._checkpoint["outer"])
            self.experience.load_state(self._checkpoint["experience"])
            self.step, self.tokens = self._checkpoint["step"], self._checkpoint["tokens"]
            self._checkpoint = None

    @property
    def updates(self) -> int | None:
        """Inner updates of the whole run, the same with and without an outer loop; None where a
        budget of tokens ends it."""
        meta = self.config.meta
        return None if meta.tokens else meta.steps * meta.tasks * meta.n_inner

    @property
    def done(self) -> int:
        """Inner updates done."""
        return self.step * self.config.meta.tasks * self.config.meta.n_inner

    @property
    def finished(self) -> bool:
        meta = self.config.meta
        return self.tokens >= meta.tokens if meta.tokens else self.step >= meta.steps

    def progress(self, update: int) -> float:
        """The share of the run that is done before `update`: what the schedules follow."""
        return self.config.meta.progress(update, self.tokens)

    def train(self) -> bool:
        """Runs to the end (True), or to the end of the meta-step in which a stop was requested."""
        saved = self.step if (self.out / "checkpoint.pt").exists() else -1
        while not self.finished:
            self._meta_step(self.step)
            self.step += 1
            due = self.step % self.config.checkpoint_every == 0
            if due or self.stop_requested or self.finished:
                self.save_checkpoint()
                saved = self.step
            if self.stop_requested:
                break
        if saved != self.step:
            self.save_checkpoint()
        self._metrics.close()
        self.experience.save(self.out)
        self._save_policy()
        return self.finished

    def _save_policy(self) -> None:
        """`policy/`; of several models the one for equal weights, after a file with all of them."""
        config, policy, rule = self.config, self.policy, self.recipe.rule
        served: AbstractContextManager[None] = nullcontext()
        if rule is not None:
            models = self.outer.models()
            named = [dict(zip(policy.named, theta, strict=True)) for theta in models.values()]
            family = Family(tuple(models), tuple(named), rule)
            write_atomic(self.out / FILE, family.to_bytes(config.names))
            served = family.at(policy, (1.0 / len(config.names),) * len(config.names))
        with served:
            policy.save(self.out / "policy")

    def _meta_step(self, step: int) -> None:
        config = self.config
        weights = self.recipe.preferences(config, step)
        progress = self.progress(self.done)
        self.outer.begin()
        for task, w in enumerate(weights):
            self.outer.begin_task(w)
            for inner in range(config.meta.n_inner):
                metrics = self._update(step, task, inner, w)
                if task + 1 == len(weights) and inner + 1 == config.meta.n_inner:
                    self.outer.end_task(w)
                    metrics |= self.outer.end(progress)
                self._log(metrics)
            if task + 1 < len(weights):
                self.outer.end_task(w)

    def _update(self, step: int, task: int, inner: int, w: tuple[float, ...]) -> dict[str, Any]:
        """Rollout, score, update: one inner step for the preference w."""
        config, meta = self.config, self.config.meta
        update = (step * meta.tasks + task) * meta.n_inner + inner
        own, progress = update, self.progress(update)
        if self.recipe.rule is not None:  # each model goes through prompts and schedule as if alone
            own = step * meta.n_inner + inner
            progress = self.progress(own * meta.tasks)
        clock = Clock()
        batch = self.experience.collect(self._prompts_of(own), w, ("train", step, task, inner))
        rolled, scored = batch.rolled, batch.scored
        collecting = clock.lap()
        lr = config.grpo.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
        learned = self._learn(batch, lr) if len(rolled.group_R) else {}
        if not learned:  # no step: Adam's state stays as it is
            warnings.warn(f"update {update}: no response was kept; it is skipped", stacklevel=2)
        self.tokens += batch.tokens
        more = self.experience.learned(update)
        names, raw = config.names, batch.reward_RK
        normal = self.experience.scales.normalizer.apply(raw)
        return {
            "update": update,
            "meta_step": step,
            "task": task,
            "inner": inner,
            "progress": self.progress(update + 1),
            "w": w,
            **(learned or {"skipped": True}),
            "lr": lr,
            "score": float(scored.score_R.mean()) if learned else None,
            "rewards": dict(zip(names, raw.mean(0).tolist(), strict=True)),
            "normalized": dict(zip(names, normal.mean(0).tolist(), strict=True)),
            "above_utopia": int(
                (normal > torch.tensor(self.experience.scales.utopia)).any(1).sum()
            ),
            "tokens": batch.tokens,
            "prefill_tokens": rolled.prefill_tokens,
            "length": float(rolled.mask_RT.sum(1).float().mean()) if learned else None,
            "stopped": sum(f == "stop" for f in rolled.finish) / max(len(rolled.finish), 1),
            **batch.log,
            **more,
            "seconds": {
                "rollout": rolled.seconds,
                "reward": max(collecting - rolled.seconds, 0.0),
                "learn": clock.lap(),
            },
        }

    def _learn(self, batch: Experience, lr: float) -> dict[str, float]:
        """The learner's gradient and Adam's step, `grpo.epochs` times; metrics of the last."""
        options = self.config.grpo
        optimizer = self.outer.optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr
        for _ in range(options.epochs):
            optimizer.zero_grad(set_to_none=True)
            learned = self.recipe.learner(
                self.policy, batch.rolled, batch.scored, options, self.config.rollout.temperature
            )
            limit = options.max_grad_norm or float("inf")
            learned["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.policy.trainable, limit)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        values = torch.stack([v.detach().float().cpu() for v in learned.values()]).tolist()
        return dict(zip(learned, values, strict=True))

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
        scales = Scales.fit(reward, config.score, standard=self.recipe.experience.standardizes)
        scales.save(self.out / "statistics.json", config.names, config.score.mu, reward)
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
            "tokens": self.tokens,
            "metrics_bytes": self._metrics.tell(),
            "outer": self.outer.state(),
            "experience": self.experience.state(),
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


def _check_space(out: Path, policy: Policy, models: int) -> None:
    """Room for two checkpoints (parameters, two moments): the old one goes last."""
    place = next(p for p in (out, *out.absolute().parents) if p.exists())
    trained = sum(p.numel() for p in policy.trainable) * models
    saved = sum(p.numel() * p.element_size() for p in policy.model.parameters())
    family = 4 * trained if models > 1 else 0
    need = 2 * 3 * 4 * trained + 2 * saved + family
    free = shutil.disk_usage(place).free
    if free < need:
        raise ValueError(
            f"out={str(out)!r}: {free / 1e6:,.1f} MB free, checkpoints and the policy need "
            f"{need / 1e6:,.1f} MB; name a folder with more space"
        )
