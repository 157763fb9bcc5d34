"""The sampler: slots that stay full, every prefix computed once, rows that can be cut and resumed.

A row is one response. It waits for a slot, starts behind its prompt and preference suffix (which
are computed if no earlier row needed them), and gets one token a step until it ends; its slot then
goes to the next row that waits. A token's randomness is keyed by (seed, row id, position), so a
row's text depends neither on the slot nor on the rows beside it, up to the rounding of the model.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..batch import Rollout
from ..ops import Groups, dispatch
from ..policy import Network, Policy
from .cache import (
    Pool,
    Shape,
    Tails,
    TokenPass,
    default_budget,
    fill_prompts,
    fill_suffixes,
    rounded,
    shares,
)
from .graph import FixedStep, bucket
from .requests import (
    Counts,
    Drawn,
    Prefix,
    Request,
    Row,
    Sampling,
    Tokens,
    encode,
    gathered,
    row_id,
)

_PASS_TOKENS = 4096  # padded tokens of a pass over prompts or suffixes


class Engine:
    """Samples from one network whose weights stay as they are: see `engine`."""

    def __init__(
        self,
        policy: Policy,
        network: Network,
        max_rows: int = 64,
        max_cache_bytes: int = 0,
        join: bool = False,
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows}: must be at least 1")
        if max_cache_bytes < 0:
            raise ValueError(f"max_cache_bytes={max_cache_bytes}: 0 (automatic) or positive")
        self.policy, self.network, self.max_rows, self.join = policy, network, max_rows, join
        self.shape = Shape.of(network)
        self.max_cache_bytes = max_cache_bytes or default_budget(self.shape.device)
        self.forget()
        self.counts = Counts()
        self.live: list[Row] = []  # the row in each slot
        weight = network.weight
        # Shapes that do not change are what a graph is captured of; without one they are waste.
        in_triton = dispatch.triton_obstacle(weight) is None and self.shape.width <= 256
        self.fixed_shapes = weight.is_cuda and in_triton
        self._stop = torch.tensor(sorted(policy.stop_ids), device=self.shape.device)

    def forget(self) -> None:
        """Gives back all memory: no prefix is known any more."""
        self.prompts, self.suffixes = Pool(self.shape, 0, 0), Pool(self.shape, 0, 0)
        self.tails = Tails(self.shape, 0, 0)
        self._steps: dict[tuple[int, int], FixedStep] = {}
        self._limited = False  # there is less than was wanted: all that the budget allows

    def rows(self, requests: Sequence[Request], max_new_tokens: int) -> list[Row]:
        """The rows of the requests, in their order.

        Raises ValueError for no request, one of no samples, and a prompt that is empty or too long.
        """
        parts = encode(self.policy, requests, max_new_tokens)
        whole = [(q.adapter, *part) for q, part in zip(requests, parts, strict=True)]
        preferences = Counter((a, prompt) for a, prompt, _ in dict.fromkeys(whole))
        rows = []
        for index, (request, (prompt, suffix)) in enumerate(zip(requests, parts, strict=True)):
            if self.join and preferences[request.adapter, prompt] == 1:
                prompt, suffix = prompt + suffix, ()
            rows += [Row(request, index, s, prompt, suffix) for s in range(request.samples)]
        return rows

    def sample(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        ended: Callable[[int], None] | None = None,  # told how many rows have ended so far
    ) -> Rollout:
        """Samples every request; the rows in the order of the requests."""
        started, before = time.perf_counter(), replace(self.counts)
        rows = self.rows(requests, sampling.max_new_tokens)
        done = 0
        for finished in self.draw(deque(rows), sampling):
            done += len(finished)
            if ended and finished:
                ended(done)
        used = self.counts
        honest = not sampling.truncates and sampling.temperature > 0
        return gathered(
            self.policy,
            requests,
            [Drawn(row.tokens, row.logp, row.finish) for row in rows],
            started=started,
            prefill_tokens=used.prompt + used.suffix - before.prompt - before.suffix,
            reused_tokens=used.reused - before.reused,
            on_policy=honest,
        )

    @torch.no_grad()
    def draw(self, waiting: deque[Row], sampling: Sampling) -> Iterator[list[Row]]:
        """One step after the other: yields the rows that ended in it, often none.

        Until the next step is asked for, the caller may `cut` any row in `live` (one that has just
        ended goes on), set a row's `finish` to "cancelled", and add rows to `waiting`, which may
        not be longer than those that it came with.
        """
        if not waiting:
            return
        self.live = []
        self._fit(waiting, sampling.max_new_tokens)
        while waiting or self.live:
            # The step first: at fixed shapes it writes to the free slots, which then are taken.
            hidden = [self._step(self.live)] if self.live else []
            fresh, first = self._admit(waiting, self.live)
            self.live = self.live + fresh
            if self.live:
                self._sample(self.live, torch.cat([*hidden, *first]), sampling)
            yield [row for row in self.live if row.finish]
            self.live = self._release(self.live, waiting)

    def _sample(self, live: list[Row], hidden: Tensor, sampling: Sampling) -> None:
        device = self.shape.device
        ids = [row_id(sampling.stream, r.request, r.sample, r.attempt) for r in live]
        token, logp, _ = ops.sample(
            self.network.logits(hidden),
            seed=sampling.seed,
            row=torch.tensor(ids, device=device),
            position=torch.tensor([len(row.tokens) for row in live], device=device),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )
        ended = torch.isin(token, self._stop)
        self.counts.sampled += len(live)
        drawn = zip(live, token.tolist(), logp.tolist(), ended.tolist(), strict=True)
        for row, t, lp, stop in drawn:
            row.tokens.append(t)
            row.logp.append(lp)
            if stop or (sampling.stop and self._says(row, sampling.stop)):
                row.finish = "stop"
            elif len(row.tokens) == sampling.max_new_tokens:
                row.finish = "length"

    def _says(self, row: Row, stop: Sequence[str]) -> bool:
        text = self.policy.decode(row.tokens)
        return any(s in text for s in stop)

    def _step(self, live: list[Row]) -> Tensor:
        """Each row's last token through the model: hidden states (R, D)."""
        device = self.shape.device
        at = [len(row.suffix) + len(row.tokens) - 1 for row in live]
        places = [row.place for row in live]
        self.counts.decode += len(live)
        if self.fixed_shapes:
            size = bucket(len(live), max(at) + 1, self.tails.places, self.tails.room)
            if size not in self._steps:
                self._steps[size] = FixedStep(self.network, self.prompts, self.tails, *size)
            last = [row.tokens[-1] for row in live]
            position = [len(row.prompt) + a for row, a in zip(live, at, strict=True)]
            return self._steps[size](last, position, places, at)
        low, high = min(places), max(places) + 1
        at_R = torch.tensor(at, device=device)
        place_R = torch.tensor(places, device=device)
        token_pass = TokenPass(
            prompts=self.prompts,
            low=low,
            high=high,
            width=max(self.prompts.length[low:high]),
            groups=Groups.of(place_R - low, high - low),
            tails=self.tails,
            at_R=at_R,
            at=at[0] if min(at) == max(at) else None,
            seen_R=at_R + 1,
            longest=max(at) + 1,
        )
        hidden: Tensor = self.network.body(
            input_ids=torch.tensor([[row.tokens[-1]] for row in live], device=device),
            position_ids=(self.prompts.length_B[place_R] + at_R)[:, None],
            use_cache=False,
            tree=token_pass,
        ).last_hidden_state
        return hidden[:, 0]

    def _admit(self, waiting: deque[Row], live: list[Row]) -> tuple[list[Row], list[Tensor]]:
        """Rows for the free slots, and the hidden states (1, D) that their first tokens hang on."""
        in_use = {row.place for row in live}
        needed: set[int] = set()  # places of suffixes
        prompts: dict[Prefix, int] = {}  # to be computed -> place
        suffixes: dict[tuple[Prefix, Tokens], tuple[int, int]] = {}  # -> prompt's and own place
        taken: list[tuple[Row, int]] = []  # with the suffix's place
        while waiting and len(live) + len(taken) < self.tails.places:
            row = waiting[0]
            if row.finish:  # cancelled while it waited
                waiting.popleft()
                continue
            place = self.prompts.find(row.prefix)
            if place is None:
                place = self.prompts.take(row.prefix, in_use)
                if place is None:
                    break  # until a row ends and leaves its prompt's place
                prompts[row.prefix] = place
            in_use.add(place)
            own = -1
            if row.suffix:
                both = (row.prefix, row.suffix)
                found = self.suffixes.find(both)
                if found is None:
                    found = self.suffixes.take(both, needed)
                    if found is None:
                        break  # until the next step
                    suffixes[both] = (place, found)
                needed.add(own := found)
            row.place = place
            taken.append((waiting.popleft(), own))
        self._compute(prompts, suffixes)
        rows = [row for row, _ in taken]
        self.counts.reused += sum(len(row.prompt) + len(row.suffix) for row in rows)
        self.counts.reused -= sum(len(p) for _, p in prompts) + sum(len(s) for _, s in suffixes)
        copies = [(slot, own) for slot, (_, own) in enumerate(taken, len(live)) if own >= 0]
        if copies:
            slots, places = zip(*copies, strict=True)
            self.tails.begin(slots, self.suffixes, places)
        return rows, [
            (self.suffixes.hidden_BD[own] if own >= 0 else self.prompts.hidden_BD[row.place])[None]
            for row, own in taken
        ]

    def _compute(
        self,
        prompts: dict[Prefix, int],
        suffixes: dict[tuple[Prefix, Tokens], tuple[int, int]],
    ) -> None:
        """Runs what is missing through the model; if that fails, none of it counts as cached."""
        try:
            for part in _passes(list(prompts), lambda prefix: len(prefix[1])):
                places = [prompts[prefix] for prefix in part]
                self.counts.prompt += fill_prompts(self.network, self.prompts, part, places)
            width = max((len(prompt) for (_, prompt), _ in suffixes), default=0)
            for pairs in _passes(list(suffixes), lambda pair: width + len(pair[1])):
                of, own = zip(*(suffixes[pair] for pair in pairs), strict=True)
                texts = [suffix for _, suffix in pairs]
                self.counts.suffix += fill_suffixes(
                    self.network, self.prompts, of, self.suffixes, texts, own
                )
        except BaseException:
            for prefix in prompts:
                self.prompts.drop(prefix)
            for both in suffixes:
                self.suffixes.drop(both)
            raise

    def _release(self, live: list[Row], waiting: deque[Row]) -> list[Row]:
        """Closes the ranks: the last rows move to the slots of those that ended."""
        again = [row for row in live if not row.tokens and not row.finish]  # cut to nothing
        waiting.extendleft(reversed(again))
        stay = [i for i, row in enumerate(live) if row.tokens and not row.finish]
        n = len(stay)
        holes = sorted(set(range(n)) - set(stay))
        movers = [i for i in stay if i >= n]
        if movers:
            longest = max(len(live[i].suffix) + len(live[i].tokens) for i in movers)
            self.tails.move(movers, holes, longest)
        left = live[:n]
        for i, hole in zip(movers, holes, strict=True):
            left[hole] = live[i]
        return left

    def _fit(self, rows: Sequence[Row], new: int) -> None:
        """Memory for these rows: what they would like to have, or what the budget allows.

        What there is stays as it is where it suffices, and what grows keeps what it holds where old
        and new fit the budget side by side.
        """
        suffix = max(len(row.suffix) for row in rows)
        longest = (suffix + new, max(len(row.prompt) for row in rows), suffix)
        least_rooms = tuple(map(rounded, longest))
        prompts = {row.prefix for row in rows}
        pairs = {(row.prefix, row.suffix) for row in rows if row.suffix}
        here = (self.tails, self.prompts, self.suffixes)
        have, rooms = tuple(x.places for x in here), tuple(x.room for x in here)
        del here  # what is replaced below must not live on
        need = (
            min(self.max_rows, len(rows)),
            len(prompts | self.prompts.keys),
            len(pairs | self.suffixes.keys),
        )
        roomy = all(r >= least for r, least in zip(rooms, least_rooms, strict=True))
        enough = all(h >= n for h, n in zip(have, need, strict=True))
        some = all(h or not n for h, n in zip(have, need, strict=True))
        if roomy and (enough or (self._limited and some)):
            return
        token = self.shape.token_bytes
        counts = tuple(map(max, have, need))
        self.tails = Tails(self.shape, 0, 0)
        self._steps.clear()
        old = max(n * r * token for n, r in zip(have[1:], rooms[1:], strict=True))
        rooms = tuple(map(max, rooms, least_rooms))
        if (
            sum(n * r for n, r in zip(counts, rooms, strict=True)) * token + old
            > self.max_cache_bytes
        ):
            self.forget()
            need, rooms = (need[0], len(prompts), len(pairs)), least_rooms
            sizes = tuple(room * token for room in rooms)
            counts = shares(self.max_cache_bytes, wanted=need, each=sizes)
            self._limited = counts != need
        self.prompts = self.prompts.resized(counts[1], rooms[1])
        self.suffixes = self.suffixes.resized(counts[2], rooms[2])
        self.tails = Tails(self.shape, counts[0], rooms[0])


@contextmanager
def engine(
    policy: Policy,
    *,
    network: Network | None = None,
    max_rows: int = 64,
    max_cache_bytes: int = 0,
    join: bool = False,
) -> Iterator[Engine]:
    """An `Engine` on the policy as it is now (or on `network`: its reference, to sample the base).

    The policy's weights must not change while it is open: what is computed once is used to its end.
    `max_rows`: slots. `max_cache_bytes`: of keys and values, in all; 0: 2 GiB on a CPU, half of the
    free memory on a GPU. What does not fit is computed again when it is needed. `join`: a prompt
    with one preference in a call is computed as one with it: a pass less, but a later call with
    another preference computes the prompt again.

    Raises ValueError, when rows are drawn, for a budget that holds no row.
    """
    with policy.merged() if network is None else nullcontext(network) as sampled:
        yield Engine(policy, sampled, max_rows, max_cache_bytes, join)


def rollout(
    policy: Policy,
    requests: Sequence[Request],
    *,
    max_new_tokens: int,
    temperature: float,  # 0: greedy; log-probabilities are then those at temperature 1
    seed: int,
    stream: tuple[int | str, ...] = (),  # what else a row's id is made of: step, task, …
    network: Network | None = None,  # default: the policy; the reference, to sample the base model
    max_rows: int = 64,
    max_cache_bytes: int = 0,
) -> Rollout:
    """Samples every request and returns the rows in the order of the requests.

    A row's id is key(*stream, prompt id, w, sample). Raises ValueError for an empty list, a request
    of no samples, an empty prompt, one that does not fit the model's context, or a budget of memory
    that holds no row.
    """
    sampling = Sampling(max_new_tokens, temperature, seed, stream)
    with engine(
        policy, network=network, max_rows=max_rows, max_cache_bytes=max_cache_bytes, join=True
    ) as sampler:
        return sampler.sample(requests, sampling)


def _passes(items: list[Any], tokens: Callable[[Any], int]) -> list[list[Any]]:
    """Items of like length together, as many as a pass takes with their padding."""
    parts: list[list[Any]] = []
    for item in sorted(items, key=tokens):
        if not parts or (len(parts[-1]) + 1) * tokens(item) > _PASS_TOKENS:
            parts.append([])
        parts[-1].append(item)
    return parts
