"""The copy that is sampled from, against transformers' own modules, and the learner's numbers."""

import contextlib
import json
from dataclasses import replace

import pytest
import torch

from meal_fast.config.config import PolicyConfig, from_dict
from meal_fast.config.presets import preset
from meal_fast.config.run_dir import read_config
from meal_fast.data.devices import settled
from meal_fast.data_types import Prompt
from meal_fast.models import shared_prefix
from meal_fast.models.decoder import Decoder
from meal_fast.models.network import Network
from meal_fast.models.policy import load_policy
from meal_fast.models.served import Served
from meal_fast.models.sizes import ON_A_CPU, sizes_of
from meal_fast.rollout import Engine, Request, Sampling, engine, rollout
from meal_fast.training.losses.sequences import packed, token_logp
from meal_fast.training.trainer import Trainer
from tests.helpers import pretend
from tests.helpers.models import MODELS, small_model
from tests.helpers.run_folder import NAMES, tiny_config, tiny_policy

HALF = torch.bfloat16
OURS = {"llama", "qwen2", "qwen3"}
PROMPTS = [Prompt("a", "Write a short word."), Prompt("b", "Hi"), Prompt("c", "Write a list, now!")]
REQUESTS = [Request(p, w, 4) for p in PROMPTS for w in ((0.7, 0.3), (0.0, 1.0))]
OPTIONS = {"max_new_tokens": 8, "temperature": 0.9, "seed": 3}


@torch.no_grad()
def states(body, ids):
    return body(input_ids=ids, use_cache=False).last_hidden_state


def same(got, wanted):
    """Up to the order in which a product is summed; in half precision most are equal to the bit."""
    if got.dtype == HALF:
        assert float((got == wanted).float().mean()) > 0.9
        torch.testing.assert_close(got, wanted, atol=0.05, rtol=0.02)
    else:
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("name", MODELS)
def test_the_copy_computes_what_the_model_does(name, dtype):
    """Norms' weights and biases drawn too, so that leaving one out is seen."""
    model = small_model(name).to(dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    body = Served(model).network.body
    assert isinstance(body, Decoder) == (name in OURS)
    ids = torch.randint(0, 97, (3, 11), generator=generator)
    same(states(body, ids), states(model.base_model, ids))


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_trained_model_is_written_into_the_tensors_that_are_there(name):
    model = small_model(name)
    served = Served(model)
    ids, body = torch.arange(10)[None], served.network.body
    tensors = list(body.parameters()) if name == "gemma" else [t for t, _ in served._parts]
    before, addresses = states(body, ids), [t.data_ptr() for t in tensors]
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5  # other storage, as `Policy.holding` puts there
    same(states(body, ids), before)
    served.write()
    same(states(body, ids), states(model.base_model, ids))
    assert not torch.allclose(states(body, ids), before, atol=1e-2)
    assert [t.data_ptr() for t in tensors] == addresses


def test_factors_are_multiplied_out_in_float32():
    policy = tiny_policy(tiny_config(policy={"dtype": "float32"}))
    served = Served(policy.causal_lm)
    body = served.network.body
    assert isinstance(body, Decoder)
    layer = policy.causal_lm.model.layers[0].mlp.down_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    wanted = layer.base_layer.weight + layer.scaling["default"] * (b @ a)
    assert torch.equal(body.layers[0].down.weight, wanted)
    head = policy.causal_lm.lm_head.weight
    assert served.network.weight.data_ptr() == head.data_ptr(), "what is frozen is not copied"
    ids = torch.tensor([policy.encode_prompt("Hi there")])
    near = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(states(body, ids), states(policy.network.body, ids), **near)
    with policy.reference() as base:
        assert not torch.allclose(states(body, ids), states(base.body, ids), **near)


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 0.3])
def test_in_half_precision_the_copy_follows_a_small_update(size):
    """Factors of any size move its answers as they move the learner's: none is rounded away."""
    policy = tiny_policy(tiny_config(policy={"dtype": "bfloat16"}))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named.items():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(drawn * (size if ".lora_B." in name else 0.3))
    served = Served(policy.causal_lm)
    assert isinstance(served.network.body, Decoder) and served.apart
    down = served.network.body.layers[0].down
    assert (
        down.weight.data_ptr() == policy.causal_lm.model.layers[0].mlp.down_proj.weight.data_ptr()
    )
    ids = torch.tensor([policy.encode_prompt("Hi there, and write a long word.")])
    with policy.reference() as base:
        start = states(base.body, ids).double()
    learner = states(policy.network.body, ids).double() - start
    sampler = states(served.network.body, ids).double() - start
    assert learner.norm() > 0
    follows = float((learner * sampler).sum() / learner.square().sum())
    assert follows == pytest.approx(1, abs=0.02), "merged and rounded it is 0.82 of the smallest"


def test_factors_of_another_rank_find_room_or_a_new_copy():
    policy = tiny_policy(tiny_config(policy={"dtype": "bfloat16"}))
    ids = torch.tensor([policy.encode_prompt("Hi there")])

    def check():
        with policy.merged() as network:
            got = states(network.body, ids)
        torch.testing.assert_close(got, states(policy.network.body, ids), atol=0.06, rtol=0.06)
        return policy._copy

    first = check()
    values = {name: p.detach().clone() for name, p in policy.named.items()}
    half = {n: v[: len(v) // 2] if ".lora_A." in n else v[:, : v.shape[1] // 2]
            for n, v in values.items()}  # fmt: skip
    with policy.holding(half):
        assert check() is first
    assert check() is first
    twice = {n: torch.cat([v, 0.5 * v], 0 if ".lora_A." in n else 1) for n, v in values.items()}
    with policy.holding(twice):
        larger = check()
        assert larger is not first
    assert check() is larger and larger.rank == 2 * first.rank


def test_a_model_that_computes_something_else_under_the_same_names_is_left_to_transformers():
    """Half of what a layer adds to the rng_key: only the numbers tell."""
    model = small_model("llama")
    for layer in model.base_model.layers:
        layer.register_forward_hook(lambda _, args, out: args[0] + 0.5 * (out - args[0]))
    assert not isinstance(Served(model).network.body, Decoder)


def test_half_precision_logits_are_float32_sums():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(5, 64, generator=generator), torch.randn(300, 64)
    bias = torch.randn(300, generator=generator)
    hidden, weight, bias = hidden.to(HALF), weight.to(HALF), bias.to(HALF)
    wanted = hidden.double() @ weight.double().t() + bias.double()
    got = Network(torch.nn.Module(), weight, bias, None).logits(hidden)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    with pretend.device():
        there = Network(torch.nn.Module(), weight.to("cuda"), bias.to("cuda"), 30.0)
        got = there.logits(hidden.to("cuda")).cpu()
    torch.testing.assert_close(got.double(), 30 * (wanted / 30).tanh(), rtol=1e-5, atol=1e-5)


@pytest.fixture
def tf32():
    """Loading a policy may switch it on for the process."""
    before = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("tf32")
def test_what_torch_would_choose_on_a_gpu_is_chosen():
    """The angles of rotary positions are a product in some versions of transformers."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        with pretend.device():
            policy = load_policy(
                PolicyConfig(path="world:tiny", tuning="full", device="cuda"), NAMES
            )
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            assert torch.backends.cuda.matmul.allow_tf32
            rotary, seen = policy.causal_lm.model.rotary_emb, []
            plain = type(rotary).forward

            def watched(*args, **kwargs):
                seen.append(torch.backends.cuda.matmul.allow_tf32)
                return plain(rotary, *args, **kwargs)

            rotary.forward = watched
            with pytest.raises(TypeError):
                rotary()  # what fails leaves the rest as it was, too
            policy.causal_lm(input_ids=torch.tensor([[1, 2]], device="cuda"))
            assert seen == [False, False]
            assert torch.backends.cuda.matmul.allow_tf32
            load_policy(PolicyConfig(path="world:tiny", device="cuda"), NAMES)
            assert not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_behaviour_is_the_learners_before_the_first_update(monkeypatch, tuning, device, dtype):
    """Sampled by the engine, from the copy where there is one, and measured as the learner does.

    On a GPU both kinds of attention multiply with probabilities that they round to bfloat16, each
    in its own order; here both keep them in float32, so that nothing else hides behind that.
    """
    if (tuning, dtype) == ("full", "bfloat16"):
        dtype = "tfloat32"
    monkeypatch.setattr(shared_prefix, "_wide", lambda query: query.dtype == HALF)
    config = tiny_config(policy={"dtype": dtype, "device": device, "tuning": tuning}).policy
    with pretend.device() if device == "cuda" else contextlib.nullcontext():
        policy = load_policy(config, NAMES)
        rolled = rollout(policy, [replace(q, samples=16) for q in REQUESTS], **OPTIONS)
        assert (policy._copy is not None) == (device == "cuda" or dtype == "bfloat16")
        with torch.no_grad():
            logp_M = token_logp(policy.network, rolled, packed(rolled, range(96)), 0.9)
        off_M = ((logp_M - rolled.logp_RT[rolled.mask_RT]).exp() - 1).abs().cpu()
    assert len(off_M) > 500 and float(off_M.max()) > 0, "two ways of computing it"
    if dtype != "bfloat16":
        assert float(off_M.max()) < 2e-5
    else:
        # A sum near the middle of two bfloat16 numbers may be rounded to either, and one such in a
        # state moves a token by up to 3e-3: there are few.
        assert float(off_M.quantile(0.98)) < 1e-3 and float(off_M.max()) < 1e-2
        assert float(off_M.square().mean().sqrt()) < 1e-3


def test_generate_too_draws_from_logits_that_were_not_rounded():
    """Its attention rounds; rounded logits put these log-probabilities off by 0.014, rms."""
    policy = load_policy(tiny_config(policy={"dtype": "bfloat16"}).policy, NAMES)
    forward = policy.causal_lm.lm_head.forward
    rolled = rollout(policy, REQUESTS, **OPTIONS, backend="generate")
    with torch.no_grad():
        logp_M = token_logp(policy.network, rolled, packed(rolled, range(24)), 0.9)
    assert float((logp_M - rolled.logp_RT[rolled.mask_RT]).square().mean().sqrt()) < 6e-3
    assert policy.causal_lm.lm_head.forward == forward


def test_a_copy_is_sampled_from_in_half_precision_and_on_a_gpu_alone():
    """On a CPU in float32 the sums take the weights' place, as ever."""
    policy = tiny_policy(tiny_config(policy={"dtype": "bfloat16"}))
    with policy.merged() as network:
        assert policy.stays(network)
    again = policy._copy
    with policy.merged() as second:
        assert second is network and policy._copy is again
    with policy.stacked([policy.trainable]), policy.merged() as apart:
        assert not policy.stays(apart)
    plain = tiny_policy(tiny_config())
    with plain.merged() as network:
        assert not plain.stays(network) and plain._copy is None


def test_what_is_kept_outlives_an_engine_and_forgets_its_prefixes():
    """Addresses stay, no prefix of the weights before is used, and tokens are a fresh engine's."""
    config = tiny_config(policy={"dtype": "bfloat16"})
    policy, fresh = tiny_policy(config), tiny_policy(config)

    def drawn(of, kept=True):
        with engine(of) as sampler:
            if not kept:
                sampler = Engine(of, sampler.network)
            out = sampler.generate(REQUESTS, Sampling(8, 0.9, 3))
            memory = sampler.memory
            return out, memory, [x.blocks[0].data_ptr() for x in (memory.prompts, memory.tails)]

    first, memory, addresses = drawn(policy)
    with torch.no_grad():
        for mine, other in zip(policy.trainable, fresh.trainable, strict=True):
            mine.mul_(-3.0)
            other.mul_(-3.0)
    second, same, there = drawn(policy)
    wanted, own, _ = drawn(fresh, kept=False)
    assert same is memory and there == addresses and own is not memory
    assert second.texts == wanted.texts != first.texts
    assert torch.equal(second.logp_RT, wanted.logp_RT)
    assert second.prefill_tokens == wanted.prefill_tokens == first.prefill_tokens > 0


def test_sizes_and_dtype_follow_the_device():
    config = tiny_config().policy
    assert config.dtype == "auto" and settled(config).dtype == "float32"
    policy = load_policy(config, NAMES)
    assert policy.sizes == ON_A_CPU and policy.network.weight.dtype == torch.float32
    with pretend.device():
        there = PolicyConfig(path=config.path, device="auto")
        assert settled(there).dtype == "bfloat16"
        assert settled(PolicyConfig(tuning="full", device="cuda")).dtype == "tfloat32"
        assert settled(PolicyConfig(tuning="full", dtype="float32")).dtype == "float32"
        assert settled(config).dtype == "float32"  # device=cpu
        policy = load_policy(there, NAMES)
        assert policy.network.weight.dtype == HALF
        assert {p.dtype for p in policy.trainable} == {torch.float32}
        assert policy.sizes.slots == 512 and policy.sizes.micro_tokens > ON_A_CPU.micro_tokens


def test_a_run_saves_what_auto_was_and_keeps_it(tmp_path):
    """Resumed where `auto` would mean something else, it goes on as it began."""
    small = {"meta": {"steps": 2, "n_inner": 2, "tasks": 1}, "rollout": {"samples": 2}}
    config = from_dict(small, preset("tiny"))
    first = Trainer(config, tmp_path / "run")
    saved = read_config(tmp_path / "run")
    assert (saved.policy.dtype, saved.grpo.micro_tokens) == ("float32", ON_A_CPU.micro_tokens)
    assert first.config == saved
    values = json.loads((tmp_path / "run" / "config.json").read_text())
    values["policy"]["dtype"], values["grpo"]["micro_tokens"] = "bfloat16", 77
    (tmp_path / "run" / "config.json").write_text(json.dumps(values))
    resumed = Trainer(config, tmp_path / "run", resume=True)
    assert resumed.config.grpo.micro_tokens == 77
    assert resumed.policy.network.weight.dtype == HALF
    other = from_dict({"policy": {"dtype": "float32"}}, config)
    with pytest.raises(
        ValueError, match=r"changed config: policy\.dtype \('bfloat16' -> 'float32'"
    ):
        Trainer(other, tmp_path / "run", resume=True)


@pytest.mark.parametrize("free", [1 << 30, 8 << 30, 70 << 30])
def test_more_memory_never_makes_sizes_smaller(monkeypatch, free):
    """And a deeper and wider model gets no more."""
    network = Served(small_model("llama")).network
    with pretend.device():
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, free))
        there = Network(network.body, torch.empty(97, 32).to("cuda"), None, None)
        small = sizes_of(there)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2 * free, 2 * free))
        more = vars(sizes_of(there))
        assert all(vars(small)[name] <= more[name] for name in more)
        monkeypatch.setattr(network.body.config, "num_hidden_layers", 3200)
        monkeypatch.setattr(network.body.config, "intermediate_size", 14336)
        deep = sizes_of(there)
        assert deep.slots == small.slots and deep.micro_tokens <= small.micro_tokens
        assert deep.slots >= 16 and deep.pass_tokens >= 1024 and deep.micro_tokens >= 256
