"""The backend `vllm`. Its engine has never been run here: that needs a GPU.

What is tested, where vLLM (0.33) is installed, is that it takes these requests and options, and
that its outputs are read rightly.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, ClassVar

from meal_fast.data_types import rng_seed
from meal_fast.models.network import Network
from meal_fast.models.policy import Policy

from ..sequence import Drawn, Sampling, Tokens
from .plain import Plain


class VLLM(Plain):
    """Samples by vLLM's engine on the base model's files.

    A row's random numbers are vLLM's own, seeded by rng_seed(seed, row id): other tokens than the
    engine's. vLLM decides how many rows run at once and what it keeps.
    """

    name: ClassVar[str] = "vllm"

    def __init__(self, policy: Policy, llm: Any, adapter: Any) -> None:
        super().__init__(policy)
        self.llm, self.adapter = llm, adapter

    def drawn(
        self,
        prefixes: Sequence[Tokens],
        row_ids: Sequence[int],
        sampling: Sampling,
        ended: Callable[[int], None],
    ) -> tuple[list[Drawn], int]:
        """Draw all rows in one call: see `Plain.drawn`."""
        prompts, settings = vllm_requests(prefixes, row_ids, self.policy.stop_ids, sampling)
        outputs = self.llm.generate(prompts, settings, lora_request=self.adapter, use_tqdm=False)
        drawn = [from_vllm(output) for output in outputs]
        if sampling.stop:
            drawn = [self.ended_at(row.tokens, row.logp, sampling) for row in drawn]
        ended(len(drawn))
        return drawn, sum(output.num_cached_tokens or 0 for output in outputs)


@contextmanager
def open_vllm(
    policy: Policy,
    *,
    network: Network | None = None,
    max_rows: int = 0,  # no effect: vLLM decides
    max_cache_bytes: int = 0,  # likewise
    join: bool = False,  # likewise
) -> Iterator[VLLM]:
    """Open vLLM on the policy; the adapter is written to a folder, for a `LoRARequest`.

    A `network` is taken for the reference: the base model without an adapter. Raises ValueError
    where vLLM is missing, and for a policy that is neither the base model nor LoRA: its weights lie
    in no file.
    """
    require_vllm()
    if network is None and not policy.rank:
        raise ValueError(
            "rollout.backend='vllm': policy.tuning='full' keeps weights in memory, where vLLM does "
            "not read them; use policy.tuning=lora or rollout.backend=engine"
        )
    dtype = str(policy.network.weight.dtype).removeprefix("torch.")
    llm = _llm(policy.causal_lm.config.name_or_path, dtype, policy.rank)
    with ExitStack() as held:
        adapter = None
        if network is None:
            folder = held.enter_context(tempfile.TemporaryDirectory())
            policy.model.save_pretrained(folder)
            adapter = vllm_adapter(folder)
        yield VLLM(policy, llm, adapter)


def vllm_requests(
    prefixes: Sequence[Sequence[int]],
    row_ids: Sequence[int],
    stop_ids: frozenset[int],
    sampling: Sampling,
) -> tuple[list[Any], list[Any]]:
    """Give rows as vLLM's `TokensPrompt`s and `SamplingParams`: token ids in, token ids out."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    prompts = [TokensPrompt(prompt_token_ids=list(prefix)) for prefix in prefixes]
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


_adapters = itertools.count(1)


def vllm_adapter(folder: str) -> Any:
    """Give a `LoRARequest` for the adapter in `folder`, under a number that no earlier one had."""
    from vllm.lora.request import LoRARequest

    number = next(_adapters)
    return LoRARequest(f"policy-{number}", number, folder)


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


def vllm_options(path: str, dtype: str, rank: int) -> dict[str, Any]:
    """Give what vLLM's engine is made with. `rank`: of the adapters, 0 for none."""
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


def require_vllm() -> None:
    """Raise ValueError where vLLM is not installed."""
    if find_spec("vllm") is None:
        raise ValueError(
            "rollout.backend='vllm': vLLM is not installed; install meal-fast[vllm], or use "
            "rollout.backend=engine"
        )
