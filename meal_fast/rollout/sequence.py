"""What a sampler is asked for and what it gives back: shared by all of them."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from meal_fast.data_types import Prompt, Rollout, rng_seed
from meal_fast.models.policy import Policy
from meal_fast.models.shared_prefix import pad

Tokens = tuple[int, ...]
Prefix = tuple[int, Tokens]  # a prompt, and the task whose adapter it goes through


@dataclass(frozen=True)
class Request:
    """`samples` responses to one prompt under one preference (None: no preference text)."""

    prompt: Prompt
    w: tuple[float, ...] | None
    samples: int = 1
    task_id: int = 0  # whose answers they are, where the policy is stacked
    rng_key: tuple[int | str, ...] = ()  # of its own, behind Sampling's
    history: tuple[tuple[str, str], ...] = ()  # (role, text) of the turns before the prompt

    def encoded(self, policy: Policy) -> tuple[Tokens, Tokens]:
        """Encode what stands before the preference, and the preference's suffix."""
        return policy.encode(self.prompt.text, self.w, self.history)


@dataclass(frozen=True)
class Sampling:
    """How rows are sampled. Truncation is for evaluation and serving: no learner takes it."""

    max_new_tokens: int
    temperature: float  # 0: greedy; log-probabilities are then those at temperature 1
    seed: int
    rng_key: tuple[int | str, ...] = ()  # what else a row's id is made of: step, task, …
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()  # strings that end a response; it keeps them

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: must be 0 (greedy) or positive")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise ValueError(
                f"top_k={self.top_k}, top_p={self.top_p}, min_p={self.min_p}: top_k must be 0 "
                "(all) or positive, top_p in (0, 1], min_p in [0, 1]"
            )
        if any(not s for s in self.stop):
            raise ValueError(f"stop={self.stop}: holds an empty string, which ends every response")

    @property
    def truncates(self) -> bool:
        return bool(self.top_k or self.top_p < 1 or self.min_p > 0)

    def said_stop(self, policy: Policy, tokens: Sequence[int]) -> bool:
        """Tell whether the text of these tokens holds one of the strings that end a response."""
        return bool(self.stop) and any(s in policy.decode(tokens) for s in self.stop)

    @property
    def on_policy(self) -> bool:
        """Whether log-probabilities are those of the distribution that tokens are drawn from."""
        return self.temperature > 0 and not self.truncates


@dataclass(frozen=True)
class Drawn:
    """One sampled response."""

    tokens: list[int]  # a stop token included
    logp: list[float]  # under softmax(logits / temperature)
    finish: str  # "stop", "length" or "cancelled"


def as_drawn(policy: Policy, text: str, length: int) -> Drawn:
    """Read a text as a response: its tokens and the one that ends it, cut at `length`."""
    tokens = list(policy.answer(text.strip()))
    finish = "stop" if len(tokens) <= length else "length"
    kept = tokens[:length]
    return Drawn(kept, [0.0] * len(kept), finish)  # nobody's samples: no log-probabilities


def encode(
    policy: Policy, requests: Sequence[Request], max_new_tokens: int
) -> list[tuple[Tokens, Tokens]]:
    """Encode prompt and suffix of each request. Raises ValueError for what cannot be sampled."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    if not requests:
        raise ValueError("requests=[]: nothing to sample")
    parts = []
    for q in requests:
        if q.samples < 1:
            raise ValueError(f"samples={q.samples}: must be at least 1")
        if not q.prompt.text.strip():
            raise ValueError(f"prompt {q.prompt.id}: is empty")
        prompt, suffix = q.encoded(policy)
        length = len(prompt) + len(suffix)
        if length + max_new_tokens > policy.context:
            raise ValueError(
                f"prompt {q.prompt.id}: {length} tokens and {max_new_tokens} new ones exceed the "
                f"model's context of {policy.context}; lower prompts.max_tokens or "
                "rollout.max_new_tokens"
            )
        parts.append((prompt, suffix))
    return parts


def told_apart(requests: Sequence[Request]) -> Sequence[Request]:
    """Give requests of which no two in a call have the keys, and so the texts, of another.

    Of those for one prompt and preference the first keeps its key, so that it draws what it would
    draw alone; the n-th behind it has ("again", n) in its own.
    """
    seen: Counter[tuple[object, ...]] = Counter()
    apart = []
    for q in requests:
        key = (q.rng_key, q.prompt.id, q.w or ())
        again = seen[key]
        seen[key] += 1
        apart.append(replace(q, rng_key=(*q.rng_key, "again", again)) if again else q)
    return apart


def check_logp(request: Request, logp: float) -> None:
    """Raise ValueError where a model gave no distribution to draw a token of `request` from."""
    if not math.isfinite(logp):
        raise ValueError(
            f"prompt {request.prompt.id}: the model's logits are not finite, so that there is "
            "nothing to draw from: its weights are damaged, or have grown too large for their "
            "type; load them in float32 (policy.dtype), or train with a lower grpo.lr: start anew "
            "in another --out"
        )


def row_id(rng_key: Sequence[int | str], request: Request, sample: int, attempt: int = 0) -> int:
    """Make the key of one response's randomness."""
    again = (attempt,) if attempt else ()
    return rng_seed(
        *rng_key, *request.rng_key, request.prompt.id, str(request.w or ()), sample, *again
    )


def gathered(
    policy: Policy,
    requests: Sequence[Request],
    drawn: Sequence[Drawn],  # of each request all samples, in the requests' order
    *,
    started: float,
    prefill_tokens: int,
    reused_tokens: int = 0,
    on_policy: bool = True,
) -> Rollout:
    device = policy.device
    group = [b for b, q in enumerate(requests) for _ in range(q.samples)]
    prefixes = tuple(sum(q.encoded(policy), ()) for q in requests)
    uniform = (1.0 / len(policy.names),) * len(policy.names)
    tokens_RT = torch.zeros(0, 0, dtype=torch.int64, device=device)
    mask_RT = tokens_RT.bool()
    if drawn:
        tokens_RT, mask_RT = pad([row.tokens for row in drawn], device)
    logp_RT = torch.zeros(mask_RT.shape, device=device)
    logp_RT[mask_RT] = torch.tensor([x for row in drawn for x in row.logp], device=device)
    rollout = Rollout(
        prompts=tuple(q.prompt for q in requests),
        prefix=prefixes,
        group_R=torch.tensor(group, dtype=torch.int64, device=device),
        condition_RK=torch.tensor([requests[b].w or uniform for b in group], device=device).view(
            -1, len(uniform)
        ),
        tokens_RT=tokens_RT,
        mask_RT=mask_RT,
        logp_RT=logp_RT,
        finish=tuple(row.finish for row in drawn),
        texts=tuple(policy.decode(row.tokens) for row in drawn),
        on_policy=on_policy,
        prefill_tokens=prefill_tokens,
        reused_tokens=reused_tokens,
        seconds=time.perf_counter() - started,
        task_id=tuple(q.task_id for q in requests) if any(q.task_id for q in requests) else (),
    )
    return rollout.told(group, [len(row.tokens) for row in drawn])


@dataclass(eq=False)
class Row:
    """One response as it grows."""

    request: Request
    index: int  # of the request
    sample: int
    prompt: Tokens  # computed once for all rows that share it
    suffix: Tokens  # likewise, behind the prompt; () where the prompt holds it
    attempt: int = 0
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)  # under softmax(logits / temperature)
    finish: str = ""  # "stop", "length" or "cancelled"; "" while it waits or grows
    place: int = -1
    key: int = -1  # its id, once it has been drawn from
    sampling: Sampling | None = None  # its own; None: the drawing's

    @property
    def prefix(self) -> Prefix:
        """What the prompt's keys and values are known by: they are the adapter's."""
        return self.request.task_id, self.prompt

    def another(self, sample: int, attempt: int) -> Row:
        """Make a new row of the same request, behind the same prefix."""
        return Row(
            self.request,
            self.index,
            sample,
            self.prompt,
            self.suffix,
            attempt,
            sampling=self.sampling,
        )

    def cut(self, keep: int) -> None:
        """Drop all but the first `keep` tokens; what follows them is drawn anew.

        Its attempt counts up: under the same id the same text would be drawn for ever.
        """
        if not 0 <= keep < len(self.tokens):
            raise ValueError(f"keep={keep}: the row has {len(self.tokens)} tokens; keep fewer")
        del self.tokens[keep:], self.logp[keep:]
        self.attempt += 1
        self.finish, self.key = "", -1


class TextStream:
    """The text of a row as it grows, in parts that together are the text of the whole row.

    A character whose bytes are not all there yet is held back until they are, or the row ends.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy, self._said = policy, ""

    def more(self, row: Row) -> str:
        """Give what can be said of the row beyond what was given before."""
        text = self._policy.decode(row.tokens)
        if not row.finish:
            text = text.rstrip("\ufffd")  # what stands for bytes that are no character (yet)
        if not text.startswith(self._said):  # a decoder that tidies up behind itself: wait
            return ""
        new, self._said = text[len(self._said) :], text
        return new


@dataclass(frozen=True)
class Delta:
    """What a step added to a row."""

    row: Row  # `row.index` of its request, `row.sample` of that, `row.tokens` so far
    text: str  # "" where a step completed no character
    finish: str  # "", or with the row's last one "stop" or "length"


@dataclass
class Counts:
    """Tokens through the model, and those that did not have to go through it again."""

    prompt: int = 0
    suffix: int = 0
    decode: int = 0
    sampled: int = 0  # drawn from its distributions, kept or not
    reused: int = 0  # of the rows' prefixes: what a sampler without caches would compute

    @property
    def fresh(self) -> int:
        return self.prompt + self.suffix + self.decode
