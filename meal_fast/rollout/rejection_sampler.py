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
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from meal_fast.config.config import RejectionConfig
from meal_fast.data_types import Rollout

from .protocol import Backend, Rejecting, check_capable
from .rejection_rules import accept, acceptance_uniform, cut_back, hopeless_below, redraws, surplus
from .reward_worker import OrderedScorer
from .sequence import Drawn, Request, Row, Sampling, gathered, row_id

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
    ended_RK: Tensor  # raw rewards of all rows that ended, kept or not
    log: dict[str, float]


class _Judged:
    """Scored rows with what the rules need of them."""

    def __init__(self, rows: Sequence[Row], reward_RK: Tensor, judge: Judge, seed: int) -> None:
        k = reward_RK.shape[1]
        uniform = (1.0 / k,) * k
        self.rows = rows
        self.reward_RK = reward_RK
        self.w_RK = torch.tensor([row.request.w or uniform for row in rows])
        self.score_R, self.w_hat_RK = judge(reward_RK, self.w_RK)
        self.group_R = torch.tensor([row.index for row in rows])
        self.uniform_R = acceptance_uniform(seed, torch.tensor([row.key for row in rows]))

    def accept(self, config: RejectionConfig, last: bool) -> tuple[Tensor, dict[str, int]]:
        return accept(
            config,
            self.score_R,
            self.group_R,
            w_hat_RK=self.w_hat_RK,
            w_RK=self.w_RK,
            uniform_R=self.uniform_R,
            last=last,
        )


class _Drawing:
    """All rows of a call in the order they were drawn, and what is known of them."""

    def __init__(
        self,
        sampler: Rejecting,
        sampling: Sampling,
        config: RejectionConfig,
        scorer: OrderedScorer,
        judge: Judge,
    ) -> None:
        self.sampler, self.sampling, self.config = sampler, sampling, config
        self.scorer, self.judge = scorer, judge
        self.rows: list[Row] = []
        self.reward: dict[Row, Tensor] = {}  # of rows that have ended, (K,)
        self.segments: dict[Row, list[float]] = {}  # scores of a growing text, segment by segment
        self.cuts: dict[Row, int] = {}

    def round(self, fresh: list[Row]) -> None:
        """Draw `fresh` to the end, or until they cannot be kept, and have them scored."""
        self.rows += fresh
        sent: list[Row] = []
        due: deque[int] = deque()  # how many rows had been sent after each of the last steps
        early = bool(self.config.keep) and self.config.rule in ("threshold", "trade-off")
        for _ in self.sampler.draw(fresh, self.sampling):
            if self.config.segment:
                self._cut_hopeless()
            for row in self.sampler.live:
                if row.finish in ("stop", "length") and row not in self.reward:
                    self.scorer.submit(_name(row), row.request.prompt.text, self._text(row))
                    sent.append(row)
            due.append(len(sent))
            if len(due) > _LAG and (early or self.config.segment):
                known = due.popleft()
                if known and sent[known - 1] not in self.reward:
                    self._learn(sent[:known], self.scorer.wait_until(known))
                    if early:
                        self._stop_surplus()
        self._learn(sent, self.scorer.results()[1])

    def judged(self) -> _Judged:
        """Every row that has its reward, in the order drawn."""
        rows = [row for row in self.rows if row in self.reward]
        reward_RK = torch.stack([self.reward[row] for row in rows])
        return _Judged(rows, reward_RK, self.judge, self.sampling.seed)

    def _learn(self, rows: Sequence[Row], reward_RK: Tensor) -> None:
        self.reward.update(zip(rows, reward_RK, strict=True))
        for row in rows:
            row.key = row_id(self.sampling.rng_key, row.request, row.sample, row.attempt)

    def _text(self, row: Row) -> str:
        return self.sampler.policy.decode(row.tokens)

    def _stop_surplus(self) -> None:
        """Cancels rows before which their group has kept enough already, in the order drawn."""
        judged = self.judged()
        passed_R, _ = judged.accept(replace(self.config, keep=0, rounds=0, draws=0), last=False)
        passed = {row for row, ok in zip(judged.rows, passed_R.tolist(), strict=True) if ok}
        rows = [row for row in self.rows if row.finish != "cancelled"]
        over_R = surplus(
            self.config,
            torch.tensor([row in passed for row in rows]),
            torch.tensor([row in self.reward for row in rows]),
            torch.tensor([row.index for row in rows]),
        )
        for row, over in zip(rows, over_R.tolist(), strict=True):
            if over and not row.finish:
                self.sampler.cancel(row)

    def _cut_hopeless(self) -> None:
        """Scores the rows at the end of a segment, and cuts back those that are hopeless."""
        size, most = self.config.segment, max(1, self.config.rounds)
        rows = [
            row
            for row in self.sampler.live
            if row.finish != "cancelled"
            and (row.finish or len(row.tokens) % size == 0)
            and self.cuts.get(row, 0) < most
        ]
        if not rows:
            return
        texts = [(_name(row), row.request.prompt.text, self._text(row)) for row in rows]
        reward_RK = self.scorer.now(texts)
        now = _Judged(rows, reward_RK, self.judge, self.sampling.seed)
        ended: dict[int, list[float]] = {}
        if self.reward:
            known = self.judged()
            for row, value in zip(known.rows, known.score_R.tolist(), strict=True):
                ended.setdefault(row.index, []).append(value)
        for row, value, reward in zip(rows, now.score_R.tolist(), reward_RK, strict=True):
            scores = self.segments.setdefault(row, [])
            scores.append(value)
            whole = cut_back(scores, hopeless_below(self.config, ended.get(row.index, [])))
            if whole is not None:
                del scores[whole:]
                self.cuts[row] = self.cuts.get(row, 0) + 1
                self.sampler.cut(row, whole * size)
            elif row.finish:
                self._learn([row], reward[None])


def rejection_sample(
    sampler: Backend,
    requests: Sequence[Request],
    sampling: Sampling,
    config: RejectionConfig,
    score: Score,
    judge: Judge,
    *,
    chunk: int = 8,
) -> Kept:
    """Draw, score, reject and redraw: the rows kept of each request, in the requests' order.

    Args:
        requests: each a group, with `samples` rows in the first round.
        score: (prompt texts, response texts) → raw rewards (R, K). It is called from one thread of
            its own: `chunk` finished rows at a time, or all that have reached the end of a segment.
        judge: (rewards (R, K), preferences (R, K)) → the score that the rules look at (R,), and
            realised preferences (R, K), or None where the rule does not ask for them.

    `log` holds: rounds; drawn, ended, cancelled and kept rows, acceptance (kept / ended) and
    rejected/GATE (a share of those that ended); cuts; prompt, suffix, decode and reused tokens,
    sampled tokens (kept or not), and tokens through the model for each row kept.

    Raises:
        ValueError: as `Engine.rows` and `accept` do; a sampler without the capability
            `rejection`; config.draws below a request's samples.
        ObjectiveError: the scorer failed; it names the rows as PROMPT/PREFERENCE/SAMPLE. The engine
            can be used again.
    """
    check_capable(sampler, "rejection")
    sampler = cast(Rejecting, sampler)
    started, before = time.perf_counter(), replace(sampler.counts)
    rounds = 0
    for q in requests:
        if 0 < config.draws < q.samples:
            raise ValueError(
                f"rejection.draws={config.draws}: the first round alone draws {q.samples} of "
                f"prompt {q.prompt.id}; raise it, or lower samples"
            )
    with OrderedScorer(score, chunk=chunk) as scorer:
        drawing = _Drawing(sampler, sampling, config, scorer, judge)
        fresh = sampler.rows(requests, sampling.max_new_tokens)
        first = {row.index: row for row in fresh}
        drawing.round(fresh)
        while rounds < config.rounds:
            more = _missing(drawing, requests, config)
            if not any(more):
                break
            rounds += 1
            drawn = Counter(row.index for row in drawing.rows)
            drawing.round(
                [
                    first[b].another(sample=drawn[b] + i, attempt=rounds)
                    for b, n in enumerate(more)
                    for i in range(n)
                ]
            )
    judged = drawing.judged()
    accepted_R, rejected = judged.accept(config, last=True)
    # by request, and then in the order drawn
    kept = sorted(accepted_R.nonzero().squeeze(1).tolist(), key=lambda i: judged.rows[i].index)
    rows = [judged.rows[i] for i in kept]
    sizes = Counter(row.index for row in rows)
    used = sampler.counts
    prompt, suffix = used.prompt - before.prompt, used.suffix - before.suffix
    decode, ended = used.decode - before.decode, len(judged.rows)
    log: dict[str, float] = {
        "rounds": rounds + 1,
        "drawn": len(drawing.rows),
        "ended": ended,
        "cancelled": len(drawing.rows) - ended,
        "kept": len(kept),
        "acceptance": len(kept) / ended,
        "cuts": sum(drawing.cuts.values()),
        "prompt_tokens": prompt,
        "suffix_tokens": suffix,
        "decode_tokens": decode,
        "sampled_tokens": used.sampled - before.sampled,
        "reused_tokens": used.reused - before.reused,
        "tokens_per_kept": (prompt + suffix + decode) / max(len(kept), 1),
    }
    rolled = gathered(
        sampler.policy,
        [replace(q, samples=sizes[b]) for b, q in enumerate(requests)],
        [Drawn(row.tokens, row.logp, row.finish) for row in rows],
        started=started,
        prefill_tokens=prompt + suffix,
        reused_tokens=used.reused - before.reused,
        on_policy=False,
    )
    device, index = rolled.tokens_RT.device, torch.tensor(kept, dtype=torch.int64)
    w_hat_RK = judged.w_hat_RK
    return Kept(
        rollout=rolled,
        reward_RK=judged.reward_RK[index].to(device),
        score_R=judged.score_R[index].to(device),
        w_hat_RK=None if w_hat_RK is None else w_hat_RK[index].to(device),
        ended_RK=judged.reward_RK,
        log=log | {f"rejected/{gate}": n / ended for gate, n in rejected.items()},
    )


def together_log(logs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Make one log of those of calls for parts of a batch: counts add up, shares are of all."""
    ended = sum(log["ended"] for log in logs)
    found: dict[str, float] = {}
    for name in dict.fromkeys(name for log in logs for name in log):
        values = [log.get(name, 0) for log in logs]
        if name == "rounds":
            found[name] = max(values)
        elif name.startswith("rejected/"):
            found[name] = sum(round(x * log["ended"]) for x, log in zip(values, logs, strict=True))
            found[name] /= ended
        else:
            found[name] = sum(values)
    tokens = found["prompt_tokens"] + found["suffix_tokens"] + found["decode_tokens"]
    return found | {
        "acceptance": found["kept"] / ended,
        "tokens_per_kept": tokens / max(found["kept"], 1),
    }


def _missing(drawing: _Drawing, requests: Sequence[Request], config: RejectionConfig) -> list[int]:
    """How many rows each request draws in the next round."""
    judged = drawing.judged()
    accepted_R, _ = judged.accept(config, last=False)
    kept_B = torch.bincount(judged.group_R[accepted_R], minlength=len(requests))
    drawn_B = torch.bincount(
        torch.tensor([row.index for row in drawing.rows]), minlength=len(requests)
    )
    first = max(q.samples for q in requests)
    more: list[int] = redraws(config, kept_B, drawn_B, first).tolist()
    return more


def _name(row: Row) -> str:
    return f"{row.request.prompt.id}/{row.request.w}/{row.sample}"
