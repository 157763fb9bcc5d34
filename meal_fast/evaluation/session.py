"""A finished run that answers one prompt at a time, at any preference. Importing it needs no torch.

Each prompt stands alone: training saw single turns.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from meal_fast.common import require
from meal_fast.config.cli import parse_weights
from meal_fast.config.config import Config
from meal_fast.config.run_dir import policy_folder
from meal_fast.data_types import Prompt
from meal_fast.models.threads import use_threads

if TYPE_CHECKING:
    from meal_fast.rollout import Backend

Asked = tuple[float, ...] | None  # a preference; None: the net's, for every prompt
NET = "preference_net.safetensors"  # in the folder of a run of recipe `meal`


def preference(text: str | None, run: Path, names: Sequence[str]) -> Asked:
    """Read a preference as it is typed; `auto`: the net's; None: all objectives alike.

    Raises ValueError for what is none, and for `auto` where the run has no net.
    """
    if text is None:
        return (1.0 / len(names),) * len(names)
    if text != "auto":
        return parse_weights(text, names)
    if not (run / NET).is_file():
        raise ValueError(
            f"w='auto': {str(run)!r} holds no preference-weight-net; a run of recipe meal with "
            "meal.rho below 1 trains one"
        )
    return None


def shown(w: Asked, names: Sequence[str]) -> str:
    """Write a preference as it can be typed."""
    if w is None:
        return "auto"
    return ",".join(f"{name}={value:g}" for name, value in zip(names, w, strict=True))


def sampling_of(config: Config, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Give the fields of `rollout.Sampling` as they are asked for, or as the run has them.

    Raises ValueError for a value that none of them takes, by the name of its option.
    """
    own = {n: getattr(config.rollout, n) for n in ("temperature", "max_new_tokens")}
    fields = own | {n: asked[n] for n in own if asked[n] is not None}
    fields |= {n: asked[n] for n in ("seed", "top_k", "top_p", "min_p")}
    for name, good, must in (
        ("temperature", 0 <= fields["temperature"] < float("inf"), "0 (greedy) or positive"),
        ("max_new_tokens", fields["max_new_tokens"] >= 1, "at least 1"),
        ("top_k", fields["top_k"] >= 0, "0 (all) or positive"),
        ("top_p", 0 < fields["top_p"] <= 1, "in (0, 1]"),
        ("min_p", 0 <= fields["min_p"] <= 1, "in [0, 1]"),
    ):
        require(good, f"--{name.replace('_', '-')}", fields[name], f"must be {must}")
    for text in asked["stop"]:
        require(text != "", "--stop", text, "would end every answer; give a text")
    return fields | {"stop": tuple(asked["stop"])}


class Session:
    """The policy of a run, held open to answer. `sampling`: the fields of `rollout.Sampling`.

    It samples with the run's `rollout.backend`, but where that cannot answer for a guide: then
    `say` is told. Raises ValueError for a run that is not finished.
    """

    def __init__(
        self,
        run: Path,
        config: Config,
        say: Callable[[str], None],
        *,
        device: str | None = None,  # default: the run's own
        **sampling: Any,
    ) -> None:
        policy_folder(run)  # a clear error, before torch is imported

        from meal_fast.models.model_soup import load_served
        from meal_fast.rollout import Sampling, capable
        from meal_fast.training.preference_net import PreferenceNet

        if device is not None:
            there = dataclasses.replace(config.policy, device=device)
            config = dataclasses.replace(config, policy=there)
        use_threads(config.threads)
        self.run, self.config, self.say = run, config, say
        self.sampling = Sampling(**sampling)
        self.policy, self.family = load_served(run, config)
        self.net = PreferenceNet.load(run / NET, config.names) if (run / NET).is_file() else None
        guided = self.policy.adapter is not None
        self._backend = capable(config.rollout.backend, ("any-network",) if guided else (), say)
        self._held = ExitStack()
        self._serving: dict[Asked, Backend] = {}  # what is open now, by preference; None: any

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()

    def parse(self, text: str) -> Asked:
        """Read a preference as it is typed: see `preference`."""
        return preference(text, self.run, self.config.names)

    def answer(self, text: str, w: Asked, turn: int) -> str:
        """Answer one prompt at w; `turn` keys the randomness. The net's w is said."""
        from meal_fast.rollout import Request

        prompt = Prompt(id="chat", text=text)
        at = self._predicted(prompt) if w is None else w
        sampler = self._sampler_at(at)
        sampler.forget()  # the last prompt: it hardly comes again
        sampling = dataclasses.replace(self.sampling, rng_key=("chat", turn))
        return sampler.generate([Request(prompt, at)], sampling).texts[0].strip()

    def _predicted(self, prompt: Prompt) -> tuple[float, ...]:
        from meal_fast.data.preferences import snapped
        from meal_fast.training.preference_net import features

        assert self.net is not None
        self._release()  # the net reads the base model, which an open engine has merged with LoRA
        predicted = self.net(features(self.policy, [prompt]).cpu()).tolist()
        (w,) = snapped(predicted, self.config.preference.grid)
        self.say(f"w is {shown(w, self.config.names)}")
        return w

    def _sampler_at(self, w: tuple[float, ...]) -> Backend:
        """The sampler of what serves w: a new one only where w has parameters of its own."""
        from meal_fast.rollout import open_backend

        serves = None if self.family is None else w
        if serves not in self._serving:
            self._release()
            if self.family is not None:
                self._held.enter_context(self.family.at(self.policy, w))
            opened = open_backend(self._backend, self.policy)
            self._serving[serves] = self._held.enter_context(opened)
        return self._serving[serves]

    def _release(self) -> None:
        self._held.close()
        self._serving.clear()


def talk(session: Session, lines: Iterator[str], w: Asked) -> None:
    """Answer each line on standard output; one that cannot be used is told why."""
    for turn, line in enumerate(lines):
        text = line.strip()
        if not text:
            continue
        try:
            if text == "/quit":
                return
            if text.startswith("/w ") or text == "/w":
                w = session.parse(text[2:].strip())
                session.say(f"w is now {shown(w, session.config.names)}")
            elif text.startswith("/"):
                raise ValueError(f"{text.split()[0]!r}: unknown; there are /w and /quit")
            else:
                print(session.answer(text, w, turn), flush=True)
        except ValueError as error:
            session.say(f"meal-fast: {error}")


def prompted_lines(w: Asked, names: Sequence[str]) -> Iterator[str]:
    """Give lines of standard input; a person at a terminal gets a prompt sign and line editing."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401  (gives input() history and editing)

    print(f"w is {shown(w, names)}; /w changes it, /quit or Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
