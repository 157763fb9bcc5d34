"""The shared-prefix forward against plain forwards, on real model classes of transformers."""

import pytest
import torch
import transformers as tf

from meal_fast import tree

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {
    "llama": lambda: (tf.LlamaForCausalLM, tf.LlamaConfig(**SMALL)),
    "qwen2": lambda: (tf.Qwen2ForCausalLM, tf.Qwen2Config(**SMALL)),
    "qwen3": lambda: (tf.Qwen3ForCausalLM, tf.Qwen3Config(**SMALL, head_dim=8)),
    "gemma": lambda: (tf.GemmaForCausalLM, tf.GemmaConfig(**SMALL, head_dim=8)),
    "gpt2": lambda: (
        tf.GPT2LMHeadModel,
        tf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4),
    ),
}
PREFIXES = [[5, 6, 7], [8, 9, 10, 11, 12], [3]]


@pytest.fixture(params=MODELS)
def body(request):
    torch.manual_seed(0)
    kind, config = MODELS[request.param]()
    config._attn_implementation = tree.ATTENTION
    tree.check_supported(config)
    return kind(config).eval().base_model


def plain(body, tokens):
    return body(input_ids=torch.tensor([tokens]), use_cache=False).last_hidden_state[0]


def test_prefill_equals_plain_forwards(body):
    _, last_BD = tree.prefill(body, PREFIXES)
    for prefix, last in zip(PREFIXES, last_BD, strict=True):
        torch.testing.assert_close(last, plain(body, prefix)[-1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("groups", [[0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2], [1, 1, 2]])
def test_rows_equal_plain_forwards_in_one_pass_and_token_by_token(body, groups):
    prefixes, _ = tree.prefill(body, PREFIXES)
    group_R = torch.tensor(groups)
    tail = torch.randint(0, 97, (len(groups), 4))
    once = tree.extend(body, prefixes.rows(group_R), tail)
    kept = prefixes.rows(group_R, keep=True, capacity=4)
    with torch.no_grad():  # one token a row, without a gradient: the op for decoding
        stepwise = torch.cat([tree.extend(body, kept, tail[:, i : i + 1]) for i in range(4)], 1)
    for r, g in enumerate(groups):
        want = plain(body, PREFIXES[g] + tail[r].tolist())[-4:]
        torch.testing.assert_close(once[r], want, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(stepwise[r], want, atol=1e-5, rtol=1e-4)


def test_dropping_finished_rows_changes_no_other_row(body):
    prefixes, _ = tree.prefill(body, PREFIXES)
    groups = [0, 0, 1, 1, 2, 2]
    tail = torch.randint(0, 97, (6, 3))
    rows = prefixes.rows(torch.tensor(groups), keep=True, capacity=3)
    tree.extend(body, rows, tail[:, :1])
    going = torch.tensor([1, 2, 3])  # the third prefix loses all its rows
    rows.select(going)
    tree.extend(body, rows, tail[going, 1:2])
    last = tree.extend(body, rows, tail[going, 2:3])[:, 0]
    for i, r in enumerate(going.tolist()):
        want = plain(body, PREFIXES[groups[r]] + tail[r].tolist())[-1]
        torch.testing.assert_close(last[i], want, atol=1e-5, rtol=1e-4)


def test_prefixes_grow_by_suffixes_of_different_lengths(body):
    prefixes, _ = tree.prefill(body, PREFIXES[:2])
    suffixes = [[20, 21], [22], [23, 24, 25]]
    owner = [0, 0, 1]
    tokens, valid = tree.pad(suffixes, torch.device("cpu"))
    rows = prefixes.rows(torch.tensor(owner), keep=True, capacity=tokens.shape[1])
    tree.extend(body, rows, tokens)
    grown = prefixes.grown(rows, valid)
    tail = torch.randint(0, 97, (3, 2))
    hidden = tree.extend(body, grown.rows(torch.arange(3)), tail)
    for r in range(3):
        want = plain(body, PREFIXES[owner[r]] + suffixes[r] + tail[r].tolist())[-2:]
        torch.testing.assert_close(hidden[r], want, atol=1e-5, rtol=1e-4)


def test_gradients_flow_through_the_shared_prefix(body):
    """Same gradient as forwards that compute each row's prefix for itself."""
    groups = [0, 0, 1]
    tail = torch.randint(0, 97, (3, 4))
    prefixes, _ = tree.prefill(body, PREFIXES)
    hidden = tree.extend(body, prefixes.rows(torch.tensor(groups)), tail)
    probe = torch.randn_like(hidden)
    (hidden * probe).sum().backward()
    shared = {n: p.grad.clone() for n, p in body.named_parameters() if p.grad is not None}
    body.zero_grad()
    for r, g in enumerate(groups):
        (plain(body, PREFIXES[g] + tail[r].tolist())[-4:] * probe[r]).sum().backward()
    assert shared
    for name, parameter in body.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(shared[name], parameter.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "config",
    [
        tf.MistralConfig(**SMALL, sliding_window=8),
        tf.Gemma2Config(**SMALL, head_dim=8),
        tf.Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ],
    ids=["mistral", "gemma2", "qwen2-sliding"],
)
def test_models_with_other_attention_are_refused_by_name(config):
    with pytest.raises(ValueError, match="not supported"):
        tree.check_supported(config)


def uneven_rows():
    group_R = torch.tensor([0, 0, 1, 2, 2])
    tokens = torch.randint(0, 97, (5, 5))
    mask = torch.arange(5) < torch.tensor([5, 2, 1, 4, 3])[:, None]
    return group_R, tokens, mask


def test_a_packed_pass_equals_plain_forwards_with_gradients(body):
    """What predicts every token of uneven rows, one of them a single token long."""
    group_R, tokens, mask = uneven_rows()
    packed = tree.pack(PREFIXES, group_R, tokens, mask)
    assert packed.tokens_1N.shape[1] == sum(map(len, PREFIXES)) + int(mask.sum()) - 5
    hidden = tree.forward(body, packed)[packed.before_RT[mask]]
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
    tokens, mask = torch.tensor([[4], [9]]), torch.ones(2, 1, dtype=torch.bool)
    packed = tree.pack(PREFIXES[:2], torch.tensor([0, 1]), tokens, mask)
    hidden = tree.forward(body, packed)[packed.before_RT[mask]]
    for got, prefix in zip(hidden, PREFIXES, strict=False):
        torch.testing.assert_close(got, plain(body, prefix)[-1], atol=1e-5, rtol=1e-4)
