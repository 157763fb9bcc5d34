"""The sampler against plain forwards of the same model, and the preference text's tokens."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from meal_fast.data.preferences import preference_text
from meal_fast.data_types import Prompt
from meal_fast.rollout import Request, rollout
from tests.helpers.run_folder import tiny_config, tiny_policy

PROMPTS = [Prompt("a", "Write a short word."), Prompt("b", "Hi"), Prompt("c", "Write a list, now!")]
W = (0.7, 0.3)


@pytest.fixture(scope="module")
def policy():
    return tiny_policy(tiny_config())


def sample(policy, requests, **options):
    settings = {"max_new_tokens": 12, "temperature": 0.9, "seed": 3, "rng_key": ("test",)}
    return rollout(policy, requests, **settings | options)


def test_log_probabilities_match_a_full_forward(policy):
    """logp_old is the rollout's own: it must be what the learner's forward would say."""
    rolled = sample(policy, [Request(p, W, 4) for p in PROMPTS])
    body, weight = policy.network.body, policy.network.weight
    for r, g in enumerate(rolled.group_R.tolist()):
        tokens = rolled.tokens_RT[r][rolled.mask_RT[r]]
        ids = torch.tensor([[*rolled.prefix[g], *tokens.tolist()]])
        with torch.no_grad():
            hidden = body(input_ids=ids, use_cache=False).last_hidden_state[0]
        logp = torch.log_softmax(hidden @ weight.T / 0.9, -1)[-len(tokens) - 1 : -1]
        want = logp.gather(1, tokens[:, None])[:, 0]
        got = rolled.logp_RT[r][rolled.mask_RT[r]]
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_merged_factors_compute_the_same_and_leave_the_weights_as_they_were(policy):
    layers = [m for m in policy.model.modules() if hasattr(m, "get_delta_weight")]
    before = [m.base_layer.weight.clone() for m in layers]
    ids = torch.tensor([policy.encode_prompt("Hi")])

    def states():
        with torch.no_grad():
            return policy.network.body(input_ids=ids, use_cache=False).last_hidden_state

    apart = states()
    with policy.reference():
        assert not torch.allclose(states(), apart), "the factors do something"
    with policy.merged():
        assert not any(
            torch.equal(m.base_layer.weight, w) for m, w in zip(layers, before, strict=True)
        )
        torch.testing.assert_close(states(), apart, atol=1e-5, rtol=1e-4)
    with pytest.raises(RuntimeError, match="mid-rollout"), policy.merged():
        raise RuntimeError("mid-rollout")
    assert all(torch.equal(m.base_layer.weight, w) for m, w in zip(layers, before, strict=True))
    torch.testing.assert_close(states(), apart, rtol=0, atol=0)


def test_a_row_does_not_depend_on_what_else_is_in_the_batch(policy):
    requests = [Request(p, w, 3) for p in PROMPTS for w in (W, (0.0, 1.0))]
    together = sample(policy, requests)
    apart = [sample(policy, [q]) for q in requests]
    assert together.texts == tuple(t for rolled in apart for t in rolled.texts)
    assert together.texts == sample(policy, requests, max_rows=7).texts
    assert len(set(together.texts)) > 6  # and the rows differ among themselves
    assert together.texts != sample(policy, requests, rng_key=("other",)).texts


def test_a_prompt_is_prefilled_once_for_all_its_preferences(policy):
    seen = []
    hook = policy.network.body.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    weights = [(i / 10, 1 - i / 10) for i in range(11)]
    rolled = sample(policy, [Request(PROMPTS[0], w, 2) for w in weights], max_new_tokens=2)
    hook.remove()
    prompt = len(policy.encode_prompt(PROMPTS[0].text))
    suffixes = [len(policy.encode_suffix(w)) for w in weights]
    assert rolled.prefill_tokens == prompt + sum(suffixes)
    assert seen == [(1, prompt), (11, max(suffixes)), (22, 1)]
    assert rolled.reused_tokens == 21 * prompt + sum(suffixes)


def test_greedy_is_what_plain_transformers_generates(policy, tmp_path):
    """The saved folder, its chat template and its tokens, with nothing of ours in between."""
    policy.save(tmp_path / "policy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "policy")
    rolled = sample(policy, [Request(p, W) for p in PROMPTS], temperature=0.0)
    for i, prompt in enumerate(PROMPTS):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.text}],
            add_generation_prompt=True,
            preference=preference_text(W, policy.names, policy.style),
            return_tensors="pt",
            return_dict=True,
        )["input_ids"]
        assert tuple(ids[0].tolist()) == rolled.prefix[i]
        out = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
        assert out.tolist() == rolled.tokens_RT[i][rolled.mask_RT[i]].tolist()


def test_rows_end_at_the_stop_token_and_are_masked_after_it(policy):
    drawn = sample(policy, [Request(PROMPTS[0], W, 32)]).tokens_RT
    stop = int(torch.bincount(drawn.ravel()).argmax())
    kind = type("Stopping", (type(policy),), {"stop_ids": frozenset({stop})})
    original, policy.__class__ = policy.__class__, kind
    rolled = sample(policy, [Request(p, W, 8) for p in PROMPTS])
    policy.__class__ = original
    lengths = rolled.mask_RT.sum(1)
    assert "stop" in rolled.finish and len(set(lengths.tolist())) > 1
    for row, length, finish in zip(rolled.tokens_RT, lengths, rolled.finish, strict=True):
        assert (row[: length - 1] != stop).all()
        assert (row[length - 1] == stop) == (finish == "stop")
        assert (row[length:] == 0).all()


def test_bad_requests(policy):
    with pytest.raises(ValueError, match="nothing to sample"):
        sample(policy, [])
    with pytest.raises(ValueError, match="samples=0"):
        sample(policy, [Request(PROMPTS[0], W, 0)])
    with pytest.raises(ValueError, match="exceed the model's context"):
        sample(policy, [Request(PROMPTS[0], W)], max_new_tokens=10**6)
