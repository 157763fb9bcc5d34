"""One step of the sampler: prefixes that are missing, and the next token of each row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from meal_fast import ops
from meal_fast.models.network import Network
from meal_fast.models.policy import Policy
from meal_fast.ops import Groups, dispatch

from .cuda_graph import FixedStep, Staging
from .kv_cache import TokenPass, fill_prompts, fill_suffixes
from .memory import Memory
from .scheduler import Admitted, Scheduler
from .sequence import Counts, Row, Sampling, check_logp, row_id


class ModelRunner:
    """Runs a network on the rows of a scheduler, and counts the tokens that go through it."""

    def __init__(
        self, policy: Policy, network: Network, memory: Memory, max_rows: int, pass_tokens: int
    ) -> None:
        self.policy, self.network, self.memory = policy, network, memory
        self.max_rows, self.pass_tokens = max_rows, pass_tokens
        self.counts = Counts()
        weight = network.weight
        # Shapes that do not change are what a graph is captured of; without one they are waste.
        in_triton = dispatch.triton_obstacle(weight) is None and memory.shape.width <= 256
        self.fixed_shapes = weight.is_cuda and in_triton
        self._stop = policy.stop_ids
        self._staging: Staging | None = None  # of rows that have just been admitted

    def step(self, of: Scheduler, sampling: Sampling | None) -> None:
        """Draw the next token of each row that has a slot; free slots are filled on the way.

        `sampling`: of the rows that have none of their own; None: each has.
        """
        fixed: FixedStep | None = None
        hidden: list[Tensor] = []
        if of.live:
            # Before others are admitted: at fixed shapes it writes to the free slots.
            self.counts.decode += len(of.live)
            self._name(of.live, sampling)  # those that were cut: the step carries their new ids
            if self.fixed_shapes:
                memory = self.memory
                fixed = memory.steps.fitting(
                    self.network, memory.prompts, memory.tails, len(of.live)
                )
                hidden.append(fixed(of.live))
            else:
                hidden.append(self._decode(of.live))
        admitted = of.admit()
        hidden += self._prefill(admitted, len(of.live))
        of.live = of.live + admitted.rows
        if not of.live:
            return
        self._name(of.live, sampling)
        n = len(of.live)
        if fixed is not None and not admitted.rows:
            key_R, position_R = fixed.key_R[:n], fixed.drawn_R[:n]
        else:
            key_R, position_R = self._keys(of.live)
        self._draw(of.live, hidden, key_R, position_R, sampling)

    def _draw(
        self,
        live: list[Row],
        hidden: list[Tensor],  # in parts, (R, D) together
        key_R: Tensor,
        position_R: Tensor,
        sampling: Sampling | None,
    ) -> None:
        logits = self.network.logits(hidden[0] if len(hidden) == 1 else torch.cat(hidden))
        alike: dict[tuple[Any, ...], list[int]] = {}  # the rows that one call can draw
        for r, row in enumerate(live):
            own = _own(row, sampling)
            how = (own.seed, own.temperature, own.top_k, own.top_p, own.min_p)
            alike.setdefault(how, []).append(r)
        self.counts.sampled += len(live)
        for (seed, temperature, top_k, top_p, min_p), rows in alike.items():
            at = slice(None) if len(alike) == 1 else torch.tensor(rows, device=logits.device)
            try:
                token, logp, _ = ops.sample(
                    logits[at],
                    seed=seed,
                    row=key_R[at],
                    position=position_R[at],
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    min_p=min_p,
                )
            except ValueError:  # on a CPU it looks itself, and knows no prompts
                for r, values in zip(rows, logits[at], strict=True):
                    check_logp(live[r].request, float(values.float().log_softmax(-1).max()))
                raise
            for r, t, lp in zip(rows, *_read(token, logp), strict=True):
                check_logp(live[r].request, lp)
                live[r].tokens.append(t)
                live[r].logp.append(lp)
        for row in live:
            own = _own(row, sampling)
            if row.tokens[-1] in self._stop or own.said_stop(self.policy, row.tokens):
                row.finish = "stop"
            elif len(row.tokens) == own.max_new_tokens:
                row.finish = "length"

    def _name(self, rows: list[Row], sampling: Sampling | None) -> None:
        """Give ids to rows that have none: they are new, or were cut."""
        for row in rows:
            if row.key < 0:
                own = _own(row, sampling)
                row.key = row_id(own.rng_key, row.request, row.sample, row.attempt)

    def _keys(self, live: list[Row]) -> tuple[Tensor, Tensor]:
        """Each row's id, and the number of the token that it draws next."""
        if self._staging is None:
            self._staging = Staging(2 * self.max_rows, self.memory.shape.device)
        n = len(live)
        self._staging.numbers[:n] = [row.key for row in live]
        self._staging.numbers[n : 2 * n] = [len(row.tokens) for row in live]
        self._staging.send()
        return self._staging.there[:n], self._staging.there[n : 2 * n]

    def _decode(self, live: list[Row]) -> Tensor:
        """Each row's last token through the model, at just the shapes needed: (R, D)."""
        memory, device = self.memory, self.memory.shape.device
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
        return hidden[:, 0]

    def _prefill(self, new: Admitted, first_slot: int) -> list[Tensor]:
        """Computes what is missing for these rows, whose slots begin at `first_slot`.

        Returns the hidden states (1, D) that their first tokens hang on.
        """
        memory = self.memory
        self._compute(new)
        self.counts.reused += new.reused
        copies = [(slot, own) for slot, own in enumerate(new.own, first_slot) if own >= 0]
        if copies:
            slots, places = zip(*copies, strict=True)
            memory.tails.begin(slots, memory.suffixes, places)
        return [
            memory.suffixes.hidden_BD[own : own + 1]
            if own >= 0
            else memory.prompts.hidden_BD[row.place : row.place + 1]
            for row, own in zip(new.rows, new.own, strict=True)
        ]

    def _compute(self, new: Admitted) -> None:
        """Run what is missing through the model; if that fails, none of it counts as cached."""
        memory, prompts, suffixes = self.memory, new.prompts, new.suffixes
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
        except BaseException:  # whatever ends the pass, Ctrl-C too: places hold half of it
            for prefix in prompts:
                memory.prompts.drop(prefix)
            for both in suffixes:
                memory.suffixes.drop(both)
            raise


def _own(row: Row, sampling: Sampling | None) -> Sampling:
    own = row.sampling or sampling
    assert own is not None
    return own


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
