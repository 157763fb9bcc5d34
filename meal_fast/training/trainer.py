"""The loop: draw preferences, roll out, score, update; checkpoints, and resuming bit for bit."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import torch

from meal_fast import __version__
from meal_fast.common import replacing, write_atomic
from meal_fast.config.config import Config, to_dict
from meal_fast.config.run_dir import AUTOMATIC, as_saved, flat, read_config, shared_statistics
from meal_fast.data import preferences
from meal_fast.data.devices import device_of, settled
from meal_fast.data.objectives import Objectives, load_objectives
from meal_fast.data.prompts import in_turn, load_prompts
from meal_fast.data.reward_statistics import Scales, constant
from meal_fast.data_types import Prompt
from meal_fast.models.model_soup import FILE, Family
from meal_fast.models.policy import Policy, load_policy
from meal_fast.models.threads import same_sums, use_threads
from meal_fast.rollout import Request, Sampling, open_backend

from .collectors.base import Experience
from .recipes import recipe_of

# What a resumed run may change: nothing that enters the mathematics of the steps.
FREE_ON_RESUME = ("checkpoint_every", "logger", "evaluation.")


class Trainer:
    """One run in one folder. `train()` goes from wherever the folder's checkpoint stands.

    It sets the number of threads of its process (the run's own, where one is resumed), and on a
    CPU torch's deterministic algorithms.

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
        held = read_config(out) if resume and (out / "config.json").is_file() else None
        config = config if held is None else as_saved(config, held)
        self.out = out
        self.on_update = on_update or (lambda metrics: None)
        self.stop_requested = False
        self._checkpoint = open_run(config, out, resume)
        config = dataclasses.replace(
            config, threads=use_threads(config.threads), policy=settled(config.policy)
        )
        shared = shared_statistics(config) if self._checkpoint is None else None
        self.recipe = recipe_of(config)
        self.recipe.collector.check(config)
        device = device_of(config.policy.device)
        prompts = load_prompts(config.prompts.train, "train")
        self.objectives: Objectives = load_objectives(
            config.objectives, config.objectives_device, device
        )
        # A broken one fails here; two rows, so that one number for all of them is noticed.
        self.objectives.rewards(["How are you?", "Who are you?"], ["Fine, thank you.", "A model."])
        self.policy: Policy = load_policy(config.policy, config.names, seed=config.seed)
        same_sums(self.policy.device.type == "cpu")
        micro_tokens = config.grpo.micro_tokens or self.policy.sizes.micro_tokens
        grpo = dataclasses.replace(config.grpo, micro_tokens=micro_tokens)
        self.config = config = dataclasses.replace(config, grpo=grpo)
        if config.meta.parallel:
            self.policy.check_stackable()
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
            if held is not None and not held.threads:  # an older run: from now on it says so
                held = dataclasses.replace(held, threads=config.threads)
                write_atomic(out / "config.json", json.dumps(to_dict(held), indent=1).encode())
            scales = Scales.load(out / "statistics.json")
            self._metrics = open(out / "metrics.jsonl", "r+b")
            self._metrics.truncate(self._checkpoint["metrics_bytes"])
            self._metrics.seek(0, os.SEEK_END)
        self.experience = self.recipe.collector(
            self.policy, self.objectives, scales, config, self.recipe.spec.score
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
        config, policy, rule = self.config, self.policy, self.recipe.spec.between
        served: AbstractContextManager[None] = nullcontext()
        if rule:
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
        lanes = self.outer.lanes
        due, last = self.done, self.done + config.meta.tasks * config.meta.n_inner - 1
        lines: dict[int, dict[str, Any]] = {}  # that are not logged yet
        self.outer.begin()
        for first in range(0, len(weights), len(lanes)):
            tasks = list(enumerate(weights))[first : first + len(lanes)]
            for lane, (_, w) in zip(lanes, tasks, strict=True):
                lane.begin_task(w)
            for inner in range(config.meta.n_inner):
                lines |= {line["update"]: line for line in self._updates(step, tasks, inner)}
                while due in lines and due < last:
                    self._log(lines.pop(due))
                    due += 1
            for lane, (_, w) in zip(lanes, tasks, strict=True):
                lane.end_task(w)
        self._log(lines[last] | self.outer.end(progress))

    def _updates(
        self, step: int, tasks: Sequence[tuple[int, preferences.Preference]], inner: int
    ) -> list[dict[str, Any]]:
        """Rollout, score, update: one inner step of as many tasks as go at once; their metrics."""
        meta, clock = self.config.meta, Clock()
        numbers = [(step * meta.tasks + task) * meta.n_inner + inner for task, _ in tasks]
        own, progress = numbers, [self.progress(number) for number in numbers]
        if self.recipe.spec.models:  # each model goes through prompts and schedule as if alone
            own = [step * meta.n_inner + inner] * len(tasks)
            progress = [self.progress(number * meta.tasks) for number in own]
        asked = [
            (self._prompts_of(number), w, ("train", step, task, inner))
            for number, (task, w) in zip(own, tasks, strict=True)
        ]
        # All tasks start as the policy, whose factors can be multiplied out.
        with self.policy.stacked(self.outer.stack if inner else ()):
            batch = self.experience.collect_tasks(asked)
        parts, collecting = batch.parts(), clock.lap()
        rates = [self.config.grpo.lr * 0.5 * (1.0 + math.cos(math.pi * p)) for p in progress]
        learned = self._learn(batch, rates) if len(batch.rolled.group_R) else [{} for _ in parts]
        self.tokens += batch.tokens
        lines = [
            {
                "update": number,
                "meta_step": step,
                "task": task,
                "inner": inner,
                "progress": self.progress(number + 1),
                "w": w,
                **(metrics or {"skipped": True}),
                "lr": lr,
                **self._of_responses(part),
                **self.experience.learned(number),
            }
            for (task, w), number, part, lr, metrics in zip(
                tasks, numbers, parts, rates, learned, strict=True
            )
        ]
        learning = clock.lap()
        for line, part in zip(lines, parts, strict=True):  # of what goes at once, equal shares
            if "skipped" in line:  # no step: Adam's state stays as it is
                number = line["update"]
                warnings.warn(f"update {number}: no response was kept; it is skipped", stacklevel=2)
            line["seconds"] = {
                "rollout": part.rolled.seconds,
                "reward": max(collecting / len(lines) - part.rolled.seconds, 0.0),
                "learn": learning / len(lines),
            }
        return lines

    def _of_responses(self, batch: Experience) -> dict[str, Any]:
        """What an update's responses say: means over them."""
        rolled, raw, names = batch.rolled, batch.reward_RK, self.config.names
        scales, kept = self.experience.scales, len(rolled.group_R) > 0
        normal = scales.normalizer.apply(raw)
        above_R = (normal > constant(scales.utopia, normal)).any(1)
        measured = [
            raw.mean(0),
            normal.mean(0),
            above_R.sum(),
            batch.scored.score_R.mean(),
            rolled.mask_RT.sum(1).float().mean(),
        ]
        values = torch.cat([value.float().view(-1) for value in measured]).tolist()  # one copy
        reward, normalized = values[: len(names)], values[len(names) : -3]
        above, score, length = values[-3:]
        return {
            "score": score if kept else None,
            "rewards": dict(zip(names, reward, strict=True)),
            "normalized": dict(zip(names, normalized, strict=True)),
            "above_utopia": int(above),
            "tokens": batch.tokens,
            "prefill_tokens": rolled.prefill_tokens,
            "length": length if kept else None,
            "stopped": sum(f == "stop" for f in rolled.finish) / max(len(rolled.finish), 1),
            **batch.log,
        }

    def _learn(self, batch: Experience, rates: Sequence[float]) -> list[dict[str, float]]:
        """The learner's gradients and Adam's steps, `grpo.epochs` times; the last one's metrics.

        One of each for every task that goes at once, at its learning rate.
        """
        options, lanes = self.config.grpo, self.outer.lanes
        for _ in range(options.epochs):
            with self.policy.stacked(self.outer.stack):
                learned = self.recipe.loss(
                    self.policy,
                    batch.rolled,
                    batch.scored,
                    options,
                    self.config.rollout.temperature,
                )
            learned["grad_norm"] = torch.stack(
                [
                    lane.advance(lr, options.max_grad_norm)
                    for lane, lr in zip(lanes, rates, strict=True)
                ]
            )
        values = torch.stack([v.detach().double().reshape(-1) for v in learned.values()])
        return [dict(zip(learned, of_task, strict=True)) for of_task in values.T.tolist()]

    def _prompts_of(self, update: int) -> list[Prompt]:
        """The next prompts, reshuffled whenever all have been seen; depends on (seed, update)."""
        b = self.config.rollout.prompts
        return in_turn(self.prompts, update * b, b, self.config.seed, "prompts")

    def _calibrate(self) -> Scales:
        """Statistics and z* from responses of the base model to training prompts."""
        config = self.config
        k, count = len(config.names), config.score.calibration
        grid = preferences.lattice(k, config.preference.grid or 11)
        requests = [
            Request(prompt, grid[(i * 7) % len(grid)], max(1, count // len(self.prompts)))
            for i, prompt in enumerate(self.prompts[:count])
        ]
        options = config.rollout
        sampling = Sampling(
            options.max_new_tokens, options.temperature, config.seed, ("calibration",)
        )
        with (
            self.policy.reference() as base,
            open_backend(
                options.backend,
                self.policy,
                network=base,
                max_cache_bytes=options.max_cache_bytes,
                join=True,
            ) as sampler,
        ):
            rolled = sampler.generate(requests, sampling)
        texts = [rolled.prompts[g].text for g in rolled.group_R.tolist()]
        reward = self.objectives.rewards(texts, rolled.texts)
        scales = Scales.fit(reward, config.score, standard=self.recipe.collector.standardizes)
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
        if old.get(name) != new.get(name)
        and not name.startswith(FREE_ON_RESUME)
        and not (name in AUTOMATIC and old[name] == AUTOMATIC[name])  # older: does not say
    ]
    if changed:
        raise ValueError(
            f"--resume with a changed config: {', '.join(changed)}; leave PRESET and these options "
            "out to go on, or name another --out"
        )
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
