"""Reptile's arithmetic, with an inner 'update' that is known exactly."""

import dataclasses

import pytest
import torch

from meal_fast.config.config import GRPOConfig, MetaConfig
from meal_fast.training.outer import Joint, Reptile, Separate

META = MetaConfig(steps=4, tasks=2, n_inner=2, epsilon=1.5)


def make(outer=Reptile, **changes):
    parameters = [torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.nn.Parameter(torch.zeros(1))]
    return outer(parameters, dataclasses.replace(META, **changes), GRPOConfig(lr=0.1))


def begin(loop, tasks=2):
    """Begin a meta-step of tasks that are then run in their order."""
    loop.begin([[(number, (1.0, 0.0)) for number in range(tasks)]])
    loop.numbers = iter(range(tasks))


def run_task(loop, w, gradient, updates=2):
    loop.begin_task(w)
    for _ in range(updates):
        for parameter in loop.parameters:
            parameter.grad = torch.full_like(parameter, gradient)
        loop.optimizer.step()
    loop.end_task(next(getattr(loop, "numbers", iter([0]))), w)


def theta(loop):
    return torch.cat([p.detach().clone() for p in loop.parameters])


def test_the_step_is_epsilon_times_the_mean_of_the_deltas():
    loop = make()
    start = theta(loop)
    begin(loop)
    ends = []
    for w, gradient in (((1.0, 0.0), 1.0), ((0.0, 1.0), 0.5)):
        loop.begin_task(w)
        assert torch.equal(theta(loop), start)  # every task starts from the snapshot
        run_task(loop, w, gradient)
        ends.append(theta(loop))
    metrics = loop.end(0.25)
    epsilon = 1.5 * (1 - 1 / 4)
    want = start + epsilon * (torch.stack(ends).mean(0) - start)
    torch.testing.assert_close(theta(loop), want)
    assert metrics["delta_norm"] == pytest.approx(float((want - start).norm()), rel=1e-5)
    assert metrics["delta_cosine"] == pytest.approx(1.0, abs=1e-4)


def test_opposed_tasks_cancel_and_the_clip_bounds_the_step():
    loop = make()
    begin(loop)
    run_task(loop, (1.0, 0.0), 1.0)
    run_task(loop, (0.0, 1.0), -1.0)
    metrics = loop.end(0.0)
    assert metrics["delta_cosine"] == pytest.approx(-1.0, abs=1e-4)
    torch.testing.assert_close(theta(loop), torch.tensor([1.0, 2.0, 0.0]))

    loop = make(max_delta=0.01)
    start = theta(loop)
    begin(loop)
    run_task(loop, (1.0, 0.0), 1.0)
    run_task(loop, (0.0, 1.0), 1.0)
    assert loop.end(0.0)["delta_norm"] > 0.01  # as it was before the clip
    assert float((theta(loop) - start).norm()) == pytest.approx(0.01, rel=1e-4)


def test_persist_v_does_not_depend_on_the_order_of_the_tasks():
    ends = []
    for order in ([0, 1], [1, 0]):
        loop = make()
        for step in range(2):
            begin(loop)
            for task in order:
                run_task(loop, (1.0 - task, float(task)), (0.3, -2.0)[task])
            loop.end(step / 4)
        ends.append((theta(loop), loop.state()["adam"]["exp_avg_sq"]))
    torch.testing.assert_close(ends[0], ends[1])
    assert all((v > 0).all() for v in ends[0][1])


@pytest.mark.parametrize("mode", ["persist_v", "reset", "per_preference"])
def test_adam_state_at_the_start_of_a_task(mode):
    loop = make(adam=mode)
    w = (1.0, 0.0)
    begin(loop)
    run_task(loop, w, 1.0)
    run_task(loop, (0.0, 1.0), 3.0)
    loop.end(0.0)
    begin(loop)
    loop.begin_task(w)
    state = loop._adam()
    if mode == "reset":
        assert state == {}
    else:
        v = {"persist_v": (1.0 + 9.0) / 2, "per_preference": 1.0}[mode] * (1 - 0.999**2)
        torch.testing.assert_close(state["exp_avg_sq"][1], torch.tensor([v]), rtol=1e-4, atol=0)
        assert float(state["step"][0]) == 2


@pytest.mark.parametrize("outer", [Joint, Reptile, Separate])
@pytest.mark.parametrize("mode", ["persist_v", "per_preference"])
def test_saved_state_goes_on_to_the_same_bits(outer, mode):
    def advance(loop, steps):
        for step in steps:
            begin(loop)
            run_task(loop, (1.0, 0.0), 0.7)
            run_task(loop, (0.5, 0.5), -0.2)
            loop.end(step / 4)

    whole, first, second = (make(outer, adam=mode) for _ in range(3))
    advance(whole, range(4))
    advance(first, range(2))
    second.load_state(first.state())
    advance(second, range(2, 4))
    assert torch.equal(theta(whole), theta(second))
    for w, values in whole.models().items():
        assert all(map(torch.equal, values, second.models()[w]))


GRADIENTS = {(1.0, 0.0): 0.7, (0.0, 1.0): -0.2, (0.5, 0.5): 3.0}


def test_separate_models_are_those_trained_alone():
    """Bit for bit, Adam's moments too, although their tasks take turns."""
    together = make(Separate)
    for step in range(3):
        begin(together, len(GRADIENTS))
        for w, gradient in GRADIENTS.items():
            run_task(together, w, gradient * (step + 1))
        together.end(step)
    models, adam = together.models(), together.state()["adam"]
    assert list(models) == list(GRADIENTS)
    for w, gradient in GRADIENTS.items():
        alone = make(Joint)
        for step in range(3):
            run_task(alone, w, gradient * (step + 1))
        for got, want in zip(models[w], alone.parameters, strict=True):
            assert torch.equal(got, want)
        for name, values in alone.state()["adam"].items():
            for got, want in zip(adam[w][name], values, strict=True):
                assert torch.equal(got, want)
        assert float(adam[w]["step"][0]) == 6


def test_spread_is_the_models_distance_to_their_mean():
    loop = make(Separate)
    begin(loop, len(GRADIENTS))
    for w in GRADIENTS:
        run_task(loop, w, GRADIENTS[w])
    flat = torch.stack([torch.cat([p.flatten() for p in m]) for m in loop.models().values()])
    want = (flat - flat.mean(0)).square().sum(1).mean().sqrt()
    assert loop.end(0)["spread"] == pytest.approx(float(want), rel=1e-5) and want > 0.1


def test_a_resumed_family_holds_every_model_from_the_file(tmp_path):
    loop, again = make(Separate), make(Separate)
    for w in GRADIENTS:
        run_task(loop, w, GRADIENTS[w])
    torch.save(loop.state(), tmp_path / "state.pt")
    again.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    for trained in (loop, again):
        run_task(trained, (0.0, 1.0), 0.1)
    for w in GRADIENTS:
        assert all(map(torch.equal, loop.models()[w], again.models()[w]))


def test_one_inner_update_is_refused():
    with pytest.raises(ValueError, match=r"meta\.n_inner=1.*joint training"):
        make(n_inner=1)
