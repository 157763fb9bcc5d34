"""An update's requests in parts, and the rows put together again in their order."""

import dataclasses

import pytest
import torch

from meal_fast.config.presets import preset
from meal_fast.data_types import Prompt
from meal_fast.rollout import Request, rollout
from meal_fast.training.losses.sequences import Part, rows_of, runs
from meal_fast.training.parts import moved, positions, together
from tests.helpers.run_folder import tiny_policy


def requests(count, tasks=1):
    return [
        Request(Prompt(f"p{i}", f"Say {i}."), (0.5, 0.5), 2 + i % 2, task_id=t)
        for t in range(tasks)
        for i in range(count)
    ]


def drawn():
    policy = tiny_policy(preset("tiny"))
    return rollout(policy, requests(5), max_new_tokens=6, temperature=1.0, seed=0)


@pytest.mark.parametrize(("count", "parts", "tasks"), [(4, 2, 1), (5, 3, 1), (4, 4, 2), (3, 1, 2)])
def test_parts_are_neighbours_and_hold_every_request_once(count, parts, tasks):
    found = positions(requests(count, tasks), parts)
    assert sorted(p for part in found for p in part) == list(range(count * tasks))
    for part in found:
        for task in range(tasks):
            own = [p for p in part if p // count == task]
            assert own == list(range(own[0], own[-1] + 1))


def test_fewer_requests_than_parts_are_refused():
    with pytest.raises(ValueError, match=r"^mesh\.virtual=3: an update has 2 requests"):
        positions(requests(2), 3)


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_rows_come_back_in_the_order_of_the_requests(parts):
    policy, asked = tiny_policy(preset("tiny")), requests(5)
    how = {"max_new_tokens": 6, "temperature": 1.0, "seed": 0}
    whole = rollout(policy, asked, **how)
    places = positions(asked, parts)
    parted = [moved(rollout(policy, [asked[i] for i in own], **how), "cpu") for own in places]
    rolled, order_R = together(parted, places)
    for field in dataclasses.fields(whole):
        mine, theirs = getattr(rolled, field.name), getattr(whole, field.name)
        if field.name == "logp_RT":  # which a product of other rows beside it may round otherwise
            torch.testing.assert_close(mine, theirs)
        elif field.name not in ("seconds", "prefill_tokens", "reused_tokens"):
            assert torch.equal(mine, theirs) if torch.is_tensor(mine) else mine == theirs
    assert rolled.groups == whole.groups and rolled.lengths == whole.lengths
    numbers = torch.cat([d.tokens_RT.sum(1) for d in parted])
    assert torch.equal(numbers[order_R], whole.tokens_RT.sum(1))


@pytest.mark.parametrize("of", [1, 2, 3, 8])
def test_every_row_is_differentiated_once_and_no_group_is_split(of):
    rolled = drawn()
    parts = [rows_of(rolled, Part(n, of)) for n in range(of)]
    assert [row for part in parts for row in part] == list(range(len(rolled.groups)))
    owners = {}
    for n, part in enumerate(parts):
        for row in part:
            assert owners.setdefault(rolled.groups[row], n) == n


@pytest.mark.parametrize("of", [2, 3, 8])
def test_parts_that_hold_a_model_together_make_as_many_passes(of):
    rolled = drawn()
    made = [runs(rolled, 30, Part(n, of, even=True)) for n in range(of)]
    assert len({len(of_part) for of_part in made}) == 1
    real = [row for of_part in made for run in of_part if not run.dummy for row in run.rows]
    assert real == list(range(len(rolled.groups)))
    assert any(run.dummy for of_part in made for run in of_part)
    assert all(runs(rolled, 30, Part(n, of)) for n in range(of))  # one pass at least
