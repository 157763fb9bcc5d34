"""OpenAI's chat completions: what a request may hold, and how answers, parts and errors are said.

https://platform.openai.com/docs/api-reference/chat, with the field `preference` besides.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from meal_fast.common import require_text
from meal_fast.data.preferences import Preference
from meal_fast.data_types import Prompt
from meal_fast.rollout import Request, Sampling

from .run import ServedRun

BASE = "base"  # the name of the untrained model
# What changes nothing here, whatever it is.
IGNORED = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key parallel_tool_calls "
    "stream_options tool_choice verbosity".split()
)
# What cannot be done, and by which values it asks for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "reasoning_effort": (None, "none"),
}
OWN = frozenset(
    "model messages preference preferences temperature top_p top_k min_p max_tokens "
    "max_completion_tokens stop seed n stream".split()
)


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param

    def body(self) -> dict[str, Any]:
        """Say it as OpenAI does."""
        kinds = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error"}
        error = {"message": str(self), "type": kinds.get(self.status, "invalid_request_error")}
        return {"error": error | {"param": self.param, "code": None}}


@dataclass(frozen=True)
class Asked:
    """A request that can be answered: `n` choices at each of its preferences (None: the net's)."""

    prompt: str
    history: tuple[tuple[str, str], ...]
    preferences: tuple[Preference | None, ...]
    base: bool
    samples: int
    sampling: Sampling
    stream: bool
    usage_at_end: bool
    model: str

    def requests(self) -> list[Request]:
        """Give a request for each preference; they share the prompt."""
        prompt = Prompt("chat", self.prompt)
        return [
            Request(prompt, None if self.base else w, self.samples, history=self.history)
            for w in self.preferences
        ]


def parse(body: object, run: ServedRun, *, max_new_tokens: int, most: int) -> Asked:
    """Read the body of a request. Raises Refused with status 400, naming what is wrong."""
    if not isinstance(body, Mapping):
        raise Refused(400, "the body must be a JSON object")
    for name, value in body.items():
        if name in NEUTRAL:
            if value not in NEUTRAL[name]:
                said = f"{name}={_shown(value)}: is not supported; leave it out"
                raise Refused(400, said, name)
        elif name not in OWN | IGNORED:
            said = f"{_shown(name)[1:-1]}: unknown; there are {', '.join(sorted(OWN))}"
            raise Refused(400, said, name[:80])
    model = body.get("model", run.name)
    if model not in (run.name, BASE):
        raise Refused(404, f"model={_shown(model)}: there are {run.name!r} and {BASE!r}", "model")
    history, prompt = _turns(body.get("messages"))
    several = body.get("preferences")
    if several is not None and not (isinstance(several, list) and several):
        raise Refused(400, "preferences: must be a list of preferences", "preferences")
    if several is not None and body.get("preference") is not None:
        raise Refused(400, "preference and preferences: give one of them", "preferences")
    given = [body.get("preference")] if several is None else several
    try:
        preferences = tuple(run.preference(w) for w in given)
    except ValueError as error:
        raise Refused(400, str(error), "preference") from None
    samples = _whole(body, "n", 1, 1, most)
    if samples * len(preferences) > most:
        what = f"n={samples}: with {len(preferences)} preferences"
        raise Refused(400, f"{what} that is more than {most} answers", "n")
    name = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    options: Any = body.get("stream_options") or {}
    return Asked(
        prompt=prompt,
        history=history,
        preferences=preferences,
        base=model == BASE,
        samples=samples,
        sampling=_sampling(body, run, _whole(body, name, max_new_tokens, 1, 1 << 20)),
        stream=bool(body.get("stream")),
        usage_at_end=isinstance(options, Mapping) and bool(options.get("include_usage")),
        model=model,
    )


def _sampling(body: Mapping[str, Any], run: ServedRun, max_new_tokens: int) -> Sampling:
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    good = isinstance(stops, list) and all(isinstance(s, str) and s for s in stops)
    if not good or len(stops) > 4:
        raise Refused(400, f"stop={_shown(stop)}: must be a text or up to four, none empty", "stop")
    seed = body.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise Refused(400, f"seed={_shown(seed)}: must be a whole number", "seed")
    # Without a seed a key: rows of unequal keys are drawn in one call, of unequal seeds in several.
    key = ("chat", secrets.token_hex(8)) if seed is None else ()
    numbers = {
        "temperature": _number(body, "temperature", run.config.rollout.temperature),
        "top_p": _number(body, "top_p", 1.0),
        "min_p": _number(body, "min_p", 0.0),
    }
    if 0 < numbers["temperature"] < 1e-6:
        numbers["temperature"] = 0.0
    top_k = _whole(body, "top_k", 0, 0, 1 << 30)
    try:
        return Sampling(
            max_new_tokens, seed=(seed or 0) % 2**63, rng_key=key, top_k=top_k, stop=tuple(stops),
            **numbers,
        )  # fmt: skip
    except ValueError as error:
        raise Refused(400, str(error)) from None


def _number(body: Mapping[str, Any], name: str, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refused(400, f"{name}={_shown(value)}: must be a number", name)
    if abs(value) > 1e6:  # a whole number may be beyond every float
        raise Refused(400, f"{name}={_shown(value)}: is too large", name)
    return float(value)


def _whole(body: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        said = f"{name}={_shown(value)}: must be a whole number, {least} to {most}"
        raise Refused(400, said, name)
    return value


def _shown(value: object) -> str:
    """Repeat of a request what tells which value is meant, not all of it."""
    text = "a long number" if isinstance(value, int) and abs(value) > 1 << 64 else repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def _turns(messages: object) -> tuple[tuple[tuple[str, str], ...], str]:
    """Give the turns before the last, and the text of that, which must be the user's."""
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages: must be a list of at least one message", "messages")
    turns = []
    for n, message in enumerate(messages):
        where = f"messages[{n}]"
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ("system", "developer", "user", "assistant"):
            raise Refused(
                400, f"{where}.role={_shown(role)}: must be system, user or assistant", where
            )
        content = message.get("content")
        if isinstance(content, list):
            parts = [p.get("text") for p in content if isinstance(p, Mapping)]
            texts = [text for text in parts if isinstance(text, str)]
            if len(texts) != len(content):
                raise Refused(400, f"{where}.content: only text is understood", where)
            content = "".join(texts)
        if not isinstance(content, str) or not content.strip():
            raise Refused(400, f"{where}.content: must be a text that is not empty", where)
        try:
            require_text(content, f"{where}.content")
        except ValueError as error:
            raise Refused(400, str(error), where) from None
        turns.append(("system" if role == "developer" else role, content.strip()))
    if turns[-1][0] != "user":
        raise Refused(400, "messages: the last one must be the user's", "messages")
    return tuple(turns[:-1]), turns[-1][1]


class StopCut:
    """A choice's text up to the string that ends it, which is left out.

    What may be the beginning of such a string is held back until it is known not to be.
    """

    def __init__(self, stop: Iterable[str]) -> None:
        self._stop, self._held, self._over = tuple(stop), "", False

    def more(self, text: str, last: bool) -> str:
        """Give what can be said now. `last`: nothing comes behind it."""
        if self._over:
            return ""
        held = self._held + text
        found = [at for s in self._stop if (at := held.find(s)) >= 0]
        if found:
            self._over = True
            return held[: min(found)]
        keep = 0
        if not last:
            longest = max(map(len, self._stop), default=1) - 1
            keep = next(
                (
                    n
                    for n in range(min(longest, len(held)), 0, -1)
                    if any(s.startswith(held[-n:]) for s in self._stop)
                ),
                0,
            )
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


class Completion:
    """One response as it is said: the same id and time in each of its parts."""

    def __init__(self, asked: Asked, names: tuple[str, ...]) -> None:
        self.asked, self.names = asked, names
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time())}

    def preference(self, w: Preference | None) -> dict[str, float] | None:
        """Say a preference as a request does; None: the base model has none."""
        return None if w is None else dict(zip(self.names, w, strict=True))

    def chunk(
        self,
        choice: int,
        delta: dict[str, Any],
        finish: str | None = None,
        more: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """One event of a stream."""
        part = {"index": choice, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self._said("chat.completion.chunk", [part | (more or {})])

    def usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """The event that `stream_options.include_usage` asks for."""
        return self._said("chat.completion.chunk", []) | {"usage": usage}

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        """A response at once."""
        return self._said("chat.completion", choices) | {"usage": usage}

    def _said(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self.head | {"object": kind, "model": self.asked.model, "choices": choices}
