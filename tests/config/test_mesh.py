"""Processes laid out by the options, and what cannot be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meal_fast.config.config import from_dict
from meal_fast.config.mesh import Layout, layout, world_of
from meal_fast.config.presets import preset


def laid(world, **sections):
    return layout(from_dict({"rollout": {"prompts": 16}, **sections}, preset("tiny")), world)


@pytest.mark.parametrize(
    ("world", "sections", "want"),
    [
        (1, {}, (1, 1, 1, 1)),
        (2, {}, (2, 1, 1, 1)),  # the preferences first
        (8, {}, (2, 4, 1, 4)),  # then the data
        (3, {"rollout": {"prompts": 3}}, (1, 3, 1, 3)),  # groups of equal size alone
        (8, {"meta": {"tasks": 8}, "mesh": {"data": 2}}, (4, 2, 1, 2)),
        (8, {"mesh": {"shard": 2}}, (2, 2, 2, 4)),
        (4, {"recipe": "meal"}, (1, 4, 1, 4)),
        (4, {"recipe": "rewarded-soups"}, (2, 2, 1, 2)),
        (2, {"mesh": {"virtual": 8}}, (2, 1, 1, 8)),
    ],
)
def test_what_is_left_open_is_chosen(world, sections, want):
    found = laid(world, **sections)
    assert (found.groups, found.data, found.shard, found.virtual) == want
    assert found.world == world


@pytest.mark.parametrize(
    ("world", "sections", "said"),
    [
        (4, {"mesh": {"groups": 3}}, "mesh.groups=3: a meta-step has meta.tasks=2"),
        (4, {"mesh": {"groups": 2, "data": 1}}, "is 2 processes, and 4 processes started"),
        (1, {"mesh": {"groups": 2}}, "is 2 processes, and 1 process started"),
        (4, {"mesh": {"shard": 3}}, "mesh.shard=3: 4 processes started"),
        (4, {"mesh": {"virtual": 3}}, "mesh.virtual=3: data x shard = 2 x 1"),
        (1, {"mesh": {"virtual": 3}}, "mesh.virtual=3: an update has rollout.prompts=16"),
        (2, {"recipe": "meal", "mesh": {"groups": 2}}, "mesh.groups=2: recipe meal"),
        (2, {"recipe": "grid-grpo", "mesh": {"groups": 2}}, "mesh.groups=2: recipe grid-grpo"),
        (2, {"policy": {"device": "cuda:0"}}, "policy.device='cuda:0': 2 processes"),
    ],
)
def test_what_cannot_be_names_option_and_remedy(world, sections, said):
    with pytest.raises(ValueError) as raised:
        laid(world, **sections)
    assert said in str(raised.value)


@given(
    groups=st.integers(1, 5), data=st.integers(1, 4), shard=st.integers(1, 3),
    each=st.integers(1, 3), tasks=st.integers(1, 12),
)  # fmt: skip
def test_every_task_and_every_part_has_one_place(groups, data, shard, each, tasks):
    found = Layout(groups, data, shard, each * data * shard)
    numbers = [n for g in range(groups) for n in found.tasks(g, tasks)]
    assert numbers == list(range(tasks))
    sizes = [len(found.tasks(g, tasks)) for g in range(groups)]
    assert max(sizes) - min(sizes) <= 1
    for group in range(groups):
        ranks = range(group * found.parts, (group + 1) * found.parts)
        assert [n for r in ranks for n in found.shards(r)] == list(range(found.virtual))
        assert {found.place(r)[0] for r in ranks} == {group}
    places = {found.place(r) for r in range(found.world)}
    assert len(places) == found.world


@pytest.mark.parametrize("held", [("x", "2"), ("2", "2"), ("", "2"), ("0", ""), ("-1", "2")])
def test_variables_of_no_launcher_are_refused(held):
    with pytest.raises(ValueError, match=r"^RANK, WORLD_SIZE="):
        world_of(dict(zip(("RANK", "WORLD_SIZE"), held, strict=True)))
