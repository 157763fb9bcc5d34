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
from typing import Any, ClassVar

import torch
from torch import Tensor

from meal_fast import ops
from meal_fast.data_types import Rollout
from meal_fast.models.policy import Network, Policy
from meal_fast.models.sizes import ON_A_CPU
from meal_fast.ops import Groups, dispatch

from .cuda_graph import FixedStep, Staging
from .kv_cache import Shape, TokenPass, fill_prompts, fill_suffixes
from .memory import Memory, default_budget, memory_of
from .protocol import Capability
from .sequence import (
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


class Engine:
    """Samples from one network whose weights stay as they are: see `engine`."""

    name: ClassVar[str] = "engine"
    capabilities: ClassVar[frozenset[Capability]] = frozenset(
        ("adapters", "any-network", "rejection")
    )

    def __init__(
        self,
        policy: Policy,
        network: Network,
        max_rows: int = ON_A_CPU.slots,
        max_cache_bytes: int = 0,
        join: bool = False,
        memory: Memory | None = None,  # default: of its own
        pass_tokens: int = ON_A_CPU.pass_tokens,  # padded, of a pass over prompts or suffixes
    ) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows}: must be at least 1")
        if max_cache_bytes < 0:
            raise ValueError(f"max_cache_bytes={max_cache_bytes}: 0 (automatic) or positive")
        self.policy, self.network, self.max_rows, self.join = policy, network, max_rows, join
        self.shape = Shape.of(network)
        if memory is None:
            memory = Memory(self.shape, max_cache_bytes or default_budget(self.shape.device))
        self.memory, self.pass_tokens = memory, pass_tokens
        self.counts = Counts()
        self.live: list[Row] = []  # the row in each slot
        weight = network.weight
        # Shapes that do not change are what a graph is captured of; without one they are waste.
        in_triton = dispatch.triton_obstacle(weight) is None and self.shape.width <= 256
        self.fixed_shapes = weight.is_cuda and in_triton
        self._stop = policy.stop_ids
        self._staging: Staging | None = None  # of rows that have just been admitted

    def forget(self) -> None:
        """No prefix is known any more. Memory is given back, unless it is kept with the policy."""
        self.memory.forget()

    def rows(self, requests: Sequence[Request], max_new_tokens: int) -> list[Row]:
        """The rows of the requests, in their order.

        Raises ValueError for no request, one of no samples, and a prompt that is empty or too long.
        """
        parts = encode(self.policy, requests, max_new_tokens)
        whole = [(q.task_id, *part) for q, part in zip(requests, parts, strict=True)]
        preferences = Counter((a, prompt) for a, prompt, _ in dict.fromkeys(whole))
        rows = []
        for index, (request, (prompt, suffix)) in enumerate(zip(requests, parts, strict=True)):
            if self.join and preferences[request.task_id, prompt] == 1:
                prompt, suffix = prompt + suffix, ()
            rows += [Row(request, index, s, prompt, suffix) for s in range(request.samples)]
        return rows

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        ended: Callable[[int], None] | None = None,  # told how many rows have ended so far
    ) -> Rollout:
        """Samples every request: see `Backend.generate`."""
        started, before = time.perf_counter(), replace(self.counts)
        rows = self.rows(requests, sampling.max_new_tokens)
        done = 0
        for finished in self.draw(deque(rows), sampling):
            done += len(finished)
            if ended and finished:
                ended(done)
        used = self.counts
        return gathered(
            self.policy,
            requests,
            [Drawn(row.tokens, row.logp, row.finish) for row in rows],
            started=started,
            prefill_tokens=used.prompt + used.suffix - before.prompt - before.suffix,
            reused_tokens=used.reused - before.reused,
            on_policy=sampling.on_policy,
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
        self.memory.fit(waiting, sampling.max_new_tokens, self.max_rows)
        while waiting or self.live:
            # The step first: at fixed shapes it writes to the free slots, which then are taken.
            step, hidden = self._step(self.live, sampling) if self.live else (None, [])
            fresh, first = self._admit(waiting, self.live)
            self.live = self.live + fresh
            if self.live:
                self._sample(self.live, [*hidden, *first], step, sampling)
            yield [row for row in self.live if row.finish]
            self.live = self._release(self.live, waiting)

    def _sample(
        self, live: list[Row], hidden: list[Tensor], step: FixedStep | None, sampling: Sampling
    ) -> None:
        """The next token of each row, whose hidden states come in parts; `step` gave the first."""
        self._name(live, sampling)
        if step is not None and len(hidden) == 1:
            key_R, position_R = step.key_R[: len(live)], step.drawn_R[: len(live)]
        else:
            key_R, position_R = self._keys(live)
        token, logp, _ = ops.sample(
            self.network.logits(hidden[0] if len(hidden) == 1 else torch.cat(hidden)),
            seed=sampling.seed,
            row=key_R,
            position=position_R,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )
        self.counts.sampled += len(live)
        for row, t, lp in zip(live, *_read(token, logp), strict=True):
            row.tokens.append(t)
            row.logp.append(lp)
            if t in self._stop or (sampling.stop and sampling.said_stop(self.policy, row.tokens)):
                row.finish = "stop"
            elif len(row.tokens) == sampling.max_new_tokens:
                row.finish = "length"

    def _name(self, rows: list[Row], sampling: Sampling) -> None:
        """The ids of rows that have none: they are new, or were cut."""
        for row in rows:
            if row.key < 0:
                row.key = row_id(sampling.rng_key, row.request, row.sample, row.attempt)

    def _keys(self, live: list[Row]) -> tuple[Tensor, Tensor]:
        """Each row's id, and the number of the token that it draws next."""
        if self._staging is None:
            self._staging = Staging(2 * self.max_rows, self.shape.device)
        n = len(live)
        self._staging.numbers[:n] = [row.key for row in live]
        self._staging.numbers[n : 2 * n] = [len(row.tokens) for row in live]
        self._staging.send()
        return self._staging.there[:n], self._staging.there[n : 2 * n]

    def _step(self, live: list[Row], sampling: Sampling) -> tuple[FixedStep | None, list[Tensor]]:
        """Each row's last token through the model: hidden states (R, D), and what keeps its shape.

        Rows that were cut get their new id here, since the step carries it to the device.
        """
        self.counts.decode += len(live)
        self._name(live, sampling)
        memory = self.memory
        if self.fixed_shapes:
            step = memory.steps.fitting(self.network, memory.prompts, memory.tails, len(live))
            return step, [step(live)]
        device = self.shape.device
        at = [len(row.suffix) + len(row.tokens) - 1 for row in live]
        places = [row.place for row in live]
        low, high = min(places), max(places) + 1
        at_R = torch.tensor(at, device=device)
        place_R = torch.tensor(places, device=device)
        token_pass = TokenPass(
            prompts=memory.prompts,
            low=low,
            high=high,
            width=max(memory.prompts.length[low:high]),
            groups=Groups.of(place_R - low, high - low),
            tails=memory.tails,
            slots_R=torch.arange(len(live), device=device),
            at_R=at_R,
            at=at[0] if min(at) == max(at) else None,
            seen_R=at_R + 1,
            longest=max(at) + 1,
        )
        hidden: Tensor = self.network.body(
            input_ids=torch.tensor([[row.tokens[-1]] for row in live], device=device),
            position_ids=(memory.prompts.length_B[place_R] + at_R)[:, None],
            use_cache=False,
            tree=token_pass,
        ).last_hidden_state
        return None, [hidden[:, 0]]

    def _admit(self, waiting: deque[Row], live: list[Row]) -> tuple[list[Row], list[Tensor]]:
        """Rows for the free slots, and the hidden states (1, D) that their first tokens hang on."""
        memory = self.memory
        in_use = {row.place for row in live}
        needed: set[int] = set()  # places of suffixes
        prompts: dict[Prefix, int] = {}  # to be computed -> place
        suffixes: dict[tuple[Prefix, Tokens], tuple[int, int]] = {}  # -> prompt's and own place
        taken: list[tuple[Row, int]] = []  # with the suffix's place
        most = min(memory.tails.places, self.max_rows)
        while waiting and len(live) + len(taken) < most:
            row = waiting[0]
            if row.finish:  # cancelled while it waited
                waiting.popleft()
                continue
            place = memory.prompts.find(row.prefix)
            if place is None:
                place = memory.prompts.take(row.prefix, in_use)
                if place is None:
                    break  # until a row ends and leaves its prompt's place
                prompts[row.prefix] = place
            in_use.add(place)
            own = -1
            if row.suffix:
                both = (row.prefix, row.suffix)
                found = memory.suffixes.find(both)
                if found is None:
                    found = memory.suffixes.take(both, needed)
                    if found is None:
                        break  # until the next step
                    suffixes[both] = (place, found)
                needed.add(own := found)
            row.place, row.key = place, -1
            taken.append((waiting.popleft(), own))
        self._compute(prompts, suffixes)
        rows = [row for row, _ in taken]
        self.counts.reused += sum(len(row.prompt) + len(row.suffix) for row in rows)
        self.counts.reused -= sum(len(p) for _, p in prompts) + sum(len(s) for _, s in suffixes)
        copies = [(slot, own) for slot, (_, own) in enumerate(taken, len(live)) if own >= 0]
        if copies:
            slots, places = zip(*copies, strict=True)
            memory.tails.begin(slots, memory.suffixes, places)
        return rows, [
            memory.suffixes.hidden_BD[own : own + 1]
            if own >= 0
            else memory.prompts.hidden_BD[row.place : row.place + 1]
            for row, own in taken
        ]

    def _compute(
        self,
        prompts: dict[Prefix, int],
        suffixes: dict[tuple[Prefix, Tokens], tuple[int, int]],
    ) -> None:
        """Runs what is missing through the model; if that fails, none of it counts as cached."""
        memory = self.memory
        try:
            for part in _passes(list(prompts), lambda prefix: len(prefix[1]), self.pass_tokens):
                places = [prompts[prefix] for prefix in part]
                self.counts.prompt += fill_prompts(self.network, memory.prompts, part, places)
            width = max((len(prompt) for (_, prompt), _ in suffixes), default=0)
            for pairs in _passes(
                list(suffixes), lambda pair: width + len(pair[1]), self.pass_tokens
            ):
                of, own = zip(*(suffixes[pair] for pair in pairs), strict=True)
                texts = [suffix for _, suffix in pairs]
                self.counts.suffix += fill_suffixes(
                    self.network, memory.prompts, of, memory.suffixes, texts, own
                )
        except BaseException:
            for prefix in prompts:
                memory.prompts.drop(prefix)
            for both in suffixes:
                memory.suffixes.drop(both)
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
            self.memory.tails.move(movers, holes, longest)
        left = live[:n]
        for i, hole in zip(movers, holes, strict=True):
            left[hole] = live[i]
        return left


@contextmanager
def engine(
    policy: Policy,
    *,
    network: Network | None = None,
    max_rows: int = 0,
    max_cache_bytes: int = 0,
    join: bool = False,
) -> Iterator[Engine]:
    """An `Engine` on the policy as it is now (or on `network`: its reference, to sample the base).

    The policy's weights must not change while it is open: what is computed once is used to its end.
    `max_rows`: slots; 0: as suits the device. `max_cache_bytes`: of keys and values, in all; 0:
    2 GiB on a CPU, half of the free memory on a GPU. What does not fit is computed again when it is
    needed. `join`: a prompt with one preference in a call is computed as one with it: a pass less,
    but a later call with another preference computes the prompt again.

    Where the policy samples from a copy of its weights (on a GPU), memory and graphs are the
    policy's, and the next engine takes them up; one is open at a time.

    Raises ValueError, when rows are drawn, for a budget that holds no row.
    """
    with policy.merged() if network is None else nullcontext(network) as sampled:
        memory = memory_of(policy, sampled, max_cache_bytes)
        slots = max_rows or policy.sizes.slots
        passes = policy.sizes.pass_tokens
        yield Engine(policy, sampled, slots, max_cache_bytes, join, memory, passes)


def _passes(items: list[Any], tokens: Callable[[Any], int], most: int) -> list[list[Any]]:
    """Items of like length together, as many as a pass of `most` takes with their padding."""
    parts: list[list[Any]] = []
    for item in sorted(items, key=tokens):
        if not parts or (len(parts[-1]) + 1) * tokens(item) > most:
            parts.append([])
        parts[-1].append(item)
    return parts


def _read(token: Tensor, logp: Tensor) -> tuple[list[int], list[float]]:
    """What was drawn, as numbers; a GPU is waited for once. Both are exact in float64."""
    if not token.is_cuda:
        return token.tolist(), logp.tolist()
    both = torch.empty(2, len(token), dtype=torch.float64, device=token.device)
    both[0], both[1] = token, logp
    tokens, logps = both.tolist()
    return [int(t) for t in tokens], logps
