"""The learner on pairs, against the loss written out pair by pair."""

import dataclasses

import pytest
import torch

from meal_fast.config.config import from_dict
from meal_fast.config.mesh import Layout
from meal_fast.config.presets import preset
from meal_fast.training.collectors.base import collected
from meal_fast.training.distributed import Mesh
from meal_fast.training.losses.dpo import dpo
from meal_fast.training.trainer import Trainer
from tests.helpers.processes import refused
from tests.helpers.run_folder import tiny_config
from tests.training.test_grpo import TEMPERATURE, gradients, logp_of, setting  # noqa: F401  (a fixture)


def plain(policy, rolled, score_R, beta):
    """The loss and the margins; the gradient is left in the policy."""
    with policy.reference() as reference, torch.no_grad():
        base = [float(logp_of(reference, rolled, r).sum()) for r in range(12)]
    margins = []
    for r in range(0, 12, 2):
        if score_R[r] == score_R[r + 1]:
            continue
        best, worst = (r, r + 1) if score_R[r] > score_R[r + 1] else (r + 1, r)
        h = [logp_of(policy.network, rolled, i).sum() - base[i] for i in (best, worst)]
        margins.append(beta * (h[0] - h[1]))
    loss = sum(torch.log(1 + torch.exp(-m)) for m in margins) / len(margins)
    loss.backward()
    return float(loss.detach()), [float(m.detach()) for m in margins]


@pytest.mark.parametrize("budget", [40, 4000])
def test_loss_and_gradient_equal_the_plain_computation(setting, budget):  # noqa: F811
    policy, rolled, scored = setting
    score_R = torch.tensor([0.1, 0.4, 0.3, 0.2, 0.5, 0.5, -1.0, 2.0, 0.0, 0.1, 0.7, 0.6])
    config = dataclasses.replace(tiny_config().grpo, beta=0.7, micro_tokens=budget)
    loss, margins = plain(policy, rolled, score_R, 0.7)
    expected = gradients(policy)
    metrics = dpo(policy, rolled, dataclasses.replace(scored, score_R=score_R), config, TEMPERATURE)
    found = gradients(policy)
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-4)
    assert int(metrics["pairs"]) == len(margins) == 5
    assert float(metrics["margin"]) == pytest.approx(sum(margins) / 5, abs=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx(sum(m > 0 for m in margins) / 5)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_pairs_of_equal_scores_alone_give_no_gradient(setting):  # noqa: F811
    policy, rolled, scored = setting
    equal = dataclasses.replace(scored, score_R=torch.zeros(12))
    metrics = dpo(policy, rolled, equal, tiny_config().grpo, TEMPERATURE)
    assert gradients(policy) == {} and float(metrics["loss"]) == 0


def test_what_cannot_be_paired_is_refused(setting, capfd, tmp_path):  # noqa: F811
    policy, rolled, scored = setting
    odd = dataclasses.replace(rolled, group_R=torch.tensor([0] * 3 + [1] * 9))
    with pytest.raises(ValueError, match="even number"):
        dpo(policy, odd, scored, tiny_config().grpo, TEMPERATURE)
    refused(
        capfd,
        ["tiny", "--recipe", "mo-odpo", "--rollout.samples", "5", "--out", str(tmp_path / "x")],
        "rollout.samples=5",
        "even",
    )


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("virtual", [1, 2])
def test_an_update_without_an_ordered_pair_is_no_step_in_any_number_of_parts(tmp_path, virtual):
    changes = {"recipe": "mo-odpo", "grpo": {"beta": 0.1}, "score": {"calibration": 4}}
    config = from_dict(changes | {"mesh": {"virtual": virtual}}, preset("tiny"))
    trainer = Trainer(config, tmp_path / "run", mesh=Mesh(Layout(virtual=virtual)))
    trainer.meta_step()  # Adam has a momentum now
    trainer.step += 1
    tasks = trainer.tasks([(0, (0.5, 0.5))], 0)
    batch = collected(trainer.collector, trainer.objectives, tasks)
    equal = dataclasses.replace(batch.scored, score_R=torch.zeros_like(batch.scored.score_R))
    before = [p.detach().clone() for p in trainer.policy.trainable]
    (told,) = trainer.update_policy(dataclasses.replace(batch, scored=equal), tasks)
    assert told["pairs"] == told["loss"] == told["grad_norm"] == 0
    for p, old in zip(trainer.policy.trainable, before, strict=True):
        assert torch.equal(p, old)
