"""Log-probabilities of responses, and gradients of their sums, against one row at a time."""

import dataclasses

import pytest
import torch

from meal_fast import ops
from meal_fast.data_types import Prompt, Rollout
from meal_fast.models.policy import load_policy
from meal_fast.rollout import Request, rollout
from meal_fast.training.losses.sequences import (
    Size,
    gradient,
    hidden,
    logp,
    logp_rows,
    micro_batches,
    packed,
)
from tests.helpers.run_folder import tiny_config, tiny_policy

TEMPERATURE = 0.9


@pytest.fixture(scope="module", params=["lora", "full"])
def setting(request):
    config = tiny_config(policy={"tuning": request.param})
    lora = request.param == "lora"
    policy = tiny_policy(config) if lora else load_policy(config.policy, config.names)
    return policy, uneven(policy)


def uneven(policy, samples=3, seed=0, w=(0.7, 0.3)):
    """Rows of three prompts, of two to six tokens."""
    prompts = [Prompt("a", "Write a short word."), Prompt("b", "Hi"), Prompt("c", "Say more.")]
    rolled = rollout(
        policy,
        [Request(p, w, samples) for p in prompts],
        max_new_tokens=7,
        temperature=TEMPERATURE,
        seed=seed,
    )
    lengths = 2 + torch.arange(3 * samples)[:, None] % 5
    mask = rolled.mask_RT & (torch.arange(rolled.mask_RT.shape[1]) < lengths)
    return dataclasses.replace(rolled, mask_RT=mask)


def plain(network, rolled, temperature=TEMPERATURE):
    """logp (R,) from full logits, one row at a time, without any packing."""
    out = []
    for row, group in enumerate(rolled.group_R.tolist()):
        tokens = rolled.tokens_RT[row][rolled.mask_RT[row]]
        ids = torch.tensor([[*rolled.prefix[group], *tokens.tolist()]])
        hidden = network.body(input_ids=ids, use_cache=False).last_hidden_state[0]
        logits = hidden[-len(tokens) - 1 : -1] @ network.weight.T / temperature
        out.append(torch.log_softmax(logits, -1).gather(1, tokens[:, None]).sum())
    return torch.stack(out)


def test_log_probabilities_are_those_of_the_rows_alone(setting):
    policy, rolled = setting
    with torch.no_grad():
        want = plain(policy.network, rolled)
        for rows in ([0], [0, 1, 2, 3], [8, 2, 0, 1], list(range(9))):
            got = logp_rows(policy.network, rolled, rows, TEMPERATURE)
            torch.testing.assert_close(got, want[rows], atol=1e-4, rtol=1e-5)
    assert got.dtype == torch.float32


@pytest.mark.parametrize("budget", [1, 50, 10**6])
def test_micro_batches_do_not_change_them(setting, budget):
    policy, rolled = setting
    assert [row for run in micro_batches(rolled, budget) for row in run] == list(range(9))
    with policy.reference() as base:
        want = plain(base, rolled).detach()
        got = logp(base, rolled, TEMPERATURE, micro_tokens=budget)
    assert not got.requires_grad
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("budget", [1, 50, 10**6])
def test_the_gradient_of_a_weighted_sum(setting, budget, recompute):
    policy, rolled = setting
    c = torch.randn(9, generator=torch.Generator().manual_seed(1))
    value, got = gradient(policy, rolled, c, TEMPERATURE, micro_tokens=budget, recompute=recompute)
    assert all(p.grad is None for p in policy.trainable)
    wanted = (c * plain(policy.network, rolled)).sum()
    want = torch.autograd.grad(wanted, policy.trainable)
    torch.testing.assert_close(value, wanted.detach(), atol=1e-3, rtol=1e-5)
    assert any(g.abs().max() > 1e-2 for g in got)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


def test_logits_are_never_whole(setting, monkeypatch):
    policy, rolled = setting
    calls = []

    def spy(hidden, *arguments, **options):
        calls.append(len(hidden))
        return linear_logprob(hidden, *arguments, **options)

    linear_logprob = ops.linear_logprob
    monkeypatch.setattr(ops, "linear_logprob", spy)
    logp_rows(policy.network, rolled, range(9), TEMPERATURE)
    assert calls == [int(rolled.mask_RT.sum())]  # sampled tokens alone reach the head


def test_coefficients_that_fit_no_rollout_are_refused(setting):
    policy, rolled = setting
    with pytest.raises(ValueError, match=r"coefficient_R: shape \(4,\), expected \(9,\)"):
        gradient(policy, rolled, torch.ones(4), TEMPERATURE, micro_tokens=99)
    none = {name: getattr(rolled, name)[:0] for name in ("group_R", "mask_RT", "tokens_RT")}
    empty = dataclasses.replace(rolled, **none)
    with pytest.raises(ValueError, match="no rows"):
        gradient(policy, empty, torch.ones(0), TEMPERATURE, micro_tokens=99)


def made(policy, lengths, samples):
    """A rollout of rows of these lengths."""
    prefix, n = policy.encode_prompt("Write a short word."), len(lengths)
    group_R, length_R = torch.arange(n) // samples, torch.tensor(lengths)
    groups = -(-n // samples)
    mask = torch.arange(max(lengths)) < length_R[:, None]
    return Rollout(
        prompts=(Prompt("a", "a"),) * groups,
        prefix=(prefix,) * groups,
        group_R=group_R,
        condition_RK=torch.full((n, 2), 0.5),
        tokens_RT=torch.randint(5, 90, mask.shape),
        mask_RT=mask,
        logp_RT=torch.zeros(mask.shape),
        finish=("stop",) * n,
        texts=("",) * n,
        on_policy=True,
        prefill_tokens=0,
        reused_tokens=0,
        seconds=0.0,
    )


def bytes_kept(policy, rolled, rows):
    """For the gradient, by a pass over these rows."""
    alive, sizes = [], {}

    def keep(x):
        alive.append(x)  # or its memory would be given to another
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden(policy.network, packed(rolled, rows))
    return sum(sizes.values())


LONG_AMONG_SHORT = [[32] + [2] * 63, [2] * 63 + [32], [32] + [2] * 15, [24, 3] * 16]


@pytest.mark.parametrize("lengths", LONG_AMONG_SHORT)
def test_a_micro_batch_of_uneven_rows_keeps_what_its_budget_says(setting, lengths):
    policy, _ = setting
    even = made(policy, [32] * 16, 4)
    budget = 4 * len(even.prefix[0]) + 16 * 32
    allowed = 1.25 * bytes_kept(policy, even, range(16))
    uneven = made(policy, lengths, 4)
    runs = list(micro_batches(uneven, budget))
    assert max(bytes_kept(policy, uneven, run) for run in runs) < allowed
    if sum(lengths) < budget < 0.6 * len(lengths) * max(lengths):  # it fits by real tokens alone
        assert len(runs) > 1 and bytes_kept(policy, uneven, range(len(lengths))) > allowed


@pytest.mark.parametrize("lengths", [*LONG_AMONG_SHORT, [2] * 64, [16] * 32])
def test_the_size_of_a_pass_follows_the_bytes_it_keeps(setting, lengths):
    policy, _ = setting
    even, uneven = made(policy, [32] * 16, 4), made(policy, lengths, 4)
    prefix, kept = len(even.prefix[0]), {}
    for rolled in (even, uneven):
        size = Size()
        for row, length in enumerate(rolled.lengths):
            size = size.and_rows([length], 0 if row % 4 else prefix)
        kept[id(rolled)] = bytes_kept(policy, rolled, range(size.rows)) / size.tokens
    assert 0.8 < kept[id(uneven)] / kept[id(even)] < 1.25
