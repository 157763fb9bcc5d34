"""The preference-weight-net: what it reads, what it is drawn to, and that it can be resumed."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from meal_fast.data_types import Prompt
from meal_fast.rollout.rejection_rules import floored
from meal_fast.training.net_trainer import (
    NetTrainer,
    acceptance_weights,
    divergence,
    entropy,
    learned_preference,
    net_loss,
)
from meal_fast.training.preference_net import Features, PreferenceNet, features
from tests.helpers.run_folder import tiny_config, tiny_policy

NAMES = ("helpful", "harmless", "humor")
TEXTS = {"a": "Hi", "b": "Write a song.", "c": "Say more to me.", "d": "Why?"}
PROMPTS = [Prompt(name, text) for name, text in TEXTS.items()]


def simplex(rows, k, seed, sharp=2.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(sharp * torch.randn(rows, k, generator=generator), -1)


def states(rows, width=24, seed=0):
    return 3 + torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


# --- the net -------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 3])
def test_a_new_net_is_uniform_and_its_units_differ(k):
    net = PreferenceNet(NAMES[:k], 24, hidden=16, seed=3)
    assert torch.equal(net(states(5)), torch.full((5, k), 1 / k))
    assert len({tuple(row) for row in net.inner.weight.tolist()}) == 16
    assert all(p.dtype == torch.float32 and p.requires_grad for p in net.parameters())


def test_the_seed_alone_decides_and_the_global_generator_stays():
    before = torch.get_rng_state()
    one, same, other = (PreferenceNet(NAMES, 24, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.inner.weight, same.inner.weight)
    assert not torch.equal(one.inner.weight, other.inner.weight)
    assert one.inner.out_features == 256


def test_the_net_reads_a_constant_whose_size_does_not_matter():
    net = trained()
    h = states(4).requires_grad_()
    w = net(h)
    torch.testing.assert_close(w.sum(1), torch.ones(4))
    torch.testing.assert_close(net(1000 * h), w)
    w[:, 0].sum().backward()
    assert h.grad is None and net.inner.weight.grad.abs().sum() > 0


def trained(k=3):
    """A net that has learned something: not uniform any more."""
    net = PreferenceNet(NAMES[:k], 24, hidden=16, seed=1)
    with torch.no_grad():
        net.outer.weight.normal_(generator=torch.Generator().manual_seed(0))
    return net


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((("one",), 4), r"names=\('one',\): two objectives"),
        ((NAMES, 0), "width=0"),
        ((NAMES, 4, 0), "hidden=0"),
    ],
)
def test_sizes_that_make_no_net_are_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        PreferenceNet(*arguments)
    with pytest.raises(ValueError, match=r"h_BD: shape \(2, 5\), expected \(2, 24\)"):
        trained()(states(2, 5))


def test_a_saved_net_is_the_same_net(tmp_path):
    net = trained()
    path = tmp_path / "preference_net.safetensors"
    net.save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    loaded = PreferenceNet.load(path, NAMES)
    assert torch.equal(loaded(states(6)), net(states(6)))
    with safe_open(path, "pt") as file:
        held = {name: json.loads(value) for name, value in file.metadata().items()}
    assert held == {"K": 3, "names": list(NAMES), "D": 24, "hidden": 16}


@pytest.mark.parametrize("names", [NAMES[:2], NAMES[::-1], ("helpful", "harmless", "brief")])
def test_other_objectives_than_the_nets_are_refused_with_both_named(tmp_path, names):
    trained().save(tmp_path / "net")
    match = f"K=3 objectives {', '.join(NAMES)}; given K={len(names)}, {', '.join(names)};"
    with pytest.raises(ValueError, match=match):
        PreferenceNet.load(tmp_path / "net", names)


def test_files_that_hold_no_net_are_refused(tmp_path):
    (tmp_path / "broken").write_bytes(b"\x08\x00\x00")
    save_file({"x": torch.zeros(2)}, tmp_path / "other")
    for name, match in (("broken", "cannot be read"), ("gone", "cannot be"), ("other", "no file")):
        with pytest.raises(ValueError, match=match):
            PreferenceNet.load(tmp_path / name, NAMES)


# --- what it reads -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["lora", "full"])
def policy(request):
    """Its adapters, or all its parameters, are far from the base model's."""
    config = tiny_config(policy={"tuning": request.param})
    return tiny_policy(config, scale=0.3)


@pytest.mark.parametrize("micro_tokens", [1, 20, 4096])
def test_features_are_the_base_models_mean_hidden_states(policy, micro_tokens):
    got = features(policy, PROMPTS, micro_tokens)
    assert got.dtype == torch.float32 and not got.requires_grad
    for row, prompt in zip(got, PROMPTS, strict=True):
        ids = torch.tensor([policy.encode_prompt(prompt.text)])
        with torch.no_grad(), policy.reference() as base:
            hidden = base.body(input_ids=ids, use_cache=False).last_hidden_state[0]
        hidden = hidden[len(policy.encode_prompt("")) :]  # the user's tokens
        torch.testing.assert_close(row, hidden.mean(0), atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            ours = policy.network.body(input_ids=ids, use_cache=False).last_hidden_state[0]
        ours = ours[len(policy.encode_prompt("")) :]
        assert (ours.mean(0) - row).abs().max() > 1e-2  # the base's, not the policy's


def test_a_prompt_without_text_is_its_template(policy):
    ids = torch.tensor([policy.encode_prompt("")])
    with torch.no_grad(), policy.reference() as base:
        hidden = base.body(input_ids=ids, use_cache=False).last_hidden_state[0]
    got = features(policy, [PROMPTS[0], Prompt("", "")])
    torch.testing.assert_close(got[1], hidden.mean(0), atol=1e-5, rtol=1e-4)


def test_features_are_kept_by_prompt_the_last_in_use_longest(policy):
    kept = Features(policy, room=3)
    a, b, c, d = PROMPTS
    first = kept([a, b, a, c])
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    assert kept.state()["ids"] == ["b", "a", "c"]
    # Under the id of one that is kept, the text is not read again.
    assert torch.equal(kept([Prompt("b", "another text")])[0], first[1])
    every = kept([d, a, b, c])  # more than it keeps
    assert torch.equal(every[1:], first[[0, 1, 3]])
    assert kept.state()["ids"] == ["a", "b", "c"]
    with pytest.raises(ValueError, match="nothing to read"):
        kept([])


def test_kept_features_go_on_to_the_same_bits(policy):
    one, other = Features(policy, room=8), Features(policy, room=8)
    one(PROMPTS)
    other.load_state(copy.deepcopy(one.state()))
    assert other.state()["ids"] == one.state()["ids"]
    assert torch.equal(other(PROMPTS[:2]), one(PROMPTS[:2]))


# --- w* ------------------------------------------------------------------------------------------


def cost(w, w0, w_hat, lam):
    def kl(p, q):
        return (p * (p / q).log()).sum(-1)

    return lam * kl(w, w0) + (1 - lam) * kl(w, w_hat)


@given(st.integers(2, 6), st.floats(0, 1), st.integers(0, 999))
def test_the_closed_form_is_the_minimum_and_the_gradient_meets_it(k, lam, seed):
    w0, w_hat = simplex(4, k, seed, sharp=6.0), simplex(4, k, seed + 1000, sharp=6.0)
    closed = learned_preference(w0, w_hat, lam)
    torch.testing.assert_close(closed.sum(1), torch.ones(4))
    stepped = learned_preference(w0, w_hat, lam, "gradient")
    assert (stepped - closed).abs().max() <= 1e-4
    w0, w_hat = floored(w0.double()), floored(w_hat.double())
    best = learned_preference(w0, w_hat, lam)
    for other in (w0, w_hat, 0.99 * best + 0.01 / k, simplex(4, k, seed + 2000).double()):
        assert (cost(other, w0, w_hat, lam) >= cost(best, w0, w_hat, lam) - 1e-8).all()


def test_the_ends_of_lambda_and_the_corners():
    w0 = torch.tensor([[1.0, 0.0], [0.3, 0.7], [0.0, 1.0]])
    w_hat = torch.tensor([[0.0, 1.0], [0.6, 0.4], [0.2, 0.8]])
    torch.testing.assert_close(learned_preference(w0, w_hat, 1.0), floored(w0))
    torch.testing.assert_close(learned_preference(w0, w_hat, 0.0), floored(w_hat))
    half = learned_preference(w0, w_hat, 0.5)
    torch.testing.assert_close(half[0], torch.tensor([0.5, 0.5]))  # opposite corners
    by_hand = torch.tensor([0.18, 0.28]).sqrt()
    torch.testing.assert_close(half[1], by_hand / by_hand.sum())


def test_fewer_steps_stop_on_the_way():
    """After n steps of lr the exponent of w⁰ is λ + (1 − λ)(1 − lr)^n."""
    w0, w_hat = simplex(3, 3, 0), simplex(3, 3, 1)
    got = learned_preference(w0, w_hat, 0.2, "gradient", steps=3, lr=0.25)
    exponent = 0.2 + 0.8 * 0.75**3
    torch.testing.assert_close(got, learned_preference(w0, w_hat, exponent))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lam": 1.5}, r"lam=1\.5: must be in \[0, 1\]"),
        ({"lam": math.nan}, "lam=nan"),
        ({"mode": "exact"}, "mode='exact': choose from closed, gradient"),
        ({"steps": 0}, "steps=0"),
        ({"lr": 1.5}, r"lr=1\.5"),
        ({"w_hat_RK": torch.ones(2, 3) / 3}, "w_hat_RK: shape"),
        ({"w_hat_RK": torch.tensor([[math.nan, 1.0]] * 2)}, "w_hat_RK=.*must be finite"),
        ({"w0_RK": torch.ones(2, 1), "w_hat_RK": torch.ones(2, 1)}, "K ≥ 2"),
    ],
)
def test_what_w_star_cannot_be_taken_of(change, match):
    arguments = {"w0_RK": torch.ones(2, 2) / 2, "w_hat_RK": torch.ones(2, 2) / 2, "lam": 0.5}
    with pytest.raises(ValueError, match=match):
        learned_preference(**arguments | change)


# --- a_i -----------------------------------------------------------------------------------------


def test_acceptance_weights_are_a_softmax_in_each_group():
    score = torch.tensor([0.1, -0.4, 900.0, 0.3, 899.9])
    group = torch.tensor([5, -1, 7, 5, 7])
    got = acceptance_weights(score, group, 0.2)
    e = math.e
    want = [1 / (1 + e), 1.0, 1 / (1 + e**-0.5), e / (1 + e), 1 / (1 + e**0.5)]
    torch.testing.assert_close(got, torch.tensor(want), atol=1e-4, rtol=1e-3)
    assert acceptance_weights(score[:0], group[:0], 0.2).shape == (0,)


def test_acceptance_weights_are_differentiable():
    score = torch.tensor([0.1, -0.4, 0.25, 0.3, 0.7], dtype=torch.float64, requires_grad=True)
    group = torch.tensor([1, 0, 1, 1, 0])
    assert torch.autograd.gradcheck(lambda s: acceptance_weights(s, group, 0.2), score)


@pytest.mark.parametrize("tau_a", [0.0, -1.0, math.inf])
def test_a_temperature_of_acceptance_that_is_none_is_refused(tau_a):
    with pytest.raises(ValueError, match="tau_a="):
        acceptance_weights(torch.zeros(2), torch.zeros(2, dtype=torch.int64), tau_a)


# --- the outer update ----------------------------------------------------------------------------


def test_the_nets_loss_by_hand():
    w = torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    target = torch.tensor([[0.8, 0.2], [0.9, 0.1]], requires_grad=True)
    kl = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    h = (math.log(2), -0.9 * math.log(0.9) - 0.1 * math.log(0.1))
    torch.testing.assert_close(divergence(target, w).detach(), torch.tensor([kl, 0.0]))
    torch.testing.assert_close(entropy(w), torch.tensor(h))
    w.requires_grad_()
    loss = net_loss(w, target, 0.3)
    assert float(loss.detach()) == pytest.approx((kl - 0.3 * sum(h)) / 2, rel=1e-5)
    loss.backward()
    assert target.grad is None
    assert float(w.grad[0, 0]) == pytest.approx((-0.8 / 0.5 + 0.3 * (1 - math.log(2))) / 2)
    corner = torch.tensor([[1.0, 0.0]], requires_grad=True)  # no NaN, forward or back
    net_loss(corner, torch.tensor([[0.0, 1.0]]), 0.1).backward()
    assert corner.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: net_loss(torch.ones(1, 2), torch.ones(2, 2), 0.0), "target_BK: shape"),
        (lambda: net_loss(torch.ones(0, 2), torch.ones(0, 2), 0.0), "no prompt"),
        (lambda: net_loss(torch.ones(1, 2), torch.ones(1, 2), -1.0), "gamma=-1.0"),
        (lambda: NetTrainer(trained(), lr=0.0), "lr=0.0"),
        (lambda: NetTrainer(trained(), buffer=0), "buffer=0"),
        (lambda: NetTrainer(trained(), net_steps=0), "net_steps=0"),
        (lambda: NetTrainer(trained(), gamma=-0.1), "gamma=-0.1"),
    ],
)
def test_outer_updates_that_cannot_be_made_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def fill(trainer, start, count):
    """Prompts `start` … of which each has two rows, whose mean is what the net should learn."""
    prompts = [Prompt(f"p{i}", "") for i in range(start, start + count)]
    w = torch.cat([simplex(count, 3, start), simplex(count, 3, start + 500)])
    group = torch.arange(count).repeat(2)
    trainer.add(prompts, states(count, seed=start), w, group)
    return (w[:count] + w[count:]) / 2


def test_the_net_learns_the_mean_of_each_prompts_rows():
    net = PreferenceNet(NAMES, 24, hidden=64, seed=1)
    trainer = NetTrainer(net, lr=1e-2, gamma=0.0, net_steps=150)
    mean = fill(trainer, 0, 12)
    metrics = trainer.step()
    assert set(metrics) == {"net_loss", "net_entropy", "net_kl_before", "net_kl_after"}
    assert metrics["net_kl_before"] > 0.1 and metrics["net_kl_after"] < 1e-3
    torch.testing.assert_close(net(states(12, seed=0)), mean, atol=0.05, rtol=0.0)
    again = trainer.step()
    assert again["net_kl_before"] == metrics["net_kl_after"] == metrics["net_loss"]


def test_the_entropy_keeps_the_net_off_the_corners():
    entropies = []
    for gamma in (0.0, 1.0):
        trainer = NetTrainer(PreferenceNet(NAMES, 24, seed=1), lr=1e-2, gamma=gamma, net_steps=100)
        fill(trainer, 0, 4)
        entropies.append(trainer.step()["net_entropy"])
    assert entropies[1] > entropies[0] + 0.1


def test_the_buffer_holds_the_last_prompts_once_each():
    trainer = NetTrainer(PreferenceNet(NAMES, 24), buffer=3)
    fill(trainer, 0, 4)
    assert len(trainer) == 3 and trainer.state()["ids"] == ["p1", "p2", "p3"]
    mean = fill(trainer, 1, 1)  # seen again: with its new values, the last in line
    assert trainer.state()["ids"] == ["p2", "p3", "p1"]
    torch.testing.assert_close(trainer.state()["target"][-1], mean[0])
    assert torch.equal(trainer.state()["h"][-1], states(1, seed=1)[0])


def test_a_prompt_under_two_preferences_is_one_and_one_without_rows_none():
    trainer = NetTrainer(PreferenceNet(NAMES, 24))
    twice, other = Prompt("x", ""), Prompt("y", "")
    w = simplex(3, 3, 0)
    h = states(3)
    h[2] = h[0]
    trainer.add([twice, other, twice], h, w, torch.tensor([0, 2, 2]))
    assert trainer.state()["ids"] == ["x"]
    torch.testing.assert_close(trainer.state()["target"][0], w.mean(0))


def test_nothing_moves_without_a_buffer_or_a_dependence_on_the_net():
    trainer = NetTrainer(PreferenceNet(NAMES, 24))
    before = copy.deepcopy(trainer.net.state_dict())
    assert trainer.step() == {} and trainer.descend(trainer.net(states(2))[:, 0].sum()) == {}
    fill(trainer, 0, 2)
    assert trainer.descend(torch.tensor(1.0)) == {}
    assert all(torch.equal(v, before[n]) for n, v in trainer.net.state_dict().items())
    assert trainer.state()["adam"]["state"] == {}


def test_a_surrogate_is_descended():
    trainer = NetTrainer(PreferenceNet(NAMES, 24, seed=2), gamma=0.0)
    fill(trainer, 0, 3)
    h = states(5, seed=9)
    before = trainer.net(h)[:, 1].sum()
    metrics = trainer.descend(-before)
    assert (
        float(trainer.net(h)[:, 1].sum().detach()) > float(before.detach())
        and "net_entropy" in metrics
    )
    # With γ alone, a net that is not uniform becomes more so.
    trainer = NetTrainer(trained(), gamma=1.0)
    fill(trainer, 0, 3)
    entropies = [trainer.descend(0 * trainer.net(h).sum())["net_entropy"] for _ in range(5)]
    assert entropies == sorted(entropies) and entropies[0] < entropies[-1]


def test_a_resumed_trainer_goes_on_to_the_same_bits(tmp_path):
    def advance(trainer, rounds):
        for start in rounds:
            fill(trainer, start, 3)
            trainer.step()
            trainer.descend(trainer.net(states(2, seed=start))[:, 0].sum())

    whole, first, second = (
        NetTrainer(PreferenceNet(NAMES, 24, seed=1), buffer=5, net_steps=3) for _ in range(3)
    )
    advance(whole, range(6))
    advance(first, range(3))
    state = first.state()
    advance(first, range(4, 6))  # what was taken does not change with it
    torch.save(state, tmp_path / "state")
    second.load_state(torch.load(tmp_path / "state", weights_only=True))
    advance(second, range(3, 6))
    assert whole.state()["ids"] == second.state()["ids"]
    for name, value in whole.net.state_dict().items():
        assert torch.equal(value, second.net.state_dict()[name])
