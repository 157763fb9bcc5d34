"""The loop: draw preferences, roll out, score, update. `Trainer.meta_step` is all of it."""

from __future__ import annotations

import dataclasses
import math
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from meal_fast.common import require, write_atomic
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
from meal_fast.data.preferences import Preference
from meal_fast.data.prompts import by_turns, load_prompts
from meal_fast.data.reward_statistics import Scales
from meal_fast.models.chat_template import keep_template, kept_template
from meal_fast.models.policy import Policy, load_policy
from meal_fast.models.sharding import mesh_of, shard, whole
from meal_fast.models.threads import same_sums, use_threads
from meal_fast.rollout.fitting import fitting

from .batch import Batch, Task
from .calibration import calibrate
from .checkpoint import Checkpoints, check_space, note_threads, write_config, write_policy
from .checkpoint_saved import Saved
from .collectors.base import collected
from .completions import Completions, Row, rows_of
from .distributed import ALONE, Drawn, Grace, Mesh, check_shared
from .journal import Done, Journal, done
from .lessons import check_sources
from .metrics import Clock, MetricsLog, of_responses
from .policy_update import PolicyUpdate
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
        mesh: Mesh = ALONE,
    ) -> None:
        self.out, self.mesh = out, mesh
        self.on_update = on_update or (lambda metrics: None)
        self.on_answers = on_answers or (lambda rows: None)
        self.tell, self.ahead = tell, ahead
        self.stop_requested = False  # of this process
        self.stopped = False  # of any, when all were told so
        mesh.agreed(lambda: check_folder(config, out, resume))
        # Given back when the training ends, or the trainer is dropped.
        self._unlock = weakref.finalize(self, lambda: None)
        mesh.agreed(self._lock)
        try:
            self._begin(config, resume)
        except BaseException:
            self._unlock()
            raise

    def _lock(self) -> None:
        if self.mesh.main:
            self._unlock = weakref.finalize(self, lock(self.out, "training").release)

    def _begin(self, config: Config, resume: bool) -> None:
        """Load everything, and come to the first update."""
        out, tell, mesh = self.out, self.tell, self.mesh
        held = read_config(out) if resume and (out / "config.json").is_file() else None
        config = config if held is None else as_saved(config, held)
        parts, remedy = mesh.layout.virtual, "the run's own number of parts; start it as it was"
        require(config.mesh.virtual in (0, parts), "mesh.virtual", parts, remedy)
        self.checkpoints = Checkpoints(out, mesh)
        checkpoint = self.checkpoints.open(config) if resume else None
        shared = shared_statistics(config) if checkpoint is None else None
        self.config = mesh.agreed(lambda: self._load(config), first=True)
        config = self.config
        mesh.agreed(lambda: self._write_start(checkpoint is None))
        mesh.agreed(lambda: check_shared(out))
        if config.warmup.steps:
            args = self.policy, self.objectives, self.prompts, config, out, tell
            mesh.agreed(lambda: warm_up(*args), first=True)
        if checkpoint is None:
            scales = mesh.main_alone(lambda: self._scales(shared))
        else:
            if held is not None and mesh.main:
                note_threads(out, held, self.config.threads)
            scales = Scales.load(out / "statistics.json")
        if mesh.layout.shard > 1:
            self.tell("sharing the weights out")
            device = mesh_of(mesh.layout, self.policy.device.type)
            shard(self.policy, device, timeout=mesh.timeout)
        self.outer = self.recipe.outer(self.policy.trainable, config.meta, config.grpo, mesh)
        self.collector = self.recipe.collector(
            self.policy, self.objectives, scales, config, self.recipe.spec.score, mesh
        )
        self.update_policy = PolicyUpdate(self.policy, self.outer, self.recipe.loss, config, mesh)
        self.net = self.collector.net  # Meal's; None: there is no net to train
        self.skips = Skips(config.grpo, by_model=bool(self.recipe.spec.models))
        self.step = 0  # meta-steps done
        self.tokens = 0  # generated, in these
        if checkpoint is not None:
            state = checkpoint.load()
            self.outer.load_state(state["outer"])
            self.collector.load_state(state["experience"])
            self.step, self.tokens = checkpoint.step, checkpoint.tokens
        self.journal = Journal(
            self.skips,
            self.tokens,
            config.meta.progress,
            mesh.agreed(lambda: self._files(checkpoint) if mesh.main else None),
            wait=mesh.layout.groups > 1,
        )
        tell("the first update")

    def _write_start(self, new: bool) -> None:
        """Write what a run begins with, on the main process."""
        if self.mesh.main:
            self.out.mkdir(parents=True, exist_ok=True)
            if new:
                write_config(self.out, self.config)
            keep_template(self.out, self.policy.base_template)

    def _files(self, checkpoint: Saved | None) -> tuple[MetricsLog, Completions]:
        """Open what the updates are told in, as long as they were at the checkpoint."""
        log = MetricsLog(
            self.out / "metrics.jsonl",
            written=checkpoint.metrics_bytes if checkpoint else 0,
            first=self.done,
            in_step=self.config.meta.tasks * self.config.meta.n_inner,
            told=lambda line: self.on_update(line),
        )
        completions = Completions(
            self.out,
            self.config.names,
            written=checkpoint.completions_bytes if checkpoint else 0,
            keep=self.config.completions,
            hacking=self._hacking(),
            told=lambda rows: self.on_answers(rows),
            ordinary=frozenset(p.id for p in self.benign),
        )
        return log, completions

    def _load(self, config: Config) -> Config:
        """Load policy, prompts and objectives; give the config as this machine has it."""
        threads = use_threads(config.threads or self.mesh.threads)
        # The layout is this start's; into how many parts an update is cut, the run's.
        mesh = dataclasses.replace(config.mesh, groups=0, data=0, virtual=self.mesh.layout.virtual)
        config = dataclasses.replace(
            config, threads=threads, policy=settled(config.policy), mesh=mesh
        )
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
        """Run to the end (True), or to the end of the meta-step in which a stop was requested.

        Raises GivenUp where that would have taken too long; the last checkpoint is then good.
        """
        try:
            return self._train()
        finally:
            self.checkpoints.close()
            self.journal.close()
            self._unlock()

    def _train(self) -> bool:
        while not self.finished:
            self.meta_step()
            self.step += 1
            stop = self.mesh.any(self.stop_requested)  # one that comes meanwhile is for the next
            due = self.step % self.config.checkpoint_every == 0
            if due or stop or self.finished or self.skips.too_many:
                self.save_checkpoint()
            self.mesh.agreed(self.skips.check)
            if stop:
                break
        if self.checkpoints.latest != self.step:
            self.save_checkpoint()
        self.checkpoints.finish()
        models = self.outer.models()
        self.mesh.agreed(lambda: self._write_end(models))
        self.stopped = self.mesh.any(self.stop_requested)
        return self.finished

    def _write_end(self, models: Mapping[Preference, Sequence[Tensor]]) -> None:
        """Write what is served, on the main process, with what its group holds of the weights."""
        if not self.mesh.main:
            if self.policy.sharded is not None and self.mesh.number == 0:
                self.policy.save(self.out / "policy")
            return
        break_seal(self.out)
        self.collector.save(self.out)
        write_policy(self.out, self.policy, self.config, models, self.progress(self.done))

    def meta_step(self) -> None:
        """Take one step of the outer loop: each preference's inner updates start from one theta."""
        preferences = self.recipe.preferences(self.config, self.step)
        progress = self.progress(self.done)
        meta = self.config.meta
        inherits = meta.adam == "per_preference" and not meta.parallel
        shares = self.mesh.shares(preferences, together=inherits)
        self.outer.begin(shares)  # keep theta
        groups = self.mesh.across_groups(lambda: self._inner_updates(shares[self.mesh.number]))
        self.journal.told_of(groups, at_once=self.config.meta.parallel)
        self.journal.end_step(self.outer.end(progress))  # theta += epsilon * mean(deltas)
        self.tokens = self.journal.tokens

    def _inner_updates(self, mine: Drawn) -> list[Done]:
        """Take the inner updates of this group's tasks; give those that are not told of yet."""
        n_inner = self.config.meta.n_inner
        grace = Grace(self.mesh, sum(n_inner for _ in self.outer.in_batches(mine)))
        for drawn in self.outer.in_batches(mine):  # one task, or all as stacked adapters
            with self.outer.tasks(drawn):  # theta and Adam's state in; the deltas out
                for inner in range(n_inner):
                    grace.check(self.stop_requested)
                    clock, tasks = Clock(), self.tasks(drawn, inner)
                    # At first all tasks are the policy itself, whose factors can be multiplied out.
                    stack = self.outer.stack if inner else ()
                    with whole(self.policy), self.policy.stacked(stack):
                        # Rollout, rewards, advantages.
                        batch = collected(self.collector, self.objectives, tasks)
                    collecting = clock.lap()
                    of_net = self.net.update(batch) if self.net else {}  # Meal's outer level
                    learned = self.update_policy(batch, tasks)  # loss, backward, clip, AdamW
                    self.journal.add(self._done(tasks, batch, learned, of_net, collecting, clock))
        return self.journal.held

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

    def _done(
        self,
        tasks: Sequence[Task],
        batch: Batch,
        learned: Sequence[dict[str, float]],
        of_net: dict[str, float],
        collecting: float,
        clock: Clock,
    ) -> list[Done]:
        """Say what an inner update was, task by task."""
        config, parts = self.config, batch.parts()
        scales, partial = self.collector.scales, self.objectives.partial
        more: list[dict[str, Any]] = [{} for _ in parts]
        rows: list[list[Row]] = [[] for _ in parts]
        if self.mesh.leads:  # one of a group tells it
            more = [of_responses(p, config.names, scales, partial=partial) | of_net for p in parts]
            how = config.names, config.evaluation.marks
            rows = [rows_of(task, p, *how) for task, p in zip(tasks, parts, strict=True)]
        times = {"rollout": batch.rolled.seconds, "collecting": collecting, "learning": clock.lap()}
        return done(tasks, parts, learned, more, rows, **times)

    def save_checkpoint(self) -> None:
        """Write everything that the rest of the run depends on."""
        # Of which groups have different ones where each preference has a model.
        if self.mesh.world > 1 and not self.recipe.spec.models:
            held = self.outer.held
            theta = sum(p.detach().double().sum() for p in held.local)
            if self.policy.in_parts:
                theta = held.norm([p.detach() for p in held.local])
            self.mesh.same(repr(float(theta)), f"meta-step {self.step}: the sum of all parameters")
        state = {
            "step": self.step,
            "tokens": self.tokens,
            **self.journal.sync(),
            "outer": self.outer.state(copies=False),
            "experience": self.collector.state(),  # the name that runs have been saved with
        }
        self.checkpoints.save(state, self.config)
