"""What a run folder gives a server: its policy, what else answers for it, and its rewards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from meal_fast.common import off_simplex
from meal_fast.config.config import Config
from meal_fast.config.run_dir import PREFERENCE_NET, policy_folder, read_statistics
from meal_fast.config.sealed import unfinished
from meal_fast.data.objectives import Objectives, load_objectives
from meal_fast.data.preferences import Preference, snapped
from meal_fast.data_types import Prompt
from meal_fast.models.model_soup import load_served
from meal_fast.models.network import Network
from meal_fast.models.threads import use_threads
from meal_fast.training.preference_net import PreferenceNet, features

Way = tuple[str, Preference | None]  # "base" or "policy", and the w that has its own parameters


class ServedRun:
    """A run that is held ready to answer. Raises ValueError for one that has no policy yet."""

    def __init__(self, run: Path, config: Config) -> None:
        policy_folder(run)
        use_threads(config.threads)
        self.name, self.config, self.names = run.resolve().name, config, config.names
        self.unfinished = unfinished(run)
        self.policy, self.family = load_served(run, config)
        net = run / PREFERENCE_NET
        self.net = PreferenceNet.load(net, config.names) if net.is_file() else None
        self.rewards = Rewards(run, config)

    def preference(self, given: object) -> Preference | None:
        """Read a mapping {objective: value}; "auto" is None; nothing: all objectives alike.

        Raises ValueError for anything else, and for "auto" where the run has no net.
        """
        expected = ", ".join(f'"{name}": …' for name in self.names)
        if given is None:
            return (1.0 / len(self.names),) * len(self.names)
        if given == "auto":
            if self.net is None:
                raise ValueError("preference='auto': this run has no preference-weight-net")
            return None
        if not isinstance(given, Mapping):
            raise ValueError(f"preference={given!r}: give {{{expected}}} or 'auto'")
        if set(given) != set(self.names):
            raise ValueError(f"preference={dict(given)!r}: the objectives are {{{expected}}}")
        values = [given[name] for name in self.names]
        if any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
            raise ValueError(f"preference={dict(given)!r}: the values must be numbers")
        if any(abs(v) > 2 for v in values):  # a whole number may be beyond every float
            raise ValueError("preference: the values must lie between 0 and 1")
        w = tuple(map(float, values))
        if reason := off_simplex(w, self.names):
            raise ValueError(f"preference={dict(given)!r}: {reason}; none negative, summing to 1")
        return w

    def way(self, base: bool, w: Preference | None) -> Way:
        """Tell what answers: one network for all preferences, or parameters for this one alone."""
        return ("base", None) if base else ("policy", None if self.family is None else w)

    @contextmanager
    def network(self, way: Way) -> Iterator[Network]:
        """Give the network of one way, for as long as nothing else is asked of the policy."""
        kind, w = way
        if kind == "base":
            with self.policy.reference() as network:
                yield network
        elif w is None or self.family is None:
            with self.policy.merged() as network:
                yield network
        else:
            with self.family.at(self.policy, w), self.policy.merged() as network:
                yield network

    def predicted(self, prompt: Prompt) -> Preference:
        """Ask the net for a prompt's preference. No network may be open."""
        assert self.net is not None
        predicted = self.net(features(self.policy, [prompt]).cpu()).tolist()
        (w,) = snapped(predicted, self.config.preference.grid)
        return w


class Rewards:
    """The run's objectives in a thread of their own, loaded when they are first asked for."""

    def __init__(self, run: Path, config: Config) -> None:
        self._config = config
        self._thread = ThreadPoolExecutor(1, "meal-fast-rewards")
        self._objectives: Objectives | ValueError | None = None
        self.waiting, self._counting = 0, Lock()  # calls of `score` that are not answered
        try:
            sample = read_statistics(run / "statistics.json").get("calibration", {})
        except ValueError:
            sample = {}
        # Of the base model's answers: between which rewards a bar is drawn, until it sees others.
        low, high = sample.get("min", ()), sample.get("max", ())
        known = len(low) == len(high) == len(config.names)
        self.ranges = [list(ends) for ends in zip(low, high, strict=True)] if known else []

    def score(self, prompt: str, answers: Sequence[str]) -> Future[list[list[float | None]]]:
        """Score answers to one prompt: (R, K), None where an objective does not apply.

        The future raises ValueError where that fails.
        """
        with self._counting:
            self.waiting += 1
        future = self._thread.submit(self._score, prompt, list(answers))
        future.add_done_callback(self._done)
        return future

    def _done(self, _: Future[list[list[float | None]]]) -> None:
        with self._counting:
            self.waiting -= 1

    def _score(self, prompt: str, answers: list[str]) -> list[list[float | None]]:
        if self._objectives is None:
            config = self._config
            try:
                self._objectives = load_objectives(
                    config.objectives,
                    config.objectives_device,
                    timeout=config.objectives_timeout,
                )
            except (ValueError, ImportError, OSError) as error:
                self._objectives = ValueError(f"the run's objectives cannot be loaded: {error}")
        if isinstance(self._objectives, ValueError):
            raise self._objectives
        with torch.no_grad():
            rewards: Any = self._objectives.rewards([prompt] * len(answers), answers)
        return [[None if x != x else float(x) for x in row] for row in rewards.tolist()]

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)
