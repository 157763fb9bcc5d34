"""The check of every policy at load, on models that it must let through and on ones it must not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from meal_fast.config.config import PolicyConfig
from meal_fast.models import loading, shared_prefix
from meal_fast.models.decoder import Decoder
from meal_fast.models.policy import Policy, load_policy
from meal_fast.models.probe import probe
from meal_fast.models.served import Served
from tests.helpers.model_types import NAMES, judge, tokenizer

SMALL = {
    "vocab_size": 288,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def save(folder: Path, model: Any, **words: Any) -> str:
    """Saves a model with large random weights, and a tokenizer of bytes."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.dim() > 1:
            p.data.normal_(0, 0.25, generator=generator)
    model.save_pretrained(folder)
    held = tokenizer()
    for name, value in words.items():
        setattr(held, name, value)
    held.save_pretrained(folder)
    return str(folder)


def load(path: str, tuning: str = "full", dtype: str = "float32") -> Policy:
    return load_policy(PolicyConfig(path=path, tuning=tuning, device="cpu", dtype=dtype), NAMES)


@pytest.mark.parametrize(
    ("kind", "plain"),
    [
        ("llama", False),
        ("qwen3", False),
        ("gpt2", False),
        ("gpt_bigcode", False),
        ("opt", False),
        ("gemma3_text", True),
        ("mixtral", True),
    ],
)
def test_a_model_with_plain_causal_attention_is_right(tmp_path, kind, plain):
    """The sampler and the learner against transformers' own forward, which the probe is not."""
    outcome = judge(kind, tmp_path, plain=plain)
    assert outcome.said == "right", outcome
    assert outcome.apart < 1e-4


@pytest.mark.reliability("silent", "a policy whose attention is more than ours, by type of model")
@pytest.mark.parametrize(
    ("kind", "plain", "why"),
    [
        ("nemotron", False, "computes more than our attention"),  # keyword arguments end in a layer
        ("hrm_text", False, "runs attention in layers"),  # layers that run again
        ("diffllama", False, "runs attention in layers [0, 0, 1, 1]"),  # twice a layer
        ("gpt_oss", True, "computes more"),  # sinks
        ("cohere", False, "computes more"),  # scaled logits
        ("lfm2", False, None),  # full attention in every layer by default
        ("lfm2_moe", False, "layers is not supported"),  # convolutions: a state
        ("mamba", False, "layers is not supported"),
        ("gemma2", True, "capped attention scores"),
        ("gemma3_text", False, "sliding_attention"),
        ("llama4_text", False, "chunked_attention"),
        ("bloom", False, "attention of its own"),  # ALiBi
        ("roberta", False, "computes more"),  # positions that begin at 2
        ("minimax", True, "makes a mask of its own"),
    ],
)
def test_what_our_passes_do_not_compute_is_refused_at_load(tmp_path, kind, plain, why):
    outcome = judge(kind, tmp_path, plain=plain)
    if why is None:
        assert outcome.said == "right", outcome
        return
    assert outcome.said == "refused", outcome
    assert why in outcome.reason
    assert outcome.reason.split()[0] == kind
    assert "use a model with plain causal attention" in outcome.reason


@pytest.mark.reliability("silent", "a policy refused in bfloat16 as in float32")
def test_a_policy_in_half_precision_is_probed_as_closely(tmp_path):
    for kind in ("Nemotron", "Llama"):
        config = getattr(tf, f"{kind}Config")(**SMALL)
        path = save(tmp_path / kind, getattr(tf, f"{kind}ForCausalLM")(config))
        if kind == "Llama":
            policy = load(path, "lora", "bfloat16")
            assert {p.dtype for n, p in policy.causal_lm.named_parameters() if "lora" not in n} == {
                torch.bfloat16
            }
            continue
        with pytest.raises(ValueError, match="nemotron computes more"):
            load(path, "lora", "bfloat16")


FAR: dict[str, tuple[str, dict[str, Any], str]] = {
    "window": ("Mistral", {"sliding_window": 64}, "all tokens before each"),
    "window by layer": (
        "Qwen3",
        {
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 100,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        "all tokens before each",
    ),
    "longrope": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [4.0] * 4,
                "original_max_position_embeddings": 64,
            }
        },
        "computes more than our attention",
    ),
}


@pytest.mark.reliability("silent", "a policy that is another beyond a few tokens")
@pytest.mark.parametrize("case", FAR)
def test_what_a_few_tokens_do_not_show_is_refused(tmp_path, monkeypatch, case):
    """By its configuration; and by the model itself, where the configuration is not looked at."""
    kind, own, why = FAR[case]
    config = getattr(tf, f"{kind}Config")(**SMALL, **own)
    path = save(tmp_path, getattr(tf, f"{kind}ForCausalLM")(config))
    with pytest.raises(ValueError, match="is not supported"):
        load(path)
    monkeypatch.setattr(shared_prefix, "check_supported", lambda config: None)
    with pytest.raises(ValueError, match=why):
        load(path)


def test_a_window_that_the_context_does_not_reach_is_none(tmp_path):
    config = tf.MistralConfig(**SMALL, sliding_window=256)
    assert load(save(tmp_path, tf.MistralForCausalLM(config))).context == 256


@pytest.mark.reliability("silent", "positions that scale queries far into the context")
def test_positions_scaled_far_off_keep_transformers_modules(tmp_path):
    config = tf.Ministral3Config(**SMALL, head_dim=8, sliding_window=None)
    config._attn_implementation = shared_prefix.ATTENTION
    assert not isinstance(Served(tf.Ministral3ForCausalLM(config)).network.body, Decoder)
    config = tf.LlamaConfig(**SMALL, attn_implementation=shared_prefix.ATTENTION)
    assert isinstance(Served(tf.LlamaForCausalLM(config)).network.body, Decoder)


@pytest.mark.reliability("lost", "a context that the model's tables, or its tokenizer, do not hold")
def test_the_context_is_what_model_tables_and_tokenizer_hold(tmp_path):
    config = tf.OPTConfig(
        vocab_size=288, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    path = save(tmp_path / "opt", tf.OPTForCausalLM(config))
    policy = load(path)
    assert policy.context == 64
    policy.context = 4096  # as a configuration might say
    probe(policy, path)
    assert policy.context == 64  # the table has 66, the first two of them for pads
    llama = tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL))
    assert load(save(tmp_path / "llama", llama, model_max_length=48)).context == 48


def test_a_probe_leaves_nothing_behind(tmp_path):
    path = save(tmp_path, tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)))
    for tuning, dtype in (("full", "float32"), ("lora", "bfloat16"), ("bilinear", "float32")):
        policy = load(path, tuning, dtype)
        before = [(n, p.data_ptr(), p.dtype) for n, p in policy.model.named_parameters()]
        modules = list(policy.model.modules())
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules]
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        probe(policy, path)
        assert torch.equal(torch.rand(3), expected)
        after = [(n, p.data_ptr(), p.dtype) for n, p in policy.model.named_parameters()]
        assert after == before
        assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules] == hooks
        config = policy.causal_lm.config
        assert config._attn_implementation == shared_prefix.ATTENTION
        assert policy.network.body.config._attn_implementation == shared_prefix.ATTENTION


@pytest.mark.reliability("silent", "a policy with weights that are not numbers")
def test_weights_that_are_not_numbers_are_refused(tmp_path):
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL))
    path = save(tmp_path, model)
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = torch.nan
    model.save_pretrained(path)
    with pytest.raises(ValueError, match="not finite"):
        load(path)


def test_every_load_is_probed(tmp_path, monkeypatch):
    """Also that of a trained folder, for which alone `load_policy` may be told another one."""
    path = save(tmp_path, tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)))
    probed: list[Policy] = []
    monkeypatch.setattr(loading, "probe", lambda policy, path: probed.append(policy))
    assert load(path) in probed
    settings = PolicyConfig(path=path, tuning="full", device="cpu")
    assert load_policy(settings, NAMES, trained=tmp_path) in probed


@pytest.mark.assets
@pytest.mark.usefixtures("one_thread")
def test_a_probe_of_a_real_model_is_quick(record_property):
    """In seconds of one core, which other processes on the machine do not change much."""
    path = "packaged:smollm2-135m"
    policy = load(path, "lora")
    began = time.process_time()
    probe(policy, path)
    seconds = time.process_time() - began
    record_property("probe of SmolLM2-135M at load", f"{seconds:.2f} core-seconds")
    assert seconds < 1.5
