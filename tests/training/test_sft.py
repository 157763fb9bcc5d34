"""The learner on kept responses, against the loss written out row by row."""

import dataclasses

import pytest
import torch

from meal_fast.data_types import Weighted
from meal_fast.training.losses.sft import sft
from tests.helpers.run_folder import tiny_config
from tests.training.test_grpo import TEMPERATURE, gradients, logp_of, setting  # noqa: F401  (a fixture)


def plain(policy, rolled, weight_R, config):
    """The loss's value; its gradient is left in the policy."""
    rows = range(len(rolled.group_R))
    with policy.reference() as reference, torch.no_grad():
        base = [logp_of(reference, rolled, r) for r in rows]
    tokens = rolled.mask_RT.sum()
    total = torch.zeros(())
    for r in rows:
        logp = logp_of(policy.network, rolled, r)
        gap = base[r] - logp
        kl = {"k1": -gap, "k2": gap.square() / 2, "k3": gap.exp() - 1 - gap}[config.kl]
        term = -weight_R[r] * logp + config.beta * kl
        share = {"grpo": 1 / len(logp) / len(rows), "dapo": 1 / tokens}[config.reduce]
        total = total + (term * share).sum()
    total.backward()
    return float(total.detach())


@pytest.mark.parametrize(("reduce", "kl"), [("grpo", "k3"), ("dapo", "k1"), ("grpo", "k2")])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_loss_and_gradient_equal_the_plain_computation(setting, reduce, kl, beta):  # noqa: F811
    policy, rolled, scored = setting
    rolled = dataclasses.replace(rolled, on_policy=False)  # as kept rows are
    weight_R = torch.rand(12, generator=torch.Generator().manual_seed(1))
    scored = Weighted(scored.reward_RK, scored.score_R, weight_R)
    config = dataclasses.replace(
        tiny_config().grpo, beta=beta, kl=kl, reduce=reduce, micro_tokens=40
    )
    loss = plain(policy, rolled, weight_R, config)
    expected = gradients(policy)
    metrics = sft(policy, rolled, scored, config, TEMPERATURE)
    found = gradients(policy)
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-4, abs=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    nll = -torch.cat([logp_of(policy.network, rolled, r) for r in range(12)]).mean()
    assert float(metrics["nll"]) == pytest.approx(float(nll.detach()), rel=1e-4)


def test_the_exact_kl_is_refused(setting):  # noqa: F811
    policy, rolled, scored = setting
    config = dataclasses.replace(tiny_config().grpo, kl="exact", beta=0.1)
    with pytest.raises(ValueError, match=r"grpo\.kl='exact'"):
        sft(policy, rolled, scored, config, TEMPERATURE)
