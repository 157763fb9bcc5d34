"""The backend `vllm`, run: `make test-vllm`, in an environment that has vLLM for CPUs."""

import inspect
import json
import os
import signal
from dataclasses import replace
from typing import get_args

import pytest
import torch

from meal_fast.config.config import from_dict
from meal_fast.data_types import Prompt
from meal_fast.rollout import Request, Sampling, open_backend, rollout
from meal_fast.rollout.backends.vllm import VLLM, from_vllm, vllm_requests
from meal_fast.rollout.backends.vllm_engine import (
    Needs,
    VLLMEngine,
    close_vllm,
    vllm_engine,
    vllm_options,
)
from meal_fast.rollout.sequence import Drawn
from meal_fast.training.losses.sequences import token_logp_RT
from meal_fast.training.trainer import Trainer
from tests.helpers.run_folder import tiny_config, tiny_policy
from tests.helpers.wide_world import wide_world

pytestmark = pytest.mark.vllm

PROMPTS = [Prompt("a", "Write a short word."), Prompt("b", "Hi"), Prompt("c", "Write a list, now!")]
REQUESTS = [Request(p, w, 4) for p in PROMPTS for w in ((0.7, 0.3), (0.0, 1.0))]
SAMPLING = Sampling(8, 0.9, 3, ("test", 4))
CLOSE = 1e-5  # in float32, of a model this small: 2e-6 was measured


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model; an engine of three adapters serves most tests, since opening one takes seconds."""
    folder = wide_world(tmp_path_factory.mktemp("model"))
    vllm_engine(Needs(str(folder), "float32", 4, adapters=3, context=512))
    yield folder
    close_vllm()


def lora(folder, **policy):
    return tiny_policy(tiny_config(policy={"path": str(folder), **policy}))


def full(folder):
    return tiny_policy(tiny_config(policy={"path": str(folder), "tuning": "full"}), scale=0.1)


def gap(policy, rolled, network=None):
    own = token_logp_RT(network or policy.network, rolled, 0.9, micro_tokens=0)
    return float((own - rolled.logp_RT).abs().max())


def drawn(policy, network=None, requests=REQUESTS, sampling=SAMPLING):
    with open_backend("vllm", policy, network=network) as sampler:
        return sampler.generate(requests, sampling)


@torch.no_grad()
def moved(policy, by, seed=5):
    generator = torch.Generator().manual_seed(seed)
    for p in policy.trainable:
        p += by * torch.randn(p.shape, generator=generator)


def test_rows_are_the_policys_draws_and_the_same_again(folder):
    policy = lora(folder)
    rolled = drawn(policy)
    assert rolled.on_policy and len(rolled.texts) == 24 and len(set(rolled.texts)) > 12
    assert gap(policy, rolled) < CLOSE
    assert set(rolled.finish) <= {"stop", "length"} and rolled.lengths == tuple(
        len(row[m]) for row, m in zip(rolled.tokens_RT, rolled.mask_RT, strict=True)
    )
    long = [Request(Prompt("l", " ".join(["Write a short word."] * 9)), (0.7, 0.3), 4)]
    once = drawn(policy, requests=long)  # a prompt's samples share its keys and values
    assert once.reused_tokens == 3 * (len(once.prefix[0]) // 32) * 32 > 0
    assert once.reused_tokens + once.prefill_tokens == 4 * len(once.prefix[0])
    assert gap(policy, once) < CLOSE
    again = drawn(policy)
    assert torch.equal(again.tokens_RT, rolled.tokens_RT)
    other = drawn(policy, sampling=replace(SAMPLING, seed=4))
    assert other.texts != rolled.texts


def test_frequencies_are_the_distributions(folder):
    """4,000 first tokens against the policy's own distribution: Pearson's chi-squared.

    Their prompts are more tokens than go at once, and none may be cut in two.
    """
    policy, n = lora(folder), 4000
    rolled = drawn(
        policy,
        requests=[Request(PROMPTS[0], (0.5, 0.5), n)],
        sampling=replace(SAMPLING, max_new_tokens=1),
    )
    counts = torch.bincount(rolled.tokens_RT[:, 0], minlength=371).double()
    probability = torch.zeros(371, dtype=torch.float64)
    probability[rolled.tokens_RT[:, 0]] = rolled.logp_RT[:, 0].double().exp()
    common = probability * n > 10
    rest = 1 - probability[common].sum()
    seen = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = n * torch.cat([probability[common], rest[None]])
    freedom = len(seen) - 1
    assert freedom > 8
    chi2 = float(((seen - expected) ** 2 / expected).sum())
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


def test_a_push_changes_what_is_drawn_and_the_engine_stays_open(folder):
    policy = lora(folder)
    before = drawn(policy)
    engine = vllm_engine(Needs(str(folder), "float32", 4))
    pushes = engine.version
    moved(policy, 0.1)
    after = drawn(policy)
    assert vllm_engine(Needs(str(folder), "float32", 8)) is engine
    assert engine.version == pushes + 1
    assert gap(policy, after) < CLOSE and gap(policy, before) > 0.01
    assert len(engine.llm.llm_engine.list_loras()) == 1  # the last one alone


def test_the_reference_is_the_base_model_also_after_a_warm_start(folder):
    policy = lora(folder)
    with policy.reference() as base:
        assert gap(policy, drawn(policy, base), base) < CLOSE
    policy.rebase({name: p.detach().clone() for name, p in policy.named.items()})
    moved(policy, 0.1)
    assert gap(policy, drawn(policy)) < CLOSE  # factors of twice the rank
    with policy.reference() as base:
        rolled = drawn(policy, base)
        assert gap(policy, rolled, base) < CLOSE
    assert gap(policy, rolled) > 0.01


def test_tasks_at_once_each_through_its_own_adapter(folder):
    policy = lora(folder)
    generator = torch.Generator().manual_seed(2)
    tasks = [
        [
            torch.randn(p.shape, generator=generator).mul(0.2).requires_grad_()
            for p in policy.trainable
        ]
        for _ in range(3)
    ]
    requests = [replace(q, task_id=t) for t in range(3) for q in REQUESTS]
    with policy.stacked(tasks), open_backend("vllm", policy, adapters=3) as sampler:
        rolled = sampler.generate(requests, SAMPLING)
        assert gap(policy, rolled) < CLOSE
    parts = [rolled.of_task(rows) for rows in rolled.tasks]
    assert len({part.texts for part in parts}) == 3
    with policy.stacked(tasks[::-1]):
        assert gap(policy, rolled) > 0.01


@pytest.mark.parametrize("left", ["the last", "none"])
@pytest.mark.parametrize("by", [0.2, 0.02])
def test_the_canary_notices_a_push_that_did_not_arrive(folder, monkeypatch, left, by):
    """Also where what was learnt is less than what rounding may be: vLLM then shows none of it."""
    policy = lora(folder)
    with torch.no_grad():
        for p in policy.trainable:
            p.mul_(by)
    drawn(policy)
    if left == "the last":
        moved(policy, 0.1)
    monkeypatch.setattr(
        VLLMEngine,
        "push_adapters",
        lambda self, writers: self.adapters if left == "the last" else [],
    )
    said = r"^rollout\.backend='vllm': after push \d+ its log-probabilities of the canary row {};"
    how = "show -?0%" if left == "none" and by < 0.1 else "differ from the learner's|show"
    with pytest.raises(ValueError, match=said.format(f"({how})[^\n]*")):
        drawn(policy)


def test_what_it_refuses(folder):
    policy = lora(folder)
    for requests, options, said in (
        ([], {}, "nothing to sample"),
        ([Request(PROMPTS[0], None, 0)], {}, "samples=0"),
        ([Request(Prompt("e", " "), None)], {}, "prompt e: is empty"),
        (REQUESTS, {"max_new_tokens": 10**6}, "exceed the model's context"),
    ):
        with pytest.raises(ValueError, match=said):
            drawn(policy, requests=requests, sampling=replace(SAMPLING, **options))


def test_an_engine_that_has_ended_is_one_line_and_the_next_opening_begins_anew(folder, monkeypatch):
    """Anew in a process of some launcher's world, whose environment is left as it was."""
    policy = lora(folder)
    with open_backend("vllm", policy) as sampler:
        manager = sampler.engine.llm.llm_engine.engine_core.resources.engine_manager
        os.kill(manager.processes[0].pid, signal.SIGKILL)
        with pytest.raises(
            ValueError,
            match=r"^rollout\.backend='vllm': vLLM does not answer [^\n]*--resume[^\n]*$",
        ):
            sampler.generate(REQUESTS, SAMPLING)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    assert gap(policy, drawn(policy)) < CLOSE
    assert dict(os.environ) == before


def test_a_run_is_resumed_and_comes_to_the_same_end(folder, tmp_path):
    config = tiny_config(
        policy={"path": str(folder)},
        prompts={"train": "world:tiny"},
        rollout={"backend": "vllm", "prompts": 2, "samples": 4},
        meta={"steps": 2, "tasks": 1, "n_inner": 2},
        grpo={"lr": 0.01},
        threads=1,
        checkpoint_every=1,
    )
    one, two = tmp_path / "one", tmp_path / "two"
    Trainer(config, one).train()
    first = Trainer(config, two)
    first.stop_requested = True
    assert not first.train()
    assert Trainer(config, two, resume=True).train()
    ends = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in (one, two)]
    assert ends[0]["rewards"] == ends[1]["rewards"] and ends[0]["update"] == 3


@pytest.mark.parametrize(
    "changes",
    [{"meta": {"parallel": False}}, {"meta": {"parallel": True}}, {"policy": {"tuning": "full"}}],
    ids=["LoRA", "tasks at once", "all parameters"],
)
def test_a_whole_run(folder, tmp_path, changes):
    base = tiny_config(
        policy={"path": str(folder)},
        prompts={"train": "world:tiny"},
        rollout={"backend": "vllm", "prompts": 2, "samples": 4},
        meta={"steps": 2, "tasks": 2, "n_inner": 2},
        grpo={"lr": 0.01 if "policy" not in changes else 0.001},
        threads=1,
    )
    run = tmp_path / "run"
    assert Trainer(from_dict(changes, base), run).train()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    for line in lines:
        assert 0 < line["logp_gap"] < CLOSE and abs(line["importance"] - 1) < CLOSE
        assert line["importance_capped"] == 0 and line["seconds"]["rollout"] > 0
    assert any(line["grad_norm"] > 0 for line in lines)
    assert (run / "policy" / "model.safetensors").is_file()


def test_all_parameters_are_pushed_in_place(folder):
    policy = full(folder)
    for _ in range(2):
        moved(policy, 0.02)
        assert gap(policy, drawn(policy)) < CLOSE
    with policy.reference() as base:
        rolled = drawn(policy, base)
        assert gap(policy, rolled, base) < CLOSE
    assert gap(policy, rolled) > 0.01
    assert gap(policy, drawn(policy)) < CLOSE


def test_the_canary_notices_old_weights_and_old_keys_and_values(folder, monkeypatch):
    policy = full(folder)
    drawn(policy)
    moved(policy, 0.1)
    with monkeypatch.context() as patched:
        patched.setattr(VLLMEngine, "push_weights", lambda self, model: None)
        with pytest.raises(ValueError, match="canary row differ from the learner's"):
            drawn(policy)
    monkeypatch.setattr(VLLM, "salt", lambda self, task: "always the same")
    drawn(policy)
    moved(policy, 0.1)
    with pytest.raises(ValueError, match="canary row differ from the learner's"):
        drawn(policy)


def test_bfloat16(folder):
    policy = lora(folder, dtype="bfloat16")
    rolled = drawn(policy)
    assert 1e-4 < gap(policy, rolled) < 0.1


def test_a_model_that_vllm_has_no_attention_for_is_refused_before_it_is_opened(monkeypatch):
    monkeypatch.setattr(VLLMEngine, "__init__", lambda self, needs: pytest.fail("opened"))
    policy = tiny_policy(tiny_config())
    with pytest.raises(ValueError, match=r"rollout\.backend='vllm': heads of 8 numbers, .*32, 64"):
        rollout(policy, REQUESTS, max_new_tokens=2, temperature=1.0, seed=0, backend="vllm")


def test_vllm_takes_our_requests():
    sampling = Sampling(7, 0.9, 3)
    prompts, settings = vllm_requests(
        [(1, 2), (3,)], [11, 12], frozenset({9, 5}), sampling, ["a", "b"]
    )
    assert [p["prompt_token_ids"] for p in prompts] == [[1, 2], [3]]
    assert [p["cache_salt"] for p in prompts] == ["a", "b"]
    first, second = settings
    assert first.n == 1 and first.max_tokens == 7 and first.temperature == 0.9
    assert first.seed != second.seed and 0 <= first.seed < 1 << 63
    assert (first.top_k, first.top_p, first.min_p, first.logprobs) == (0, 1.0, 0.0, 0)
    assert first.stop_token_ids == [5, 9] and first.ignore_eos and not first.detokenize
    again = vllm_requests([(1, 2)], [11], frozenset({9, 5}), sampling, ["c"])[1][0]
    assert again.seed == first.seed
    greedy = replace(sampling, temperature=0.0)
    assert vllm_requests([(1,)], [1], frozenset(), greedy, [""])[1][0].temperature == 0


@pytest.mark.parametrize("cpu", [True, False])
@pytest.mark.parametrize("rank", [0, 1, 16, 17, 64, 200])
def test_vllm_takes_our_options(tmp_path, rank, cpu):
    from vllm import LLM
    from vllm.config.lora import MaxLoRARanks
    from vllm.engine.arg_utils import EngineArgs

    made = EngineArgs(**vllm_options(Needs(str(tmp_path), "bfloat16", rank, 3), cpu=cpu))
    assert made.enable_lora == (rank > 0) and made.max_loras == (3 if rank else 1)
    assert rank <= made.max_lora_rank and made.max_lora_rank in get_args(MaxLoRARanks)
    assert made.logprobs_mode == "processed_logprobs" and made.model == str(tmp_path)
    assert {"model", "dtype", "skip_tokenizer_init"} <= set(inspect.signature(LLM).parameters)


def test_vllms_outputs_are_read():
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput, RequestOutput

    def output(finish):
        logprobs = [{4: Logprob(-0.5, 1)}, {2: Logprob(-0.1, 1), 9: Logprob(-2.5, 7)}]
        completion = CompletionOutput(0, "", [4, 9], None, logprobs, finish_reason=finish)
        return RequestOutput("7", None, [1, 2], None, [completion], True)

    assert from_vllm(output("stop")) == Drawn([4, 9], [-0.5, -2.5], "stop")
    assert from_vllm(output("length")).finish == "length"
    with pytest.raises(ValueError, match="vllm request 7: ended by 'abort'"):
        from_vllm(output("abort"))
