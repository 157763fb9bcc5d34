"""The packed forward against plain forwards, on real model classes of transformers."""

import pytest
import torch
import transformers as tf

from meal_fast.config.config import PolicyConfig
from meal_fast.data.toy import build_world
from meal_fast.models import shared_prefix
from meal_fast.models.policy import load_policy
from tests.helpers.models import MODELS, SMALL, small_model

PREFIXES = [[5, 6, 7], [8, 9, 10, 11, 12], [3]]


@pytest.fixture(params=MODELS)
def body(request):
    return small_model(request.param).base_model


def plain(body, tokens):
    return body(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state[0]


@pytest.mark.parametrize(
    "config",
    [
        tf.MistralConfig(**SMALL, sliding_window=8),
        tf.Gemma2Config(**SMALL, head_dim=8),
        tf.Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1),
        tf.LlamaConfig(**SMALL, rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
        tf.DeepseekV3Config(),
    ],
    ids=["mistral", "gemma2", "qwen2-sliding", "llama-dynamic", "deepseek"],
)
def test_models_with_other_attention_are_refused_by_name(config):
    with pytest.raises(ValueError, match="not supported"):
        shared_prefix.check_supported(config)


@pytest.mark.parametrize("kind", ["Bloom", "CodeGen", "Mpt", "Falcon", "GPTNeo"])
def test_models_that_compute_attention_themselves_are_refused(kind, tmp_path):
    """ALiBi's bias or a cache of their own would be lost without a word."""
    sizes = {"vocab_size": 97, "hidden_size": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    if kind == "GPTNeo":
        sizes = {"vocab_size": 97, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
        sizes["attention_types"] = [[["global"], 2]]
    if kind == "Mpt":
        sizes = {"vocab_size": 97, "d_model": 32, "n_layers": 2, "n_heads": 4}
    if kind == "Falcon":
        sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}
        sizes["num_attention_heads"] = 4
    if kind == "CodeGen":
        sizes["rotary_dim"] = 4
    config = getattr(tf, f"{kind}Config")(**sizes)
    getattr(tf, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path)
    tf.AutoTokenizer.from_pretrained(build_world("tiny")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="attention of its own"):
        load_policy(PolicyConfig(path=str(tmp_path), device="cpu"), ("a", "b"))


def uneven_rows():
    group_R = torch.tensor([0, 0, 1, 2, 2])
    tokens = torch.randint(0, 97, (5, 5))
    mask = torch.arange(5) < torch.tensor([5, 2, 1, 4, 3])[:, None]
    return group_R, tokens, mask


def test_a_packed_pass_equals_plain_forwards_with_gradients(body):
    """What predicts every token of uneven rows, one of them a single token long."""
    group_R, tokens, mask = uneven_rows()
    packed = shared_prefix.pack(PREFIXES, group_R.tolist(), mask.sum(1).tolist(), tokens)
    assert packed.tokens_1N.shape[1] == sum(map(len, PREFIXES)) + int(mask.sum()) - 5
    hidden = packed.predicting(shared_prefix.forward(body, packed))
    probe = torch.randn_like(hidden)
    (hidden * probe).sum().backward()
    got = {n: p.grad.clone() for n, p in body.named_parameters() if p.grad is not None}
    body.zero_grad()
    start = 0
    for r, g in enumerate(group_R.tolist()):
        n = int(mask[r].sum())
        want = plain(body, PREFIXES[g] + tokens[r, :n].tolist())[-n - 1 : -1]
        torch.testing.assert_close(hidden[start : start + n], want, atol=1e-5, rtol=1e-4)
        (want * probe[start : start + n]).sum().backward()
        start += n
    assert got
    for name, parameter in body.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad, atol=1e-4, rtol=1e-3)


def test_a_packed_pass_of_single_tokens_is_its_prefixes_alone(body):
    packed = shared_prefix.pack(PREFIXES[:2], (0, 1), (1, 1), torch.tensor([[4], [9]]))
    hidden = packed.predicting(shared_prefix.forward(body, packed))
    for got, prefix in zip(hidden, PREFIXES, strict=False):
        torch.testing.assert_close(got, plain(body, prefix)[-1], atol=1e-5, rtol=1e-4)
