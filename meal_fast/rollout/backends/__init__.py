"""The samplers that `rollout.backend` chooses from, and the one way to open any of them.

engine    ours: see rollout.engine
generate  transformers' own `generate`, every row by itself: the plain oracle, for comparison
vllm      vLLM in processes of its own, the optional extra `vllm`: run on CPUs, on no GPU so far
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

from meal_fast.data_types import Rollout
from meal_fast.models.network import Network
from meal_fast.models.policy import Policy
from meal_fast.ops import checks

from ..engine import Engine, engine
from ..protocol import Backend, Capability, check_capable
from ..sequence import Request, Sampling
from .hf import Generate, open_generate
from .vllm import VLLM, open_vllm
from .vllm_engine import require_vllm

_Opener = Callable[..., AbstractContextManager[Any]]
BACKENDS: dict[str, tuple[type[Backend], _Opener]] = {
    Engine.name: (Engine, engine),
    Generate.name: (Generate, open_generate),
    VLLM.name: (VLLM, open_vllm),
}


@contextmanager
def open_backend(
    name: str,
    policy: Policy,
    *,
    network: Network | None = None,
    max_rows: int = 0,
    max_cache_bytes: int = 0,
    join: bool = False,
    adapters: int = 1,  # of tasks, at once, that this or a later opening asks for
    needs: Iterable[Capability] = (),
) -> Iterator[Backend]:
    """Open the sampler called `name` on the policy as it is now, or on `network`.

    `network`: the policy's reference, to sample the base model; any other where the backend has the
    capability `any-network`, which a guided policy needs too. `needs`: what else it will be asked
    for. `max_rows`, `max_cache_bytes` and `join` are the engine's (see `engine`), `adapters` is
    vLLM's; another backend takes of them what has a meaning there.

    Raises ValueError for an unknown name, for a capability that the backend lacks, and for vllm
    where it is not installed.
    """
    checks.choice("rollout.backend", name, tuple(BACKENDS))
    kind, opener = BACKENDS[name]
    foreign: tuple[Capability, ...] = ("any-network",) if _foreign(policy, network) else ()
    check_capable(kind, *needs, *foreign)
    with opener(
        policy,
        network=network,
        max_rows=max_rows,
        max_cache_bytes=max_cache_bytes,
        join=join,
        adapters=adapters,
    ) as sampler:
        yield sampler


def capable(name: str, needs: Iterable[Capability], say: Callable[[str], None]) -> str:
    """Give `name` where that backend is here with all of `needs`; else say why not, and "engine".

    For whoever answers from a finished run, which another backend than its own can serve as well.
    """
    checks.choice("rollout.backend", name, tuple(BACKENDS))
    lacking = [need for need in needs if need not in BACKENDS[name][0].capabilities]
    if name == "vllm" and find_spec("vllm") is None:
        reason = "is not installed here"
    elif lacking:
        reason = f"has no capability {lacking[0]!r}"
    else:
        return name
    say(f"rollout.backend={name!r}: {reason}; the engine answers")
    return "engine"


def rollout(
    policy: Policy,
    requests: Sequence[Request],
    *,
    max_new_tokens: int,
    temperature: float,  # 0: greedy; log-probabilities are then those at temperature 1
    seed: int,
    rng_key: tuple[int | str, ...] = (),  # what else a row's id is made of: step, task, …
    network: Network | None = None,  # default: the policy; the reference, to sample the base model
    max_rows: int = 0,  # as suits the device
    max_cache_bytes: int = 0,
    backend: str = "engine",
) -> Rollout:
    """Sample every request and return the rows in the order of the requests.

    A row's id is rng_seed(*rng_key, prompt id, w, sample). Raises ValueError as `open_backend` and
    `Backend.generate` do, and for a budget of memory that holds no row.
    """
    sampling = Sampling(max_new_tokens, temperature, seed, rng_key)
    with open_backend(
        backend,
        policy,
        network=network,
        max_rows=max_rows,
        max_cache_bytes=max_cache_bytes,
        join=True,
    ) as sampler:
        return sampler.generate(requests, sampling)


def backend(name: str) -> Callable[..., Rollout]:
    """Give the sampler called `name`, with the signature of `rollout`.

    Raises ValueError for an unknown name, and for vllm where it is not installed.
    """
    checks.choice("rollout.backend", name, tuple(BACKENDS))
    if name == "vllm":
        require_vllm()
    return partial(rollout, backend=name)


def _foreign(policy: Policy, network: Network | None) -> bool:
    """Whether what would be sampled is neither the policy's model nor its reference's."""
    if network is None:
        return policy.adapter is not None  # guided: two passes of one model
    models = (policy.causal_lm, policy.reference_lm)
    return all(model.base_model is not network.body for model in models)
