"""Rejection sampling: draws until each group has kept what it should, on one engine's caches.

A round draws rows and scores those that have ended while others are still being decoded; `accept`
then decides, over all rows drawn so far, which are kept; groups that have kept too few get another
round, behind prefixes that are still there. Within a round a row is stopped once it cannot be kept
any more, and a response that has become hopeless is cut back to its last good segment and goes on
from there.

Nothing depends on how fast the scorer is: scores are asked for a fixed number of steps after the
row has ended, whether they are ready or have to be waited for. See `rejection` for the rules.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..batch import Rollout
from ..config import RejectionConfig
from .engine import Engine, Row
from .rejection import accept, acceptance_uniform, cut_back, hopeless_below, redraws, surplus
from .requests import Drawn, Request, Sampling, gathered, row_id
from .scoring import OrderedScorer

_LAG = 4  # decode steps between a row's end and the use of its score

Score = Callable[[Sequence[str], Sequence[str]], Tensor]
Judge = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class Kept:
    """The rows that were kept, by request, and what it took."""

    rollout: Rollout  # on_policy is false: rows were selected. For the SFT learner alone
    reward_RK: Tensor  # float32, raw
    score_R: Tensor
    w_hat_RK: Tensor | None  # realised preferences, as the judge gave them
    log: dict[str, float]


@dataclass
class _Drawing:
    """All rows drawn so far, in order, and what is known of them."""

    rows: list[Row] = field(default_factory=list)
    reward: dict[Row, Tensor] = field(default_factory=dict)  # of rows that have ended, (K,)
    segments: dict[Row, list[float]] = field(default_factory=dict)  # scores of growing text
    cuts: int = 0
    segment_calls: int = 0


def rejection_sample(
    sampler: Engine,
    requests: Sequence[Request],
    sampling: Sampling,
    config: RejectionConfig,
    score: Score,
    judge: Judge,
    *,
    chunk: int = 8,
) -> Kept:
    """Draws, scores, rejects and redraws: the rows kept of each request, in the requests' order.

    Args:
        requests: each a group, with `samples` rows in the first round.
        score: (prompt texts, response texts) → raw rewards (R, K). It is called from a thread of
            its own, `chunk` rows at a time, and for segments from this one.
        judge: (rewards (R, K), preferences (R, K)) → the score that the rules look at (R,), and
            realised preferences (R, K), or None where the rule does not ask for them.

    `log` holds: rounds; drawn, ended, kept, acceptance (kept / ended); rejected/GATE, as a share of
    the rows that ended; cancelled rows, cut-backs; prompt, suffix, decode and reused tokens, and
    tokens through the model per kept row.

    Raises:
        ValueError: as `Engine.rows` and `accept` do.
        ObjectiveError: the scorer failed; it names the rows as PROMPT/PREFERENCE/SAMPLE. The engine
            can be used again.
    """
    started, before = time.perf_counter(), replace(sampler.counts)
    drawing = _Drawing()
    fresh = sampler.rows(requests, sampling.max_new_tokens)
    origin = {row.index: row for row in fresh}
    rounds = 0
    with OrderedScorer(score, chunk=chunk) as scorer:
        while True:
            drawing.rows += fresh
            _round(sampler, fresh, drawing, sampling, config, scorer, score, judge)
            more = _missing(drawing, requests, config, judge, sampling) if config.keep else []
            if rounds == config.rounds or not any(more):
                break
            rounds += 1
            drawn = [sum(row.index == b for row in drawing.rows) for b in range(len(requests))]
            fresh = [
                replace(
                    origin[b], sample=drawn[b] + i, attempt=rounds, tokens=[], logp=[], finish=""
                )
                for b, n in enumerate(more)
                for i in range(n)
            ]
    ended, accepted_R, counts, reward_RK, score_R, w_hat_RK = _accepted(
        drawing, requests, config, judge, sampling, last=True
    )
    kept = [i for i in accepted_R.nonzero().squeeze(1).tolist()]
    kept.sort(key=lambda i: ended[i].index)  # stable: by request, then as drawn
    index = torch.tensor(kept, dtype=torch.int64)
    sizes = [sum(ended[i].index == b for i in kept) for b in range(len(requests))]
    used = sampler.counts
    prefill = used.prompt + used.suffix - before.prompt - before.suffix
    decode = used.decode - before.decode
    log = {
        "rounds": rounds + 1,
        "drawn": len(drawing.rows),
        "ended": len(ended),
        "kept": len(kept),
        "acceptance": len(kept) / max(len(ended), 1),
        "cancelled": len(drawing.rows) - len(ended),
        "cuts": drawing.cuts,
        "prompt_tokens": used.prompt - before.prompt,
        "suffix_tokens": used.suffix - before.suffix,
        "decode_tokens": decode,
        "reused_tokens": used.reused - before.reused,
        "tokens_per_kept": (prefill + decode) / max(len(kept), 1),
    } | {f"rejected/{gate}": n / max(len(ended), 1) for gate, n in counts.items()}
    rows = [ended[i] for i in kept]
    rolled = gathered(
        sampler.policy,
        [replace(q, samples=n) for q, n in zip(requests, sizes, strict=True)],
        [Drawn(row.tokens, row.logp, row.finish) for row in rows],
        started=started,
        prefill_tokens=prefill,
        on_policy=False,
    )
    device = rolled.tokens_RT.device
    return Kept(
        rollout=rolled,
        reward_RK=reward_RK[index].to(device),
        score_R=score_R[index].to(device),
        w_hat_RK=None if w_hat_RK is None else w_hat_RK[index].to(device),
        log=log,
    )


def _round(
    sampler: Engine,
    fresh: list[Row],
    drawing: _Drawing,
    sampling: Sampling,
    config: RejectionConfig,
    scorer: OrderedScorer,
    score: Score,
    judge: Judge,
) -> None:
    """Draws `fresh` to the end, or until they can no longer be kept, and has them scored."""
    sent: list[Row] = []
    due: deque[tuple[int, int]] = deque()  # step, rows sent by then
    stops_early = bool(config.keep) and config.rule in ("threshold", "trade-off")
    for step, _ in enumerate(sampler.draw(deque(fresh), sampling)):
        if config.segment:
            _cut_hopeless(sampler, drawing, config, score, judge)
        ended = [row for row in sampler.live if row.finish in ("stop", "length")]
        for row in ended:
            said = sampler.policy.decode(row.tokens)
            scorer.submit(_name(row), row.request.prompt.text, said)
        sent += ended
        due.append((step, len(sent)))
        if due[0][0] + _LAG <= step:
            n = due.popleft()[1]
            known = sum(row in drawing.reward for row in sent)
            if n > known and (stops_early or config.segment):
                drawing.reward |= zip(sent[:n], scorer.wait_until(n), strict=True)
                if stops_early:
                    _stop_surplus(drawing, config, judge)
    _, reward_RK = scorer.results()
    drawing.reward |= zip(sent, reward_RK, strict=True)


def _stop_surplus(drawing: _Drawing, config: RejectionConfig, judge: Judge) -> None:
    """Cancels the rows that can no longer be kept, whatever they would score."""
    scored = [row for row in drawing.rows if row in drawing.reward]
    every = replace(config, keep=0)
    passed_R, _ = accept(
        every, *_judged(scored, drawing, judge)[:2], **_asked(scored, drawing, judge), last=False
    )
    passed = {row for row, ok in zip(scored, passed_R.tolist(), strict=True) if ok}
    rows = [row for row in drawing.rows if row.finish != "cancelled"]
    finished = torch.tensor([row in drawing.reward for row in rows])
    accepted = torch.tensor([row in passed for row in rows])
    group = torch.tensor([row.index for row in rows])
    for i in surplus(config, accepted, finished, group).nonzero().squeeze(1).tolist():
        if not rows[i].finish:
            rows[i].finish = "cancelled"
