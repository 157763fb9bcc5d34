"""A finished run that answers one prompt at a time, at any preference. Importing it needs no torch.

A prompt may follow turns that were answered before; training saw single turns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from meal_fast.common import require, require_text
from meal_fast.config.cli import parse_weights
from meal_fast.config.config import Config
from meal_fast.config.run_dir import PREFERENCE_NET, policy_folder
from meal_fast.data_types import Prompt
from meal_fast.models.threads import use_threads

if TYPE_CHECKING:
    from meal_fast.rollout import Backend, Engine, Request, Sampling

LENGTH = 256  # tokens of an answer, at most, unless another number is asked for
Turn = tuple[str, str]  # what was asked, and answered
Heard = Callable[[str], None]  # told each piece of an answer as it is generated
Asked = tuple[float, ...] | None  # a preference; None: the net's, for every prompt


def preference(text: str | None, run: Path, names: Sequence[str]) -> Asked:
    """Read a preference as it is typed; `auto`: the net's; None: all objectives alike.

    Raises ValueError for what is none, and for `auto` where the run has no net.
    """
    if text is None:
        return (1.0 / len(names),) * len(names)
    if text != "auto":
        return parse_weights(text, names)
    if not (run / PREFERENCE_NET).is_file():
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
    """Give the fields of `rollout.Sampling` as they are asked for.

    What is not asked for: the run's own temperature, and a length for reading, not the run's.
    Raises ValueError for a value that none of them takes, by the name of its option.
    """
    own = {"temperature": config.rollout.temperature, "max_new_tokens": LENGTH}
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


@dataclass(frozen=True)
class Answer:
    """Hold what was answered to one prompt."""

    text: str  # without whitespace at its ends
    finish: str  # "stop"; "length": it was cut; "cancelled": Ctrl-C
    tokens: int
    full: bool  # the model's context has no room for more


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
        net = run / PREFERENCE_NET
        self.net = PreferenceNet.load(net, config.names) if net.is_file() else None
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

    def answer(
        self,
        text: str,
        w: Asked,
        turn: int,
        turns: Sequence[Turn] = (),
        heard: Heard = lambda piece: None,
    ) -> Answer:
        """Answer one prompt at w, behind earlier turns; `turn` keys the randomness.

        `heard` is told the pieces of the answer as they are generated: together they are its text.
        A backend that draws whole answers alone tells it at the end. The net's w is said, as is
        which turns the model's context has no room for. Ctrl-C ends an answer that is generated.

        Raises ValueError for a prompt that the context has no room for.
        """
        require_text(text, "the prompt")
        from meal_fast.rollout import Engine

        at = self._predicted(Prompt("chat", text)) if w is None else w
        request, room = self._fitting(text, at, list(turns))
        sampler = self._sampler_at(at)
        sampler.forget()  # the last prompt: it hardly comes again
        length = min(self.sampling.max_new_tokens, room)
        sampling = dataclasses.replace(self.sampling, rng_key=("chat", turn), max_new_tokens=length)
        if isinstance(sampler, Engine):
            said, finish, tokens = _streamed(sampler, request, sampling, heard)
        else:
            rolled = sampler.generate([request], sampling)
            said, finish, tokens = rolled.texts[0].strip(), rolled.finish[0], rolled.lengths[0]
            heard(said)
        return Answer(said, finish, tokens, full=tokens == room)

    def _fitting(self, text: str, w: tuple[float, ...], turns: list[Turn]) -> tuple[Request, int]:
        """Ask with as many of the turns as leave room for an answer; give that room, too."""
        from meal_fast.rollout import Request

        dropped = 0
        while True:
            said = tuple(
                part
                for asked, answered in turns
                for part in (("user", asked), ("assistant", answered))
            )
            request = Request(Prompt("chat", text), w, history=said)
            taken = sum(map(len, request.encoded(self.policy)))
            room = self.policy.context - taken
            if room >= self.sampling.max_new_tokens or not turns:
                break
            turns, dropped = turns[1:], dropped + 1
        if dropped:
            self.say(f"the model's context has no room for the first {dropped} turns; /new forgets")
        if room < 1:
            raise ValueError(
                f"a prompt of {taken} tokens: the model's context holds {self.policy.context}; "
                "shorten it"
            )
        return request, room

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


def _streamed(
    sampler: Engine, request: Request, sampling: Sampling, heard: Heard
) -> tuple[str, str, int]:
    """Tell a row's text as it grows; give the text, why it ended, and its tokens."""
    text, told, tokens, finish = "", 0, 0, "cancelled"
    try:
        for delta in sampler.stream([request], sampling):
            text, tokens = text + delta.text, len(delta.row.tokens)
            stable = text.strip()  # whitespace at the end may be the last
            if len(stable) > told:
                heard(stable[told:])
                told = len(stable)
            finish = delta.finish
    except KeyboardInterrupt:
        finish = "cancelled"
    return text.strip(), finish, tokens
