"""Batched sampling behind shared prefixes.

Three passes: every different prompt once; every (prompt, preference) suffix once, behind its
prompt; then one token a step for all rows, each group behind the single copy of its prefix. Rows
that have finished leave the batch. A token's randomness is keyed by (seed, row id, position), so a
row's text does not depend on which other rows share the batch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from .. import ops, tree
from ..batch import Prompt, Rollout, key
from ..policy import Network, Policy


@dataclass(frozen=True)
class Request:
    """`samples` responses to one prompt under one preference (None: no preference text)."""

    prompt: Prompt
    w: tuple[float, ...] | None
    samples: int = 1


@torch.no_grad()
def rollout(
    policy: Policy,
    requests: Sequence[Request],
    *,
    max_new_tokens: int,
    temperature: float,  # 0: greedy; log-probabilities are then those at temperature 1
    seed: int,
    stream: tuple[int | str, ...] = (),  # what else a row's id is made of: step, task, attempt, …
    network: Network | None = None,  # default: the policy; the reference, to sample the base model
    max_rows: int = 64,
) -> Rollout:
    """Samples every request and returns the rows in the order of the requests.

    A row's id is key(*stream, prompt id, w, sample). Requests are worked off in batches of at most
    `max_rows` rows; neighbours with the same prompt share its pass. Raises ValueError for an empty
    list, a request of no samples, or a prompt that does not fit the model's context.
    """
    if not requests:
        raise ValueError("requests=[]: nothing to sample")
    for request in requests:
        if request.samples < 1:
            raise ValueError(f"samples={request.samples}: must be at least 1")
    started = time.perf_counter()
    prefixes = tuple(
        policy.encode_prompt(q.prompt.text) + policy.encode_suffix(q.w) for q in requests
    )
    _check_context(policy, requests, prefixes, max_new_tokens)
    parts = []
    with policy.merged() if network is None else nullcontext(network) as sampled:
        for low, high in _batches(requests, max_rows):
            part = requests[low:high]
            rows = [(q, s) for q in part for s in range(q.samples)]
            ids = [key(*stream, q.prompt.id, str(q.w or ()), s) for q, s in rows]
            parts.append(_sample(policy, sampled, part, ids, max_new_tokens, temperature, seed))
    tokens_RT = _stack([p[0] for p in parts], max_new_tokens)
    logp_RT = _stack([p[1] for p in parts], max_new_tokens)
    lengths_R = torch.cat([p[2] for p in parts])
    stopped_R = torch.cat([p[3] for p in parts])
    width = int(lengths_R.max())
    mask_RT = torch.arange(width, device=tokens_RT.device) < lengths_R[:, None]
    tokens_RT, logp_RT = tokens_RT[:, :width] * mask_RT, logp_RT[:, :width] * mask_RT
    group = [i for i, q in enumerate(requests) for _ in range(q.samples)]
    uniform = (1.0 / len(policy.names),) * len(policy.names)
    ended = zip(tokens_RT.tolist(), lengths_R.tolist(), strict=True)
    return Rollout(
        prompts=tuple(q.prompt for q in requests),
        prefix=prefixes,
        group_R=torch.tensor(group, device=tokens_RT.device),
        w_RK=torch.tensor([requests[g].w or uniform for g in group], device=tokens_RT.device),
        tokens_RT=tokens_RT,
        mask_RT=mask_RT,
        logp_RT=logp_RT,
        finish=tuple("stop" if stop else "length" for stop in stopped_R.tolist()),
        texts=tuple(policy.decode(row[:n]) for row, n in ended),
        prefill_tokens=sum(p[4] for p in parts),
        seconds=time.perf_counter() - started,
    )


def _sample(
    policy: Policy,
    network: Network,
    requests: Sequence[Request],
    ids: list[int],
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """One batch: tokens (R, T), log-probabilities (R, T), lengths (R,), stopped (R,), prefill."""
    device = policy.device
    prefixes, hidden_BD, prefill = _prefixes(policy, network, requests)
    group_R = torch.tensor(
        [i for i, q in enumerate(requests) for _ in range(q.samples)], device=device
    )
    rows = prefixes.rows(group_R, keep=True, capacity=max_new_tokens)
    r = len(group_R)
    tokens_RT = torch.zeros(r, max_new_tokens, dtype=torch.int64, device=device)
    logp_RT = torch.zeros(r, max_new_tokens, device=device)
    lengths_R = torch.zeros(r, dtype=torch.int64, device=device)
    stopped_R = torch.zeros(r, dtype=torch.bool, device=device)
    row_ids = torch.tensor(ids, device=device)
    stop = torch.tensor(sorted(policy.stop_ids), device=device)
    live = torch.arange(r, device=device)  # rows still in the batch
    logits = network.logits(hidden_BD)[group_R]
    for t in range(max_new_tokens):
        token, logp, _ = ops.sample(
            logits, seed=seed, row=row_ids[live], position=t, temperature=temperature
        )
        tokens_RT[live, t] = token
        logp_RT[live, t] = logp
        lengths_R[live] = t + 1
        ended = torch.isin(token, stop)
        if ended.any():
            stopped_R[live[ended]] = True
            going = torch.nonzero(~ended).squeeze(1)
            live, token = live[going], token[going]
            if len(live):
                rows.select(going)
        if not len(live) or t + 1 == max_new_tokens:
            break
        logits = network.logits(tree.extend(network.body, rows, token[:, None])[:, 0])
    return tokens_RT, logp_RT, lengths_R, stopped_R, prefill


def _prefixes(
    policy: Policy, network: Network, requests: Sequence[Request]
) -> tuple[tree.Tree, Tensor, int]:
    """The tree of the requests' prefixes, the last hidden state (B, D) of each, tokens computed."""
    texts = list(dict.fromkeys(q.prompt.text for q in requests))
    suffixes = [policy.encode_suffix(q.w) for q in requests]
    if len(texts) == len(requests):  # one preference a prompt: prompt and suffix in one pass
        whole = [
            policy.encode_prompt(q.prompt.text) + s for q, s in zip(requests, suffixes, strict=True)
        ]
        prompts, hidden = tree.prefill(network.body, whole)
        return prompts, hidden, sum(map(len, whole))
    heads = [policy.encode_prompt(text) for text in texts]
    prompts, _ = tree.prefill(network.body, heads)
    where = {text: i for i, text in enumerate(texts)}
    # (prompt, preference) rows, in the requests' order; each prompt's rows must lie together
    order = sorted(range(len(requests)), key=lambda i: where[requests[i].prompt.text])
    tokens_BS, valid_BS = tree.pad([suffixes[i] for i in order], policy.device)
    group_B = torch.tensor([where[requests[i].prompt.text] for i in order], device=policy.device)
    rows = prompts.rows(group_B, keep=True, capacity=tokens_BS.shape[1])
    hidden_BSD = tree.extend(network.body, rows, tokens_BS)
    last = hidden_BSD[torch.arange(len(order)), valid_BS.sum(1) - 1]
    back = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=policy.device)
    grown = prompts.grown(rows, valid_BS).reordered(back)
    return grown, last[back], sum(map(len, heads)) + sum(map(len, suffixes))


def _batches(requests: Sequence[Request], max_rows: int) -> list[tuple[int, int]]:
    """Runs of requests of at most `max_rows` rows.

    Neighbours with one prompt stay together, so that it is computed once; what is larger than
    `max_rows` by itself goes alone.
    """
    runs, low, rows, start = [], 0, 0, 0
    for _, same in groupby(requests, key=lambda q: q.prompt.text):
        unit = list(same)
        more = sum(q.samples for q in unit)
        if rows and rows + more > max_rows:
            runs.append((low, start))
            low, rows = start, 0
        rows += more
        start += len(unit)
    return [*runs, (low, len(requests))]


def _stack(parts: list[Tensor], width: int) -> Tensor:
    return torch.cat([torch.nn.functional.pad(p, (0, width - p.shape[1])) for p in parts])


def _check_context(
    policy: Policy,
    requests: Sequence[Request],
    prefixes: Sequence[tuple[int, ...]],
    new: int,
) -> None:
    limit = policy.context
    for request, prefix in zip(requests, prefixes, strict=True):
        if len(prefix) + new > limit:
            raise ValueError(
                f"prompt {request.prompt.id}: {len(prefix)} tokens and {new} new ones exceed the "
                f"model's context of {limit}; lower prompts.max_tokens or rollout.max_new_tokens"
            )
