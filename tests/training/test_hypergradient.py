"""The hypergradient against a finite difference of the two-level objective itself, in float64."""

import dataclasses

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from meal_fast import ops
from meal_fast.models.policy import load_policy
from meal_fast.training.hypergradient import coefficients, hypergradient
from meal_fast.training.losses.sequences import gradient
from meal_fast.training.net_trainer import NetTrainer, acceptance_weights
from meal_fast.training.preference_net import PreferenceNet, features
from tests.helpers.run_folder import tiny_config, tiny_policy
from tests.training.test_sequences import TEMPERATURE, plain, uneven

MU, TAU_A, ETA = 0.1, 0.2, 0.1
OPTIONS = {"eta": ETA, "temperature": TEMPERATURE, "micro_tokens": 60}


@dataclasses.dataclass
class Case:
    """Three groups of three kept rows; the net's weights for two of them, the last drawn."""

    policy: object
    inner: object
    held_out: object
    normalized_RK: torch.Tensor
    utopia: torch.Tensor
    z_BK: torch.Tensor  # logits of w⁰

    group_R = torch.arange(9) // 3
    predicted_R = torch.arange(9) < 6

    def weights(self, z_BK):
        return torch.softmax(z_BK, -1)[self.group_R]

    def coefficients(self, z_BK):
        return coefficients(
            self.normalized_RK,
            self.weights(z_BK),
            self.predicted_R,
            self.group_R,
            utopia=self.utopia,
            tau_a=TAU_A,
            mu=MU,
        )


def case(tuning, k):
    """In float64. transformers' norm goes through float32: torch's own takes its place."""
    config = tiny_config(policy={"tuning": tuning})
    lora = tuning == "lora"
    policy = tiny_policy(config) if lora else load_policy(config.policy, config.names)
    inner, held_out = uneven(policy), uneven(policy, samples=2, seed=5, w=(0.2, 0.8))
    policy.model.double()
    for module in list(policy.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LlamaRMSNorm):
                norm = nn.RMSNorm(child.weight.shape, child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(module, name, norm)
    generator = torch.Generator().manual_seed(k)
    normalized = torch.rand(9, k, generator=generator, dtype=torch.float64)
    z = torch.randn(3, k, generator=generator, dtype=torch.float64)
    return Case(policy, inner, held_out, normalized, torch.full((k,), 1.1).double(), z)


@pytest.fixture(scope="module", params=[("lora", 2), ("full", 3)], ids=["lora-2", "full-3"])
def wide(request):
    return case(*request.param)


def meta_loss(case, z_BK):
    """L_meta(θ − η ∇_θ Σ a_i ℓ_i), everything in full: scores, weights, logits, the step."""
    shortfall = case.weights(z_BK) * (case.utopia - case.normalized_RK)
    power = torch.exp(-MU * torch.logsumexp(shortfall / MU, -1) / TAU_A)
    a = power / torch.stack([power[case.group_R == g].sum() for g in case.group_R])
    parameters = case.policy.trainable
    loss = -(a * plain(case.policy.network, case.inner)).sum()
    step = torch.autograd.grad(loss, parameters)
    theta = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, g in zip(parameters, step, strict=True):
            p -= ETA * g
        out = -plain(case.policy.network, case.held_out).mean()
        for p, value in zip(parameters, theta, strict=True):
            p.copy_(value)
    return float(out)


def finite_difference(case, h=1e-4):
    """d meta_loss / d z, entry by entry; where w⁰ was drawn, there is no z to move."""
    out = torch.zeros_like(case.z_BK)
    for b in range(2):
        for k in range(case.z_BK.shape[1]):
            ends = []
            for sign in (1, -1):
                z = case.z_BK.clone()
                z[b, k] += sign * h
                ends.append(meta_loss(case, z))
            out[b, k] = (ends[0] - ends[1]) / (2 * h)
    return out


def through(case, derivative_R):
    z = case.z_BK.clone().requires_grad_()
    (case.coefficients(z) * derivative_R).sum().backward()
    return z.grad


def error(got, want):
    return float((got - want).norm() / want.norm())


def test_it_is_the_derivative_of_the_two_level_objective(wide):
    want = finite_difference(wide)
    a_R = wide.coefficients(wide.z_BK)
    derivative, metrics = hypergradient(wide.policy, wide.inner, a_R, wide.held_out, **OPTIONS)
    assert derivative.dtype == torch.float64 and not derivative.requires_grad
    assert metrics["meta_loss"] == pytest.approx(meta_loss(wide, wide.z_BK), rel=1e-6)
    got = through(wide, derivative)
    assert error(got, want) < 1e-3
    assert torch.equal(got[2], torch.zeros_like(got[2]))  # its w⁰ was drawn
    wide.policy.model.float()
    single, _ = hypergradient(wide.policy, wide.inner, a_R.float(), wide.held_out, **OPTIONS)
    wide.policy.model.double()
    assert single.dtype == torch.float32 and error(through(wide, single.double()), want) < 1e-3
    # That v is taken at θ′ is more than this test's tolerance: at θ it is another gradient.
    share = torch.full((6,), -1 / 6, dtype=torch.float64)
    _, v = gradient(wide.policy, wide.held_out, share, TEMPERATURE, micro_tokens=999)
    slopes = []
    for row in range(9):
        one = torch.zeros(9, dtype=torch.float64)
        one[row] = ETA
        _, g = gradient(wide.policy, wide.inner, one, TEMPERATURE, micro_tokens=999)
        slopes.append(sum((x * y).sum() for x, y in zip(v, g, strict=True)))
    assert error(through(wide, torch.stack(slopes)), want) > 1e-2


def test_it_is_two_passes_there_and_back_and_two_there(wide, monkeypatch):
    calls = []

    def spy(hidden, *arguments, **options):
        calls.append((len(hidden), hidden.requires_grad))
        return linear_logprob(hidden, *arguments, **options)

    linear_logprob = ops.linear_logprob
    monkeypatch.setattr(ops, "linear_logprob", spy)
    a_R, options = wide.coefficients(wide.z_BK), OPTIONS | {"micro_tokens": 10**6}
    hypergradient(wide.policy, wide.inner, a_R, wide.held_out, **options)
    n, held = (int(m.sum()) for m in (wide.inner.mask_RT, wide.held_out.mask_RT))
    assert calls == [(n, True), (held, True), (n, False), (n, False)]


def test_held_out_rows_are_weighted(wide):
    """c = (2, 0, 0, …): as the first row alone, whose mean is over one."""
    a_R = wide.coefficients(wide.z_BK)
    c = torch.tensor([6.0, 0, 0, 0, 0, 0], dtype=torch.float64)
    got, _ = hypergradient(wide.policy, wide.inner, a_R, wide.held_out, held_out_R=c, **OPTIONS)
    h = wide.held_out
    alone = dataclasses.replace(
        h, group_R=h.group_R[:1], tokens_RT=h.tokens_RT[:1], mask_RT=h.mask_RT[:1]
    )
    want, _ = hypergradient(wide.policy, wide.inner, a_R, alone, **OPTIONS)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-8)
    zero, metrics = hypergradient(
        wide.policy, wide.inner, a_R, wide.held_out, held_out_R=0 * c, **OPTIONS
    )
    assert torch.equal(zero, torch.zeros_like(zero)) and metrics["meta_gradient_norm"] == 0


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_parameters_and_gradients_stay_bit_for_bit_also_after_a_failure(tuning):
    config = tiny_config(policy={"tuning": tuning})
    lora = tuning == "lora"
    policy = tiny_policy(config) if lora else load_policy(config.policy, config.names)
    inner, held_out = uneven(policy), uneven(policy, samples=2, seed=5, w=(0.2, 0.8))
    for p in policy.trainable:
        p.grad = torch.full_like(p, 0.25)
    before = [p.detach().clone() for p in policy.model.parameters()]
    got, _ = hypergradient(policy, inner, torch.ones(9) / 3, held_out, **OPTIONS)
    assert got.dtype == torch.float32 and got.abs().min() > 0
    # The last token of a row is not read, only predicted: the head refuses it, at θ′.
    tokens = held_out.tokens_RT.clone()
    tokens[-1, int(held_out.mask_RT[-1].sum()) - 1] = 10**6
    broken = dataclasses.replace(held_out, tokens_RT=tokens)
    with pytest.raises(ValueError, match="1000000, outside"):
        hypergradient(policy, inner, torch.ones(9) / 3, broken, **OPTIONS)
    for p, value in zip(policy.model.parameters(), before, strict=True):
        assert torch.equal(p, value)
    assert all(torch.equal(p.grad, torch.full_like(p, 0.25)) for p in policy.trainable)


def test_micro_batches_and_recomputing_do_not_change_it(wide):
    a_R = wide.coefficients(wide.z_BK)
    made = [
        hypergradient(
            wide.policy, wide.inner, a_R, wide.held_out, **OPTIONS | {"micro_tokens": n},
            recompute=recompute,
        )[0]
        for n, recompute in ((1, False), (10**6, False), (60, True))
    ]  # fmt: skip
    torch.testing.assert_close(made[1], made[0], rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(made[2], made[0], rtol=1e-6, atol=1e-12)


def test_the_net_goes_down_the_meta_loss():
    """From prompts to the net's parameters and back: a step along it lowers the true objective."""
    wide = case("lora", 2)
    h = features(wide.policy, wide.inner.prompts)
    net = PreferenceNet(("first", "second"), h.shape[1], hidden=8, seed=1)
    trainer = NetTrainer(net, lr=1e-2, gamma=0.0)
    trainer.add(wide.inner.prompts, h, torch.full((9, 2), 0.5), wide.group_R)
    wide.predicted_R = torch.ones(9, dtype=torch.bool)
    losses = []
    for _ in range(4):
        z = net(h).detach().double().log()
        losses.append(meta_loss(wide, z))
        a_R = coefficients(
            wide.normalized_RK.float(), net(h)[wide.group_R], wide.predicted_R, wide.group_R,
            utopia=wide.utopia.float(), tau_a=TAU_A, mu=MU,
        )  # fmt: skip
        derivative, _ = hypergradient(wide.policy, wide.inner, a_R, wide.held_out, **OPTIONS)
        assert trainer.descend((a_R * derivative).sum())
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1]


def test_coefficients_are_a_softmax_of_the_scores_and_drawn_rows_give_no_gradient():
    r = torch.tensor([[0.2, 0.6], [0.5, 0.4], [0.9, 0.1], [0.3, 0.3]])
    w = torch.tensor([[0.3, 0.7], [0.3, 0.7], [0.8, 0.2], [0.8, 0.2]], requires_grad=True)
    group, predicted = torch.tensor([0, 0, 1, 1]), torch.tensor([True, True, False, False])
    a = coefficients(r, w, predicted, group, utopia=None, tau_a=0.2, scalarization="linear")
    want = acceptance_weights((w * r).sum(1), group, 0.2)
    torch.testing.assert_close(a, want)
    a.square().sum().backward()
    assert torch.equal(w.grad[2:], torch.zeros(2, 2)) and w.grad[:2].abs().min() > 0
    with pytest.raises(ValueError, match="predicted_R: shape"):
        coefficients(r, w, predicted[:2], group, utopia=None, tau_a=0.2, scalarization="linear")
    with pytest.raises(ValueError, match=r"predicted_R\.dtype"):
        coefficients(r, w, group, group, utopia=None, tau_a=0.2, scalarization="linear")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"eta": 0.0}, "eta=0.0"),
        ({"a_R": torch.ones(3)}, r"a_R: shape \(3,\), expected \(9,\)"),
        ({"held_out_R": torch.ones(2)}, "held_out_R: shape"),
        ({"eta": 1e200}, "look ahead less far"),
        ({"inner": None}, "inner='no rows'"),
        ({"held_out": None}, "held_out='no rows'"),
    ],
)
def test_what_gives_no_hypergradient_is_refused(wide, change, match):
    def without_rows(r):
        return dataclasses.replace(
            r, group_R=r.group_R[:0], tokens_RT=r.tokens_RT[:0], mask_RT=r.mask_RT[:0]
        )

    arguments = {"inner": wide.inner, "a_R": torch.ones(9), "held_out": wide.held_out} | OPTIONS
    for name, value in change.items():
        arguments[name] = without_rows(arguments[name]) if value is None else value
    before = [p.detach().clone() for p in wide.policy.trainable]
    with pytest.raises(ValueError, match=match):
        hypergradient(wide.policy, **arguments)
    assert all(torch.equal(p, v) for p, v in zip(wide.policy.trainable, before, strict=True))
