"""The loop: draw preferences, roll out, score, update. `Trainer.meta_step` is all of it."""

from __future__ import annotations

import dataclasses
import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from meal_fast.common import write_atomic
from meal_fast.config.config import Config
from meal_fast.config.run_dir import (
    as_saved,
    check_folder,
    read_config,
    read_metrics,
    shared_statistics,
)
from meal_fast.config.run_lock import lock
from meal_fast.config.sealed import break_seal
from meal_fast.data.devices import device_of, settled
from meal_fast.data.objectives import Objectives, load_objectives
from meal_fast.data.prompts import by_turns, load_prompts
from meal_fast.data.reward_statistics import Scales
from meal_fast.models.chat_template import keep_template, kept_template
from meal_fast.models.policy import Policy, load_policy
from meal_fast.models.threads import same_sums, use_threads
from meal_fast.rollout.fitting import fitting

from .batch import Batch, Task
from .calibration import calibrate
from .checkpoint import Checkpoints, check_space, note_threads, write_config, write_policy
from .collectors.base import collected
from .completions import Completions, Row
from .lessons import check_sources
from .metrics import Clock, MetricsLog, of_responses
from .outer import Drawn
from .recipes import recipe_of
from .reward_hacking import RewardHacking, own_marks
from .skips import Skips
from .warmup import warm_up


class Trainer:
    """Train in one folder. `train()` goes on from wherever the folder's checkpoint stands.

    It sets the number of threads of its process (the run's own, where one is resumed), and on a
    CPU torch's deterministic algorithms.

    Raise ValueError, before anything expensive, for whatever is wrong with config, folder, prompts
    or objectives. `ahead` is called when these are loaded: to check what the run is for later.
    """

    def __init__(
        self,
        config: Config,
        out: Path,
        *,
        resume: bool = False,
        on_update: Callable[[dict[str, Any]], None] | None = None,
        on_answers: Callable[[list[Row]], None] | None = None,
        tell: Callable[[str], None] = lambda stage: None,
        ahead: Callable[[Policy, Config], None] = lambda policy, config: None,
    ) -> None:
        self.out = out
        self.on_update = on_update or (lambda metrics: None)
        self.on_answers = on_answers or (lambda rows: None)
        self.tell, self.ahead = tell, ahead
        self.stop_requested = False
        check_folder(config, out, resume)
        # Given back when the training ends, or the trainer is dropped.
        self._unlock = weakref.finalize(self, lock(out, "training").release)
        try:
            self._begin(config, resume)
        except BaseException:
            self._unlock()
            raise

    def _begin(self, config: Config, resume: bool) -> None:
        """Load everything, and come to the first update."""
        out, tell = self.out, self.tell
        held = read_config(out) if resume and (out / "config.json").is_file() else None
        config = config if held is None else as_saved(config, held)
        self.checkpoints = Checkpoints(out)
        checkpoint = self.checkpoints.open(config, resume)
        shared = shared_statistics(config) if checkpoint is None else None
        self.config = config = self._load(config)
        out.mkdir(parents=True, exist_ok=True)
        if checkpoint is None:
            write_config(out, config)
        keep_template(out, self.policy.base_template)
        if config.warmup.steps:
            warm_up(self.policy, self.objectives, self.prompts, config, out, tell)
        self.outer = self.recipe.outer(self.policy.trainable, config.meta, config.grpo)
        if checkpoint is None:
            scales = self._scales(shared)
        else:
            if held is not None:
                note_threads(out, held, self.config.threads)
            scales = Scales.load(out / "statistics.json")
        self.collector = self.recipe.collector(
            self.policy, self.objectives, scales, self.config, self.recipe.spec.score
        )
        self.net = self.collector.net  # Meal's; None: there is no net to train
        self.skips = Skips(self.config.grpo, by_model=bool(self.recipe.spec.models))
        self.step = 0  # meta-steps done
        self.tokens = 0  # generated
        if checkpoint is not None:
            state = checkpoint.load()
            self.outer.load_state(state["outer"])
            self.collector.load_state(state["experience"])
            self.step, self.tokens = checkpoint.step, checkpoint.tokens
        self.log = MetricsLog(
            out / "metrics.jsonl",
            written=0 if checkpoint is None else checkpoint.metrics_bytes,
            first=self.done,
            in_step=self.config.meta.tasks * self.config.meta.n_inner,
            told=lambda line: self.on_update(line),
        )
        self.completions = Completions(
            out,
            config.names,
            config.evaluation.marks,
            written=0 if checkpoint is None else checkpoint.completions_bytes,
            keep=config.completions,
            hacking=self._hacking(),
            told=lambda rows: self.on_answers(rows),
            ordinary=frozenset(p.id for p in self.benign),
        )
        tell("the first update")

    def _load(self, config: Config) -> Config:
        """Load policy, prompts and objectives; give the config as this machine has it."""
        threads, policy = use_threads(config.threads), settled(config.policy)
        config = dataclasses.replace(config, threads=threads, policy=policy)
        self.recipe = recipe_of(config)
        self.recipe.collector.check(config)
        if config.warmup.steps:
            check_sources(config)
        device = device_of(config.policy.device)
        prompts = load_prompts(config.prompts.train, "train")
        more = config.prompts.benign
        benign = load_prompts(more, "train") if more else ()
        self.tell("loading the reward models")
        self.objectives: Objectives = load_objectives(
            config.objectives,
            config.objectives_device,
            device,
            timeout=config.objectives_timeout,
            needs_all=f"recipe {config.recipe}" if self.recipe.spec.needs_all else "",
        )
        self.objectives.stopping = lambda: self.stop_requested
        # A broken one fails here; two rows, so that one number for all of them is noticed.
        asked = [prompt.text for prompt in (*prompts, *prompts)[:2]]
        self.objectives.rewards(asked, ["Fine, thank you.", "A model."])
        self.tell(f"loading the model on {device}")
        self.policy: Policy = load_policy(
            config.policy, config.names, seed=config.seed, template=kept_template(self.out)
        )
        same_sums(self.policy.device.type == "cpu")
        micro_tokens = config.grpo.micro_tokens or self.policy.sizes.micro_tokens
        grpo = dataclasses.replace(config.grpo, micro_tokens=micro_tokens)
        config = dataclasses.replace(config, grpo=grpo)
        if config.meta.parallel:
            self.policy.check_stackable()
        say = partial(warnings.warn, stacklevel=3)
        train, least = f"prompts.train={config.prompts.train!r}", config.rollout.prompts
        self.prompts = fitting(self.policy, prompts, config, train, say, at_least=least)
        self.benign = benign and fitting(
            self.policy, benign, config, f"prompts.benign={config.prompts.benign!r}", say
        )
        self.ahead(self.policy, config)
        check_space(self.out, self.policy, config.meta.tasks if config.model_points else 1)
        return config

    def _scales(self, shared: bytes | None) -> Scales:
        """Calibrate, or take another run's statistics."""
        self.tell("calibrating the rewards")
        if shared is not None:
            write_atomic(self.out / "statistics.json", shared)
            return Scales.load(self.out / "statistics.json")
        standard = self.recipe.collector.standardizes
        return calibrate(
            self.policy, self.objectives, self.prompts, self.config, self.out, standard=standard
        )

    def _hacking(self) -> RewardHacking | None:
        """Judge the run by marks, where its policy reads a preference; see `reward_hacking`."""
        spec, config = self.recipe.spec, self.config
        if spec.reads == "scores" or not config.evaluation.marks:
            return None
        own = own_marks(
            self.objectives,
            self.collector.scales.normalizer,
            config.names,
            self.prompts,
            config.evaluation.marks,
        )
        return RewardHacking(own, read_metrics(self.out))

    @property
    def updates(self) -> int | None:
        """Count the run's inner updates, the same with and without an outer loop; None where a
        budget of tokens ends it."""
        meta = self.config.meta
        return None if meta.tokens else meta.steps * meta.tasks * meta.n_inner

    @property
    def done(self) -> int:
        """Count the inner updates that are done."""
        return self.step * self.config.meta.tasks * self.config.meta.n_inner

    @property
    def finished(self) -> bool:
        """Say whether the run is at its end."""
        meta = self.config.meta
        return self.tokens >= meta.tokens if meta.tokens else self.step >= meta.steps

    def progress(self, update: int) -> float:
        """Give the share of the run that is done before `update`: what the schedules follow."""
        return self.config.meta.progress(update, self.tokens)

    def train(self) -> bool:
        """Run to the end (True), or to the end of the meta-step in which a stop was requested."""
        try:
            return self._train()
        finally:
            self.checkpoints.close()
            self.log.close()
            self.completions.close()
            self._unlock()

    def _train(self) -> bool:
        while not self.finished:
            self.meta_step()
            self.step += 1
            due = self.step % self.config.checkpoint_every == 0
            if due or self.stop_requested or self.finished or self.skips.too_many:
                self.save_checkpoint()
            if self.skips.too_many:
                raise ValueError(f"{self.skips.too_many}; what was learnt before is saved")
            if self.stop_requested:
                break
        if self.checkpoints.latest != self.step:
            self.save_checkpoint()
        self.checkpoints.finish()
        break_seal(self.out)
        self.collector.save(self.out)
        progress = self.progress(self.done)
        write_policy(self.out, self.policy, self.config, self.outer.models(), progress)
        return self.finished

    def meta_step(self) -> None:
        """Take one step of the outer loop: each preference's inner updates start from one theta."""
        preferences = self.recipe.preferences(self.config, self.step)
        progress = self.progress(self.done)
        self.outer.begin()  # keep theta
        for drawn in self.outer.in_batches(preferences):  # one task, or all as stacked adapters
            with self.outer.tasks(drawn):  # theta and Adam's state in; the deltas out
                for inner in range(self.config.meta.n_inner):
                    clock, tasks = Clock(), self.tasks(drawn, inner)
                    # At first all tasks are the policy itself, whose factors can be multiplied out.
                    with self.policy.stacked(self.outer.stack if inner else ()):
                        # Rollout, rewards, advantages.
                        batch = collected(self.collector, self.objectives, tasks)
                    collecting = clock.lap()
                    of_net = self.net.update(batch) if self.net else {}  # Meal's outer level
                    learned = self.update_policy(batch, tasks)  # loss, backward, clip, AdamW
                    self.tokens += batch.tokens
                    lines = self._lines(tasks, batch, learned, of_net)
                    lines = self.completions.add(tasks, batch, lines)
                    self.log.add(_timed(lines, batch, collecting, clock.lap()))
        self.log.end_step(self.outer.end(progress))  # theta += epsilon * mean(deltas)

    def tasks(self, drawn: Drawn, inner: int) -> list[Task]:
        """Say what an inner update of some of the meta-step's tasks is asked for."""
        config, step = self.config, self.step
        b, meta = config.rollout.prompts, config.meta
        tasks = []
        for number, w in drawn:
            update = own = (step * meta.tasks + number) * meta.n_inner + inner
            progress = self.progress(update)
            if self.recipe.spec.models:  # each model goes through prompts and schedule as if alone
                own = step * meta.n_inner + inner
                progress = self.progress(own * meta.tasks)
            # The next prompts, reshuffled whenever all have been seen.
            turns = (self.prompts, self.benign, config.prompts.benign_share)
            prompts = tuple(by_turns(*turns, own, b, config.seed, "prompts"))
            rng_key = ("train", step, number, inner)
            lr = config.grpo.lr * 0.5 * (1.0 + math.cos(math.pi * progress))
            tasks.append(Task(update, step, number, inner, w, prompts, rng_key, progress, lr))
        return tasks

    def update_policy(self, batch: Batch, tasks: Sequence[Task]) -> list[dict[str, float]]:
        """Take Adam's steps along the loss's gradient, `grpo.epochs` of them, for every task.

        Give the last one's metrics, task by task; empty, and no step, where there is no response.
        """
        if not len(batch.rolled.group_R):
            return [{} for _ in tasks]
        options, temperature = self.config.grpo, self.config.rollout.temperature
        lanes, left_out = self.outer.lanes, torch.zeros(len(tasks), device=self.policy.device)
        for _ in range(options.epochs):
            with self.policy.stacked(self.outer.stack):
                learned = self.recipe.loss(
                    self.policy, batch.rolled, batch.scored, options, temperature
                )
            norms = []
            for lane, task, loss in zip(lanes, tasks, learned["loss"].reshape(-1), strict=True):
                lane.watch(loss)
                norms.append(lane.advance(task.lr, options.max_grad_norm))
            learned["grad_norm"] = torch.stack(norms)
            left_out = left_out + torch.stack([lane.left_out for lane in lanes])
        learned["left_out"] = left_out  # steps whose loss or gradient was not finite
        values = torch.stack([v.detach().double().reshape(-1) for v in learned.values()])
        found = [dict(zip(learned, of_task, strict=True)) for of_task in values.T.tolist()]
        for lane, metrics in zip(lanes, found, strict=True):
            if metrics["left_out"]:
                lane.settle()
        return found

    def _lines(
        self,
        tasks: Sequence[Task],
        batch: Batch,
        learned: Sequence[dict[str, float]],
        of_net: dict[str, float],
    ) -> list[dict[str, Any]]:
        """Give what the updates say of themselves, task by task."""
        names, scales = self.config.names, self.collector.scales
        for task, metrics in zip(tasks, learned, strict=True):
            if not metrics:  # no step: Adam's state stays as it is
                said = f"update {task.update}: no response was kept; it is skipped"
                warnings.warn(said, stacklevel=2)
        return [
            {
                "update": task.update,
                "meta_step": task.step,
                "task": task.number,
                "inner": task.inner,
                "progress": self.progress(task.update + 1),
                "w": task.preference,
                **(self.skips.said(task, metrics) or {"skipped": True}),
                "lr": task.lr,
                **of_responses(part, names, scales, partial=self.objectives.partial),
                **of_net,
            }
            for task, part, metrics in zip(tasks, batch.parts(), learned, strict=True)
        ]

    def save_checkpoint(self) -> None:
        """Write everything that the rest of the run depends on."""
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "metrics_bytes": self.log.sync(),
            "completions_bytes": self.completions.sync(),
            "files": self.log.digest | self.completions.digest,
            "outer": self.outer.state(),
            "experience": self.collector.state(),  # the name that runs have been saved with
        }
        self.checkpoints.save(state, self.config)


def _timed(
    lines: Sequence[dict[str, Any]], batch: Batch, collecting: float, learning: float
) -> list[dict[str, Any]]:
    """Add seconds to lines: of what goes at once, equal shares."""
    n, rollout = len(lines), batch.rolled.seconds / len(lines)
    reward = max(collecting / n - rollout, 0.0)
    seconds = {"rollout": rollout, "reward": reward, "learn": learning / n}
    return [line | {"seconds": seconds} for line in lines]
