"""Other samplers behind the engine's interface, chosen by `rollout.backend`.

engine    ours: see engine.py
generate  transformers' own `generate`, every row by itself: the plain oracle, for comparison
vllm      the optional extra `vllm`; never run, see `vllm_rollout`
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from meal_fast import ops
from meal_fast.common import require
from meal_fast.data_types import Rollout, rng_seed
from meal_fast.models.network import Network, cut
from meal_fast.models.policy import Policy
from meal_fast.models.shared_prefix import pad
from meal_fast.ops import checks

from .engine import rollout
from .sequence import Drawn, Request, encode, gathered, row_id


def backend(name: str) -> Callable[..., Rollout]:
    """The sampler called `name`, with the signature of `rollout`.

    Raises ValueError for an unknown name, and for vllm where it is not installed.
    """
    samplers = {"engine": rollout, "generate": generate_rollout, "vllm": vllm_rollout}
    checks.choice("rollout.backend", name, tuple(samplers))
    if name == "vllm":
        _need_vllm()
    return samplers[name]


@torch.no_grad()
def generate_rollout(
    policy: Policy,
    requests: Sequence[Request],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    rng_key: tuple[int | str, ...] = (),
    network: Network | None = None,
    max_rows: int = 0,
    max_cache_bytes: int = 0,
) -> Rollout:
    """`rollout`, by transformers' `generate` in batches of `max_rows` rows padded on the left.

    Attention is transformers' own, adapters stay apart, a row's prompt is computed anew for every
    sample, and no row leaves its batch before the last has ended. The tokens are drawn by
    `ops.sample` under the same (seed, row id, position), so they equal the engine's up to the
    rounding of the logits. `max_cache_bytes` has no effect: nothing is kept.

    Raises ValueError as `rollout` does, and for a network that is not the policy or its reference.
    """
    started = time.perf_counter()
    require(max_rows >= 0, "max_rows", max_rows, "0 (as suits the device) or positive")
    max_rows = max_rows or policy.sizes.slots
    prefixes, rows = _rows(policy, requests, max_new_tokens, rng_key)
    stop = sorted(policy.stop_ids)
    model = _whole(policy, network)
    drawn: list[Drawn] = []
    with _plain(model):
        for low in range(0, len(rows), max_rows):
            part = rows[low : low + max_rows]
            draw = _Draw([row for _, row in part], seed, temperature, policy.device)
            # Reversed, padded on the right, and reversed again: padded on the left.
            tokens_RP, valid_RP = pad([prefixes[b][::-1] for b, _ in part], policy.device)
            out = model.generate(
                input_ids=tokens_RP.flip(1),
                attention_mask=valid_RP.flip(1).long(),
                generation_config=GenerationConfig(
                    max_new_tokens=max_new_tokens,
                    do_sample=False,  # the processor has drawn: one token is left
                    eos_token_id=stop or None,
                    pad_token_id=stop[0] if stop else 0,
                ),
                logits_processor=LogitsProcessorList([draw]),
            )
            sampled = out[:, tokens_RP.shape[1] :].tolist()
            logp = torch.stack(draw.logp, 1).tolist()
            drawn += [_ended(t, lp, set(stop)) for t, lp in zip(sampled, logp, strict=True)]
    fresh = sum(len(prefixes[b]) for b, _ in rows)
    return gathered(
        policy,
        requests,
        drawn,
        started=started,
        prefill_tokens=fresh,
        on_policy=temperature > 0,
    )


class _Draw(LogitsProcessor):
    """Draws each row's token and leaves it alone possible."""

    def __init__(
        self, row_ids: Sequence[int], seed: int, temperature: float, device: torch.device
    ) -> None:
        self.row = torch.tensor(row_ids, device=device)
        self.seed, self.temperature = seed, temperature
        self.logp: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token, logp, _ = ops.sample(
            scores,
            seed=self.seed,
            row=self.row,
            position=len(self.logp),
            temperature=self.temperature,
        )
        self.logp.append(logp)
        return torch.full_like(scores, float("-inf")).scatter_(1, token[:, None], 0.0)


def _whole(policy: Policy, network: Network | None) -> Any:
    """The causal LM that `network` was cut from."""
    base, frozen = policy._base, policy._frozen
    if network is None and policy.adapter is not None:
        raise ValueError("rollout.backend='generate': runs one model; a guided one is the engine's")
    models = [base] if frozen is None else [base, frozen.model]
    for model in models:
        if network is None or model.base_model is network.body:
            return model
    raise ValueError(
        "network: neither the policy's nor its reference's; rollout.backend=engine takes any"
    )


@contextmanager
def _plain(model: Any) -> Iterator[None]:
    """Transformers' attention, none of the sampling options that the model came with, and logits
    that are not rounded to half precision."""
    attention, options = model.config._attn_implementation, model.generation_config
    model.generation_config = GenerationConfig()
    head, raw = model.get_output_embeddings(), replace(cut(model), softcap=None)

    def unrounded(hidden: Tensor) -> Tensor:
        return raw.logits(hidden.flatten(0, -2)).view(*hidden.shape[:-1], -1)

    if head.weight.dtype != torch.float32:
        head.forward = unrounded
    try:
        model.set_attn_implementation("sdpa")
        yield
    finally:
        model.set_attn_implementation(attention)
        model.generation_config = options
        vars(head).pop("forward", None)


def vllm_rollout(
    policy: Policy,
    requests: Sequence[Request],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    rng_key: tuple[int | str, ...] = (),
    network: Network | None = None,
    max_rows: int = 0,
    max_cache_bytes: int = 0,
) -> Rollout:
    """`rollout`, by vLLM. Its engine has never been run here: that needs a GPU.

    What is tested, where vLLM (0.33) is installed, is that it takes these requests and options, and
    that its outputs are read rightly. One engine is kept on the base model's files; the adapter is
    written to a folder at each call and handed over as a `LoRARequest`. A `network` is taken for
    the reference: the base model without an adapter. A row's random numbers are vLLM's own, seeded
    by rng_seed(seed, row id): other tokens than the engine's. vLLM decides how many rows run at
    once and what it keeps: `max_rows` and `max_cache_bytes` have no effect.

    Raises ValueError as `rollout` does; where vLLM is missing; and for a policy that is neither the
    base model nor LoRA: its weights lie in no file.
    """
    started = time.perf_counter()
    _need_vllm()
    prefixes, rows = _rows(policy, requests, max_new_tokens, rng_key)
    if network is None and not policy.lora:
        tuning = "full" if policy.adapter is None else "bilinear"
        raise ValueError(
            f"rollout.backend='vllm': policy.tuning={tuning!r} keeps weights in memory, where vLLM "
            "does not read them; use policy.tuning=lora or rollout.backend=engine"
        )
    prompts, settings = vllm_requests(
        [prefixes[b] for b, _ in rows],
        [row for _, row in rows],
        policy.stop_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    config = policy._base.config
    ranks = [c.r for c in policy.model.peft_config.values()] if policy.lora else []
    dtype = str(policy.network.weight.dtype).removeprefix("torch.")
    llm = _llm(config.name_or_path, dtype, max(ranks, default=0))
    with tempfile.TemporaryDirectory() as folder:
        adapter = None
        if network is None:
            policy.model.save_pretrained(folder)
            adapter = vllm_adapter(folder)
        outputs = llm.generate(prompts, settings, lora_request=adapter, use_tqdm=False)
    drawn = [from_vllm(output) for output in outputs]
    cached = sum(output.num_cached_tokens or 0 for output in outputs)
    fresh = sum(len(prefixes[b]) for b, _ in rows) - cached
    return gathered(
        policy,
        requests,
        drawn,
        started=started,
        prefill_tokens=fresh,
        reused_tokens=cached,
        on_policy=temperature > 0,
    )


def vllm_requests(
    prefixes: Sequence[Sequence[int]],
    row_ids: Sequence[int],
    stop_ids: frozenset[int],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> tuple[list[Any], list[Any]]:
    """Rows as vLLM's `TokensPrompt`s and `SamplingParams`: token ids in, token ids out."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    prompts = [TokensPrompt(prompt_token_ids=list(prefix)) for prefix in prefixes]
    settings = [
        SamplingParams(
            n=1,  # not a group's samples: each row has a seed of its own
            seed=rng_seed(seed, row),
            temperature=temperature,
            max_tokens=max_new_tokens,
            logprobs=0,  # the sampled token's alone
            stop_token_ids=sorted(stop_ids),
            ignore_eos=True,  # the policy's stop tokens are all that stop it
            detokenize=False,
        )
        for row in row_ids
    ]
    return prompts, settings


_adapters = itertools.count(1)


def vllm_adapter(folder: str) -> Any:
    """A `LoRARequest` for the adapter in `folder`, under a number that no earlier one had."""
    from vllm.lora.request import LoRARequest

    number = next(_adapters)
    return LoRARequest(f"policy-{number}", number, folder)


def from_vllm(output: Any) -> Drawn:
    """A `RequestOutput` with one completion. Raises ValueError for one that broke off."""
    (completion,) = output.outputs
    if completion.finish_reason not in ("stop", "length"):
        raise ValueError(
            f"vllm request {output.request_id}: ended by {completion.finish_reason!r}, not by a "
            "stop token or its length"
        )
    tokens = list(completion.token_ids)
    logp = [entry[t].logprob for t, entry in zip(tokens, completion.logprobs, strict=True)]
    return Drawn(tokens, logp, completion.finish_reason)


def vllm_options(path: str, dtype: str, rank: int) -> dict[str, Any]:
    """What vLLM's engine is made with. `rank`: of the adapters, 0 for none."""
    options = {
        "model": path,
        "dtype": dtype,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # no sampling options that the model came with
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",  # at the sampler's temperature
    }
    if rank:  # vLLM has room for adapters of certain ranks: powers of two among them
        options |= {"enable_lora": True, "max_lora_rank": max(8, 1 << (rank - 1).bit_length())}
    return options


@lru_cache(maxsize=1)
def _llm(path: str, dtype: str, rank: int) -> Any:
    from vllm import LLM

    return LLM(**vllm_options(path, dtype, rank))


def _need_vllm() -> None:
    if find_spec("vllm") is None:
        raise ValueError(
            "rollout.backend='vllm': vLLM is not installed; install meal-fast[vllm], or use "
            "rollout.backend=engine"
        )


def _rows(
    policy: Policy,
    requests: Sequence[Request],
    max_new_tokens: int,
    rng_key: tuple[int | str, ...],
) -> tuple[list[tuple[int, ...]], list[tuple[int, int]]]:
    """The requests' prefixes, and of every row its request and its id; all checked."""
    prefixes = [prompt + suffix for prompt, suffix in encode(policy, requests, max_new_tokens)]
    rows = [(b, row_id(rng_key, q, s)) for b, q in enumerate(requests) for s in range(q.samples)]
    return prefixes, rows


def _ended(tokens: list[int], logp: list[float], stop: set[int]) -> Drawn:
    """What was drawn up to the first stop token: the rest of the row is padding."""
    for t, token in enumerate(tokens):
        if token in stop:
            return Drawn(tokens[: t + 1], logp[: t + 1], "stop")
    return Drawn(tokens, logp[: len(tokens)], "length")
