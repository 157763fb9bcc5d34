"""The learner against the loss written out with full logits, one row at a time."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora import Linear

from meal_fast.data_types import Prompt, Rollout, Scored
from meal_fast.models import shared_prefix
from meal_fast.models.policy import load_policy
from meal_fast.ops import policy_loss_from_logp
from meal_fast.ops.gemm import lora_linear
from meal_fast.rollout import Request, rollout
from meal_fast.training.losses.grpo import grpo, most_telling
from meal_fast.training.losses.sequences import micro_batches, packed, token_logp_RT
from tests.helpers.run_folder import tiny_config, tiny_policy

TEMPERATURE = 0.9


@pytest.fixture(scope="module", params=["lora", "full"])
def setting(request):
    config = tiny_config(policy={"tuning": request.param})
    policy = tiny_policy(config) if request.param == "lora" else full_policy(config)
    prompts = [Prompt("a", "Write a short word."), Prompt("b", "Hi"), Prompt("c", "Say more.")]
    rolled = rollout(
        policy,
        [Request(p, (0.7, 0.3), 4) for p in prompts],
        max_new_tokens=7,
        temperature=TEMPERATURE,
        seed=0,
    )
    generator = torch.Generator().manual_seed(0)
    old = rolled.logp_RT + 0.3 * torch.randn(rolled.logp_RT.shape, generator=generator)
    lengths = 2 + torch.arange(12)[:, None] % 5
    uneven = rolled.mask_RT & (torch.arange(rolled.mask_RT.shape[1]) < lengths)
    rolled = dataclasses.replace(rolled, logp_RT=old * uneven, mask_RT=uneven)
    advantage = torch.randn(12, generator=generator)
    empty = torch.zeros(12, 2)
    return policy, rolled, Scored(empty, advantage, advantage)


def full_policy(config):
    """All parameters trained, and moved a little, so that policy and reference differ."""
    policy = load_policy(config.policy, config.names)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.trainable:
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return policy


def gradients(policy):
    out = {n: p.grad.clone() for n, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    return out


def logp_of(network, rolled, row):
    prefix = rolled.prefix[int(rolled.group_R[row])]
    tokens = rolled.tokens_RT[row][rolled.mask_RT[row]]
    ids = torch.tensor([[*prefix, *tokens.tolist()]])
    hidden = network.body(input_ids=ids, use_cache=False).last_hidden_state[
        0, -len(tokens) - 1 : -1
    ]
    logits = hidden @ network.weight.T / TEMPERATURE
    return torch.log_softmax(logits, -1).gather(1, tokens[:, None])[:, 0]


@pytest.mark.parametrize("reduce", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_loss_and_gradient_equal_the_plain_computation(setting, reduce, beta):
    policy, rolled, scored = setting
    config = dataclasses.replace(tiny_config().grpo, beta=beta, reduce=reduce, micro_tokens=40)
    assert len(list(micro_batches(rolled, 40))) > 2
    metrics = grpo(policy, rolled, scored, config, TEMPERATURE)
    got = gradients(policy)

    shape = rolled.mask_RT.shape
    logp, ref = torch.zeros(shape), torch.zeros(shape)
    for row in range(shape[0]):
        n = int(rolled.mask_RT[row].sum())
        logp[row, :n] = logp_of(policy.network, rolled, row)
        with policy.reference() as base, torch.no_grad():
            ref[row, :n] = logp_of(base, rolled, row)
    loss, _ = policy_loss_from_logp(
        logp,
        scored.advantage_R[:, None].expand(shape),
        old_logp=rolled.logp_RT,
        ref_logp=ref if beta else None,
        mask=rolled.mask_RT,
        beta=beta,
        reduce=reduce,
    )
    loss.backward()
    want = gradients(policy)
    torch.testing.assert_close(metrics["loss"], loss.detach(), atol=1e-5, rtol=1e-4)
    assert got.keys() == want.keys() and got
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, atol=2e-6, rtol=2e-3, msg=name)


@pytest.mark.parametrize("budget", [1, 60, 150, 10**6])
def test_micro_batches_cover_every_row_once_in_order(setting, budget):
    _, rolled, _ = setting
    runs = list(micro_batches(rolled, budget))
    assert [row for run in runs for row in run] == list(range(12))
    for rows in runs:
        prefixes = [len(rolled.prefix[g]) for g in {rolled.groups[row] for row in rows}]
        lengths = [rolled.lengths[row] for row in rows]
        padded = max(prefixes) * len(prefixes) + max(lengths) * len(rows)
        used = (3 * (sum(prefixes) + sum(lengths)) + padded) / 4
        assert len(rows) == 1 or used <= budget


def test_an_update_raises_the_log_probability_of_better_rows(setting):
    policy, rolled, scored = setting
    config = dataclasses.replace(tiny_config().grpo, beta=0.0)
    before = [p.detach().clone() for p in policy.trainable]
    grpo(policy, rolled, scored, config, TEMPERATURE)

    def gain():
        with torch.no_grad():
            rows = [logp_of(policy.network, rolled, r).mean() for r in range(12)]
        return float((torch.stack(rows) * scored.advantage_R).sum())

    start = gain()
    with torch.no_grad():
        for parameter in policy.trainable:
            parameter -= 1e-2 * parameter.grad
    assert gain() > start
    policy.model.zero_grad()
    with torch.no_grad():
        for parameter, value in zip(policy.trainable, before, strict=True):
            parameter.copy_(value)


def test_recomputed_activations_give_the_same_gradient_and_keep_less(setting):
    policy, rolled, scored = setting
    config = dataclasses.replace(tiny_config().grpo, beta=0.3)
    batch = packed(rolled, range(len(rolled.groups)))
    made, kept = {}, {}
    for on in (False, True):
        grpo(policy, rolled, scored, dataclasses.replace(config, recompute=on), TEMPERATURE)
        made[on] = gradients(policy)
        sizes = []

        def hook(x, sizes=sizes):
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(hook, lambda x: x), policy.recomputing(on):
            shared_prefix.forward(policy.network.body, batch)
        kept[on] = sum(sizes)
        assert not any(m.training for m in policy.model.modules())
    assert kept[True] < kept[False] / 4
    assert made[True].keys() == made[False].keys()
    for name, gradient in made[True].items():
        torch.testing.assert_close(gradient, made[False][name], atol=1e-6, rtol=1e-5)


def test_lora_layers_are_computed_by_lora_linear_as_peft_would(monkeypatch):
    policy = tiny_policy(tiny_config())
    layers = [m for m in policy.model.modules() if hasattr(m, "get_delta_weight")]
    ids, seen = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13]]), []

    def spy(x, weight, *others):
        seen.append(weight.data_ptr())
        return lora_linear(x, weight, *others)

    monkeypatch.setattr("meal_fast.models.multi_lora.lora_linear", spy)
    got = policy.model(input_ids=ids, use_cache=False).logits
    assert sorted(seen) == sorted(m.base_layer.weight.data_ptr() for m in layers)
    for module in layers:
        module.__class__ = Linear
    torch.testing.assert_close(policy.model(input_ids=ids, use_cache=False).logits, got)
    assert len(seen) == len(layers)


def test_a_tied_embedding_gets_the_gradient_of_both_its_uses():
    policy = full_policy(tiny_config(policy={"tuning": "full"}))
    embedding = policy.model.get_input_embeddings()
    assert embedding.weight is policy.model.get_output_embeddings().weight
    ids = torch.tensor([[5, 6, 5, 7]])

    def gradient(sparse):
        embedding.sparse = sparse
        policy.model.zero_grad()
        policy.model(input_ids=ids, use_cache=False).logits.square().mean().backward()
        return embedding.weight.grad

    got = gradient(True)
    assert not got.is_sparse
    torch.testing.assert_close(got, gradient(False))


def test_rows_of_another_behaviour_policy_are_refused(setting):
    policy, rolled, scored = setting
    selected = dataclasses.replace(rolled, on_policy=False)
    with pytest.raises(ValueError, match="not the behaviour policy's; sample without top_k"):
        grpo(policy, selected, scored, tiny_config().grpo, TEMPERATURE)


@given(st.lists(st.integers(-6, 6), min_size=1, max_size=24), st.integers(1, 5), st.data())
def test_of_each_group_the_rows_with_the_largest_advantages_are_kept(values, keep, data):
    """Against a plain sort, with ties and groups of any size."""
    advantage = torch.tensor(values, dtype=torch.float32) / 2
    n = len(values) - 1
    cuts = data.draw(st.lists(st.integers(0, 1), min_size=n, max_size=n))
    group = torch.tensor([0, *cuts]).cumsum(0)
    want = []
    for g in range(int(group[-1]) + 1):
        own = [r for r in range(len(values)) if int(group[r]) == g]
        want += sorted(sorted(own, key=lambda r: -abs(values[r]))[:keep])
    rolled, scored = rows_of(group), scored_of(advantage)
    kept, its = most_telling(rolled, scored, keep)
    assert [int(text) for text in kept.texts] == want
    assert kept.tokens_RT[:, 0].tolist() == kept.logp_RT[:, 0].tolist() == want
    assert kept.group_R.tolist() == group[want].tolist()
    assert its.advantage_R.tolist() == advantage[want].tolist() and its.reward_RK.shape[1] == 2
    assert kept.on_policy and [s.stop - s.start for s in kept.tasks] == [len(want)]


def rows_of(group):
    n, groups = len(group), int(group[-1]) + 1
    number = torch.arange(n)[:, None]
    return Rollout(
        prompts=(Prompt("a", "a"),) * groups,
        prefix=((1, 2),) * groups,
        group_R=group,
        condition_RK=torch.full((n, 2), 0.5),
        tokens_RT=number,
        mask_RT=number >= 0,
        logp_RT=number.float(),
        finish=("stop",) * n,
        texts=tuple(map(str, range(n))),
        on_policy=True,
        prefill_tokens=2,
        reused_tokens=0,
        seconds=0.0,
    )


def scored_of(advantage):
    reward = torch.zeros(len(advantage), 2)
    return Scored(reward, advantage, advantage)


def test_with_keep_the_gradient_is_that_of_the_kept_rows_alone(setting):
    policy, rolled, scored = setting
    scored = dataclasses.replace(scored, advantage_R=torch.arange(12) % 4 - 1.6)
    config = dataclasses.replace(tiny_config().grpo, beta=0.3, micro_tokens=40)
    metrics = grpo(policy, rolled, scored, dataclasses.replace(config, keep=2), TEMPERATURE)
    got = gradients(policy)
    rows = torch.tensor([0, 3, 4, 7, 8, 11])  # -1.6 and 1.4 of -1.6, -0.6, 0.4, 1.4
    alone = dataclasses.replace(scored, advantage_R=scored.advantage_R[rows])
    again = grpo(policy, rolled.of_rows(rows), alone, config, TEMPERATURE)
    want = gradients(policy)
    assert metrics["tokens"] == again["tokens"] == rolled.mask_RT[rows].sum()
    torch.testing.assert_close(got, want)
    grpo(policy, rolled, scored, config, TEMPERATURE)
    whole = gradients(policy)
    assert max((whole[name] - value).abs().max() for name, value in want.items()) > 1e-4


@pytest.mark.parametrize("cap", [2.0, 1.0, 0.0])
def test_rows_of_another_program_are_weighted_by_what_it_differs_in_truncated(setting, cap):
    """Against advantages that carry the weights: a row's tokens all differ by the same here."""
    policy, rolled, scored = setting
    config = dataclasses.replace(tiny_config().grpo, beta=0.3, micro_tokens=40, importance_cap=cap)
    gap_R = torch.linspace(-1.5, 1.5, 12)
    theirs = dataclasses.replace(
        rolled, behaviour_logp_RT=(rolled.logp_RT - gap_R[:, None]) * rolled.mask_RT
    )
    metrics = grpo(policy, theirs, scored, config, TEMPERATURE)
    got = gradients(policy)
    weight_R = gap_R.exp().clamp(max=cap) if cap else torch.ones(12)
    plain = dataclasses.replace(scored, advantage_R=scored.advantage_R * weight_R)
    unweighted = grpo(policy, rolled, plain, config, TEMPERATURE)
    for name, gradient in gradients(policy).items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(metrics["loss"], unweighted["loss"])
    lengths = rolled.mask_RT.sum(1)
    mean = (gap_R.abs() * lengths).sum() / lengths.sum()
    torch.testing.assert_close(metrics["logp_gap"], mean)
    assert "logp_gap" not in unweighted and ("importance" in metrics) == (cap > 0)
    if cap:
        torch.testing.assert_close(
            metrics["importance"], (weight_R * lengths).sum() / lengths.sum()
        )
        cut = ((gap_R.exp() >= cap) * lengths).sum() / lengths.sum()
        torch.testing.assert_close(metrics["importance_capped"], cut)


def test_where_nobody_else_sampled_the_cap_changes_no_bit(setting):
    policy, rolled, scored = setting
    assert rolled.behaviour_logp_RT is None
    made = []
    for cap in (0.0, 2.0):
        config = dataclasses.replace(tiny_config().grpo, importance_cap=cap)
        metrics = grpo(policy, rolled, scored, config, TEMPERATURE)
        made.append((metrics, gradients(policy)))
    (one, first), (two, second) = made
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_the_weights_go_with_their_rows():
    rolled = rows_of(torch.tensor([0, 0, 1, 1]))
    rolled = dataclasses.replace(
        rolled, behaviour_logp_RT=10.0 + rolled.logp_RT, task_id=(0, 1), logp_RT=rolled.logp_RT
    )
    assert rolled.of_rows(torch.tensor([1, 3])).behaviour_logp_RT.tolist() == [[11.0], [13.0]]
    parts = [rolled.of_task(rows).behaviour_logp_RT.tolist() for rows in rolled.tasks]
    assert parts == [[[10.0], [11.0]], [[12.0], [13.0]]]


@pytest.mark.parametrize("cap", [0.5, -1.0, float("inf"), float("nan")])
def test_a_cap_that_is_none_is_refused(cap):
    with pytest.raises(ValueError, match=r"grpo\.importance_cap=.*: 0, or at least 1"):
        dataclasses.replace(tiny_config().grpo, importance_cap=cap)


def test_log_probabilities_of_tokens_are_the_samplers_own(setting):
    policy, rolled, _ = setting
    again = rollout(
        policy,
        [Request(p, (0.7, 0.3), 4) for p in rolled.prompts],
        max_new_tokens=7,
        temperature=TEMPERATURE,
        seed=0,
    )
    own = token_logp_RT(policy.network, again, TEMPERATURE, micro_tokens=40)
    torch.testing.assert_close(own, again.logp_RT, atol=1e-5, rtol=0)
    assert not own[~again.mask_RT].any()
