"""Other samplers against the engine, and vLLM's own types where it is installed."""

import itertools
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import get_args, get_type_hints

import pytest
import torch

from meal_fast.config.config import RejectionConfig, RolloutConfig, from_dict
from meal_fast.data_types import Prompt
from meal_fast.rollout import Request, Sampling, backend, open_backend, rejection_sample, rollout
from meal_fast.rollout.backends import BACKENDS, capable
from meal_fast.training.recipes import recipe_of
from tests.helpers.run_folder import tiny_config, tiny_policy

PROMPTS = [Prompt("a", "Write a short word."), Prompt("b", "Hi"), Prompt("c", "Write a list, now!")]
W = (0.7, 0.3)
REQUESTS = [Request(p, w, 2) for p in PROMPTS for w in (W, (0.0, 1.0))]
REQUESTS.append(Request(PROMPTS[1], None))
OPTIONS = {"max_new_tokens": 8, "temperature": 0.9, "seed": 3, "rng_key": ("test", 4)}
generate_rollout = backend("generate")
vllm_rollout = partial(rollout, backend="vllm")


@pytest.fixture(scope="module")
def policy():
    return tiny_policy(tiny_config())


def assert_same(ours, theirs):
    assert theirs.texts == ours.texts and theirs.finish == ours.finish
    for name in ("group_R", "condition_RK", "tokens_RT", "mask_RT"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert mine.dtype == other.dtype and torch.equal(mine, other), name
    assert theirs.prompts == ours.prompts and theirs.prefix == ours.prefix
    assert theirs.logp_RT.dtype == torch.float32
    torch.testing.assert_close(theirs.logp_RT, ours.logp_RT, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("max_rows", [64, 5])
def test_generate_draws_the_engines_tokens(policy, temperature, max_rows):
    options = OPTIONS | {"temperature": temperature}
    ours = rollout(policy, REQUESTS, **options)
    theirs = generate_rollout(policy, REQUESTS, **options, max_rows=max_rows)
    assert_same(ours, theirs)
    assert theirs.prefill_tokens == sum(len(theirs.prefix[g]) for g in theirs.group_R.tolist())
    assert theirs.prefill_tokens > ours.prefill_tokens


def test_generate_stops_where_the_engine_stops(policy, monkeypatch):
    drawn = rollout(policy, REQUESTS, **OPTIONS).tokens_RT
    stops = frozenset(torch.bincount(drawn.ravel()).topk(2).indices.tolist())
    monkeypatch.setattr(type(policy), "stop_ids", stops)
    ours = rollout(policy, REQUESTS, **OPTIONS)
    lengths = ours.mask_RT.sum(1)
    assert {"stop", "length"} == set(ours.finish) and len(set(lengths.tolist())) > 2
    assert_same(ours, generate_rollout(policy, REQUESTS, **OPTIONS))
    short = [q for i, q in enumerate(REQUESTS) if i != 3]
    assert_same(
        rollout(policy, short, **OPTIONS), generate_rollout(policy, short, **OPTIONS, max_rows=3)
    )


def test_generate_samples_the_reference_too_and_the_adapters_matter(policy):
    trained = generate_rollout(policy, REQUESTS, **OPTIONS)
    with policy.reference() as base:
        ours = rollout(policy, REQUESTS, **OPTIONS, network=base)
        assert_same(ours, generate_rollout(policy, REQUESTS, **OPTIONS, network=base))
    assert trained.texts != ours.texts


def test_generate_samples_a_policy_of_all_parameters_and_its_frozen_copy():
    policy = tiny_policy(tiny_config(policy={"tuning": "full"}), scale=0.05)
    trained = rollout(policy, REQUESTS[:3], **OPTIONS)
    assert_same(trained, generate_rollout(policy, REQUESTS[:3], **OPTIONS))
    with policy.reference() as base:
        ours = rollout(policy, REQUESTS[:3], **OPTIONS, network=base)
        assert_same(ours, generate_rollout(policy, REQUESTS[:3], **OPTIONS, network=base))
    assert trained.texts != ours.texts


def test_generate_leaves_the_model_as_it_found_it(policy):
    """Its attention is the engine's own; the sampling options a model comes with have no say."""
    base = policy.model.get_base_model()
    before = base.config._attn_implementation
    plain = generate_rollout(policy, REQUESTS[:2], **OPTIONS)
    kept = base.generation_config
    kept.repetition_penalty, kept.min_new_tokens = 5.0, 9
    try:
        assert_same(plain, generate_rollout(policy, REQUESTS[:2], **OPTIONS))
        assert base.generation_config is kept
    finally:
        kept.repetition_penalty, kept.min_new_tokens = None, None
    with pytest.raises(ValueError, match="temperature"):
        generate_rollout(policy, REQUESTS[:2], **OPTIONS | {"temperature": -1.0})
    assert base.config._attn_implementation == before and base.generation_config is kept
    assert_same(rollout(policy, REQUESTS[:2], **OPTIONS), plain)


def test_what_it_refuses(policy):
    sampler = generate_rollout
    with pytest.raises(ValueError, match="nothing to sample"):
        sampler(policy, [], **OPTIONS)
    with pytest.raises(ValueError, match="samples=0"):
        sampler(policy, [Request(PROMPTS[0], W, 0)], **OPTIONS)
    with pytest.raises(ValueError, match="prompt e: is empty"):
        sampler(policy, [Request(Prompt("e", " "), W)], **OPTIONS)
    with pytest.raises(ValueError, match="exceed the model's context"):
        sampler(policy, REQUESTS, **OPTIONS | {"max_new_tokens": 10**6})
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        sampler(policy, REQUESTS, **OPTIONS | {"max_new_tokens": 0})


def test_generate_refuses_a_network_that_is_not_the_policys(policy):
    other = tiny_policy(tiny_config())
    with pytest.raises(
        ValueError, match=r"rollout\.backend='generate': has no capability 'any-network'"
    ):
        generate_rollout(policy, REQUESTS, **OPTIONS, network=other.network)


def test_a_backend_by_its_name():
    assert (
        set(BACKENDS) == set(get_args(get_type_hints(RolloutConfig)["backend"]))
        and RolloutConfig().backend == "engine"
    )
    with pytest.raises(ValueError, match=r"rollout\.backend='tgi': choose from engine, generate"):
        backend("tgi")
    with pytest.raises(ValueError, match=r"rollout\.backend='tgi': choose from engine, generate"):
        from_dict({"rollout": {"backend": "tgi"}})


@pytest.mark.parametrize(("backend", "recipe"), [*itertools.product(BACKENDS, ("meal", "reptile"))])
def test_what_the_options_rules_refuse_is_what_a_backend_lacks(backend, recipe):
    """The rules of a configuration know no backend: here it is seen that they agree."""
    flat = {"recipe": "meal", "rollout": {"backend": backend}}
    need = "rejection"
    if recipe == "reptile":
        flat = {"recipe": "weighted-meta-grpo", "rollout": {"backend": backend},
                "meta": {"parallel": True}}  # fmt: skip
        need = "adapters"
    if need in BACKENDS[backend][0].capabilities:
        from_dict(flat)
    else:
        with pytest.raises(ValueError, match=f"{backend!r}|engine"):
            from_dict(flat)


def test_a_missing_capability_is_one_line_with_the_backend_and_the_remedy(policy):
    said = r"^rollout\.backend='generate': has no capability '{}' \([^\n]*\); "
    said += r"use rollout\.backend=engine$"
    with (
        pytest.raises(ValueError, match=said.format("rejection")),
        open_backend("generate", policy, needs=("rejection",)),
    ):
        pass
    sampling = Sampling(2, 1.0, 0)
    with open_backend("generate", policy) as sampler:
        with pytest.raises(ValueError, match=said.format("rejection")):
            rejection_sample(sampler, REQUESTS, sampling, RejectionConfig(), None, None)
        with pytest.raises(ValueError, match=said.format("adapters")):
            sampler.generate([replace(REQUESTS[0], task_id=1)], sampling)


def test_who_can_do_without_asks_the_engine_and_says_so():
    said = []
    assert capable("generate", (), said.append) == "generate" and not said
    assert capable("engine", ("any-network",), said.append) == "engine" and not said
    assert capable("generate", ("any-network",), said.append) == "engine"
    assert said == [
        "rollout.backend='generate': has no capability 'any-network'; the engine answers"
    ]


@pytest.mark.parametrize(
    "option", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}, {"stop": (" ", "e")}]
)
def test_generate_truncates_and_stops_as_the_engine_does(policy, option):
    drawn = []
    for name in ("engine", "generate"):
        with open_backend(name, policy) as sampler:
            counts = []
            drawn.append(sampler.generate(REQUESTS, Sampling(8, 0.9, 3, **option), counts.append))
            assert counts[-1] == len(drawn[-1].texts)
    assert_same(*drawn)
    assert drawn[0].on_policy == drawn[1].on_policy == ("stop" in option)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_is_asked_for_by_the_name_of_its_extra(policy):
    with pytest.raises(ValueError, match=r"rollout\.backend='vllm': .*meal-fast\[vllm\]"):
        backend("vllm")
    with pytest.raises(ValueError, match=r"rollout\.backend='vllm': .*meal-fast\[vllm\]"):
        vllm_rollout(policy, REQUESTS, **OPTIONS)
    config = tiny_config(rollout={"backend": "vllm"})
    with pytest.raises(ValueError, match=r"rollout\.backend='vllm': .*meal-fast\[vllm\]"):
        recipe_of(config).collector.check(config)  # before a run loads anything


def test_vllm_is_given_no_model_that_lies_in_parts():
    with pytest.raises(ValueError, match=r"mesh\.shard=2: .* use rollout\.backend=engine"):
        from_dict({"rollout": {"backend": "vllm"}, "mesh": {"shard": 2}})
