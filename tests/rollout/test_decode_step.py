"""What a decode step costs on a pretended CUDA device, and the graphs that outlive a rollout."""

import sys
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from meal_fast.config.config import PolicyConfig
from meal_fast.data_types import Prompt
from meal_fast.models.policy import load_policy, resolve
from meal_fast.rollout import Engine, Request, Sampling, engine
from meal_fast.rollout.cuda_graph import USES, bucket
from tests.helpers import pretend
from tests.helpers.run_folder import NAMES, tiny_config, tiny_policy
from tests.rollout.test_engine import LLAMA, requests_of
from tests.rollout.test_engine import engine as plain_engine

LAYER = {"float32": 20, "bfloat16": 28}  # launches of a layer in a captured step
OUTSIDE = 5  # of a step outside its graph: the graph's own among them
PROMPTS = [Prompt("a", "Write a short word."), Prompt("b", "Hi")]
REQUESTS = [Request(p, w, 5) for p in PROMPTS for w in ((0.7, 0.3), (0.0, 1.0))]
ASKED = Sampling(8, 0.9, 3)


def on_cuda(**changes):
    """A policy on the pretended device, its factors drawn."""
    return tiny_policy(tiny_config(policy={"device": "cuda"} | changes))


def of_depth(layers, folder):
    """The tiny world's model with so many layers."""
    path = resolve("world:tiny")
    config = AutoModelForCausalLM.from_pretrained(path).config
    config.num_hidden_layers, config.layer_types = layers, None
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_launches_and_waits_of_a_step(tmp_path, dtype):
    """Of steps in which no row comes or goes; a layer's are what two more layers add."""
    captured = {}
    for layers in (1, 3):
        path = of_depth(layers, tmp_path / str(layers))
        with pretend.device() as cuda:
            policy = load_policy(PolicyConfig(path=path, device="cuda", dtype=dtype), NAMES)
            policy.tokenizer.eos_token_id = policy.causal_lm.generation_config.eos_token_id = None
            with engine(policy) as sampler:
                rows = sampler.rows(REQUESTS, 8)
                for step, _ in enumerate(sampler.draw(rows, ASKED)):
                    if USES < step < 7:
                        assert sum(cuda.syncs.values()) == 1, cuda.syncs
                        assert sum(cuda.launches.values()) <= OUTSIDE, cuda.launches
                    cuda.reset()
            assert step == 7
            (graph,) = cuda.graphs
            captured[layers] = sum(graph.launches.values())
    assert captured[3] - captured[1] <= 2 * LAYER[dtype]
    assert captured[1] <= LAYER[dtype] + 16, "embedding, rotary angles, the last norm"


@torch.no_grad()
def scale(policy, factor):
    for parameter in policy.trainable:
        parameter.mul_(factor)


def drawn(sampler, cuda):
    """The tokens of every row, and how many graphs there were after each step."""
    rows, graphs = sampler.rows(REQUESTS, 8), []
    for _ in sampler.draw(rows, ASKED):
        graphs.append(len(cuda.graphs))
    return [row.tokens for row in rows], graphs


def test_a_step_is_captured_at_its_third_use_and_lives_on():
    """Rollouts before and after two updates: the same graphs, and a fresh policy's tokens."""
    with pretend.device() as cuda:
        policy, told = on_cuda(), []
        for update in range(3):
            before = len(cuda.graphs)
            with engine(policy) as sampler:
                tokens, graphs = drawn(sampler, cuda)
                memory = sampler.memory
                told.append([x.blocks[0].data_ptr() for x in (memory.prompts, memory.tails)])
            if update == 0:  # the first tokens come of the prompts' pass: no step
                assert graphs[: USES + 1] == [0] * USES + [1]
            else:
                assert graphs[-1] == before, "captured anew"
            fresh = on_cuda()
            scale(fresh, (-2.0) ** update)
            with engine(fresh) as sampler:
                assert drawn(sampler, cuda)[0] == tokens
            scale(policy, -2.0)
        assert told[0] == told[1] == told[2]
    assert {bucket(n, 20) for n in range(1, 21)} == {16, 20} and bucket(5, 3) == 3


def test_memory_that_grows_is_captured_anew():
    """Longer prompts than there is room for: what was captured is of other addresses."""
    long = Prompt("long", " ".join(["Say more about a long word, please."] * 8))
    asked = [*REQUESTS, Request(long, (0.5, 0.5), 6)]
    with pretend.device() as cuda:
        policy, fresh = on_cuda(dtype="float32"), on_cuda(dtype="float32")
        with engine(policy) as sampler:
            sampler.generate(REQUESTS, ASKED)
            steps, graphs = sampler.memory.steps, len(cuda.graphs)
        assert graphs >= 1
        with engine(policy) as sampler:
            got = sampler.generate(asked, ASKED)
            assert sampler.memory.steps is not steps and len(cuda.graphs) > graphs
        wanted = Engine(fresh, fresh.network).generate(
            [*REQUESTS, Request(long, (0.5, 0.5), 6)], ASKED
        )
        assert got.texts == wanted.texts


def test_an_engine_takes_up_what_is_kept_with_fewer_slots_and_less_memory():
    with pretend.device():
        policy = on_cuda(dtype="float32")
        with engine(policy) as sampler:
            wanted, memory = sampler.generate(REQUESTS, ASKED), sampler.memory
        with engine(policy, max_rows=3) as sampler:
            most = 0
            rows = sampler.rows(REQUESTS, 8)
            for _ in sampler.draw(rows, ASKED):
                most = max(most, len(sampler.live))
            assert sampler.memory is memory and most == 3
        assert tuple(map(policy.decode, (row.tokens for row in rows))) == wanted.texts
        with engine(policy, max_cache_bytes=1 << 20) as sampler:
            assert sampler.memory is not memory and sampler.memory.max_bytes == 1 << 20
            assert sampler.generate(REQUESTS, ASKED).texts == wanted.texts


def test_the_copy_leaves_less_memory_for_keys_and_values(monkeypatch):
    """What is free is asked for when the copy is there."""
    with pretend.device():
        policy = on_cuda()
        free = {None: 10 << 20}
        monkeypatch.setattr(
            torch.cuda, "mem_get_info", lambda *_: (free[None] - (policy._copy is not None), 0)
        )
        with engine(policy) as sampler:
            assert sampler.memory.max_bytes == (free[None] - 1) // 2


def test_a_row_is_hashed_once_and_again_when_it_was_cut(monkeypatch):
    module, hashed = sys.modules["meal_fast.rollout.model_runner"], Counter()
    real = module.row_id

    def counted(rng_key, request, sample, attempt=0):
        hashed[request.prompt.id, request.w, sample, attempt] += 1
        return real(rng_key, request, sample, attempt)

    monkeypatch.setattr(module, "row_id", counted)
    sampler = plain_engine(LLAMA, max_rows=7)
    rows = sampler.rows(requests_of([3, 8, 5], [(0.0, 1.0), (0.7, 0.3)], samples=3), 6)
    for step, _ in enumerate(sampler.draw(rows, Sampling(6, 0.9, 1))):
        if step == 2:
            cut = sampler.live[0]
            sampler.cut(cut, 1)
    assert set(hashed.values()) == {1} and len(hashed) == len(rows) + 1
    assert (cut.request.prompt.id, cut.request.w, cut.sample, 1) in hashed


def test_prefixes_and_moves_are_few_launches():
    """Slots of all layers are copied at once: what a row costs that comes or goes."""
    with pretend.device() as cuda:
        policy = on_cuda()
        with engine(policy, join=False) as sampler:
            sampler.generate(REQUESTS, ASKED)
            tails, suffixes = sampler.memory.tails, sampler.memory.suffixes
            cuda.reset()
            tails.move([3, 4], [0, 1], 5)
            moved = sum(cuda.launches.values())
            tails.begin([0, 1], suffixes, [0, 1])
            assert moved <= 4 and sum(cuda.launches.values()) <= 2 * moved


def test_kernels_interpreted_draw_what_torch_draws(interpreter):
    """Tails and prompts to their full room, rows that are not there, a replayed graph.

    In float32: the interpreter multiplies bfloat16 as the integers that hold it.
    """
    drawn = {}
    asked = [Request(p, (0.7, 0.3), 1) for p in PROMPTS]
    for kernels in ("torch", "interpreted"):
        with pretend.device(kernels) as cuda:
            with engine(on_cuda(dtype="float32")) as sampler:
                drawn[kernels] = sampler.generate(asked, Sampling(5, 0.9, 3))
            assert len(cuda.graphs) == 1
    one, other = drawn["torch"], drawn["interpreted"]
    assert one.texts == other.texts
    torch.testing.assert_close(one.logp_RT.cpu(), other.logp_RT.cpu(), atol=1e-4, rtol=0)
