"""What a run makes does not depend on how many processes make it: real ones, gloo, bit by bit."""

import functools

import pytest

from tests.helpers.mesh_runs import Run, left_by, session

FEW = {"steps": 2}
CHEAP = {"score": {"calibration": 4}, "completions": True}
# By name: options, and the layouts (groups, data) of two processes to try them on.
TWO = {
    "persist_v": ({"meta": FEW}, (2, 1)),
    "reset": ({"meta": FEW | {"adam": "reset", "tasks": 3}}, (2, 1)),
    "per_preference": (
        {"meta": FEW | {"adam": "per_preference", "tasks": 4}, "preference": {"grid": 3}},
        (2, 1),
    ),
    "parallel": ({"meta": FEW | {"parallel": True, "tasks": 4}, "mesh": {"virtual": 1}}, (2, 1)),
    "parallel, one preference in both groups": (
        {
            "meta": FEW | {"parallel": True, "tasks": 4, "adam": "per_preference"},
            "preference": {"grid": 2},
            "mesh": {"virtual": 1},
        },
        (2, 1),
    ),
    "soups": ({"recipe": "rewarded-soups", "meta": FEW}, (2, 1)),
    "morlhf": ({"recipe": "morlhf", "meta": FEW}, (2, 1)),
    "data": ({"meta": FEW, "mesh": {"virtual": 2}}, (1, 2)),
    "odd reduce": (
        {"meta": FEW, "mesh": {"virtual": 2}, "grpo": {"reduce": "dr_grpo", "epochs": 2}},
        (1, 2),
    ),
    "exact KL": (
        {"meta": FEW, "mesh": {"virtual": 2}, "grpo": {"kl": "exact", "beta": 0.1, "keep": 2}},
        (1, 2),
    ),
    "stacked": ({"meta": FEW | {"parallel": True}, "mesh": {"virtual": 2}}, (1, 2)),
    "full": ({"meta": FEW, "mesh": {"virtual": 2}, "policy": {"tuning": "full"}}, (1, 2)),
    "mates": (
        {"meta": FEW, "mesh": {"virtual": 2}, "preference": {"per_prompt": 2}},
        (1, 2),
    ),
    "soups by data": ({"recipe": "rewarded-soups", "meta": FEW, "mesh": {"virtual": 2}}, (1, 2)),
    "morlhf by data": ({"recipe": "morlhf", "meta": FEW, "mesh": {"virtual": 2}}, (1, 2)),
    "grid-grpo": ({"recipe": "grid-grpo", "meta": FEW, "mesh": {"virtual": 2}}, (1, 2)),
    "grid-meta-grpo": ({"recipe": "grid-meta-grpo", "meta": FEW, "mesh": {"virtual": 2}}, (1, 2)),
    "weighted-grpo": ({"recipe": "weighted-grpo", "meta": FEW, "mesh": {"virtual": 2}}, (1, 2)),
    "mo-odpo": (
        {
            "recipe": "mo-odpo",
            "meta": FEW,
            "mesh": {"virtual": 2},
            "grpo": {"beta": 0.1},
        },
        (1, 2),
    ),
    "meal": ({"recipe": "meal", "meta": FEW, "mesh": {"virtual": 2}}, (1, 2)),
    "hypergradient": (
        {
            "recipe": "meal",
            "meta": FEW,
            "mesh": {"virtual": 2},
            "meal": {"update": "hypergradient", "every": 1},
            "rollout": {"prompts": 4},
        },
        (1, 2),
    ),
    "meal by grpo": (
        {"recipe": "meal", "meta": FEW, "mesh": {"virtual": 2}, "meal": {"policy": "grpo"}},
        (1, 2),
    ),
    "parm": ({"recipe": "parm", "meta": FEW, "mesh": {"virtual": 2}}, (1, 2)),
    "ric": ({"recipe": "ric", "meta": {"steps": 4}, "mesh": {"virtual": 2}}, (1, 2)),
}


def with_layout(options, groups, data):
    return {**options, "mesh": {**options.get("mesh", {}), "groups": groups, "data": data}}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """All of TWO, on one process and on two: what is left of each."""
    folder = tmp_path_factory.mktemp("mesh")
    alone = [Run(str(folder / f"{name} 1"), CHEAP | of) for name, (of, _) in TWO.items()]
    both = [
        Run(str(folder / f"{name} 2"), CHEAP | with_layout(options, *laid))
        for name, (options, laid) in TWO.items()
    ]
    return folder, dict(
        zip(TWO, zip(session(1, alone), session(2, both), strict=True), strict=True)
    )


@pytest.mark.parametrize("name", list(TWO))
def test_two_processes_make_what_one_makes(two, name):
    folder, said = two
    (one,), (first, second) = said[name]
    assert left_by(folder / f"{name} 1") == left_by(folder / f"{name} 2")
    own = "soups" not in name and name != "morlhf"  # there each group has other models at the end
    for key in ("finished", "step", "tokens", *(["state"] if own else [])):
        assert one[key] == first[key] == second[key], key
    assert one["finished"] and not any(one["sent"].values())


def test_between_groups_goes_one_delta_and_one_v_a_meta_step(two):
    """And within a group one gradient an update: what a ring would send, and a few numbers."""
    folder, said = two
    _, (first, _) = said["persist_v"]
    parameters = trained(folder / "persist_v 1")
    floor = 2 * 4 * parameters  # delta and v, 2 (P - 1)/P of each with P = 2
    steps = 2
    assert steps * floor <= first["sent"]["across"] <= steps * (floor + 4 * 8 * 2)
    assert first["sent"]["group"] == 0
    _, (first, _) = said["data"]
    updates, own = 8, first["sent"]["group"] / 8
    assert 4 * parameters <= own <= 4 * parameters + 8 * 2 * 32, (updates, own)
    assert first["sent"]["across"] == 0


@functools.cache
def trained(run):
    from safetensors.torch import load_file

    factors = load_file(run / "policy" / "adapter" / "adapter_model.safetensors")
    return sum(value.numel() for value in factors.values())


FOUR = {"meta": {"steps": 3, "tasks": 4}, "rollout": {"prompts": 4}, "mesh": {"virtual": 4}}


@pytest.mark.slow
def test_every_layout_of_four_processes_makes_the_same(tmp_path):
    session(1, [Run(str(tmp_path / "1 1"), FOUR)])
    for world, layouts in ((2, ((1, 2), (2, 1))), (4, ((1, 4), (2, 2), (4, 1)))):
        runs = [Run(str(tmp_path / f"{g} {d}"), with_layout(FOUR, g, d)) for g, d in layouts]
        said = session(world, runs)
        for of_run, run in zip(said, runs, strict=True):
            assert len({one["state"] for one in of_run}) == 1
            assert left_by(tmp_path / "1 1") == left_by(tmp_path / run.out)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["persist_v", "reset", "per_preference"])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, mode):
    """A stop that the main process alone is told of, on 4; then 2; then 1."""
    options = FOUR | {"meta": FOUR["meta"] | {"adam": mode}}
    session(1, [Run(str(tmp_path / "whole"), options)])
    out = str(tmp_path / "parts")
    for world, laid, stop in ((4, (2, 2), 1), (2, (2, 1), 2), (1, (1, 1), 0)):
        run = Run(out, with_layout(options, *laid), resume=stop != 1, stop_after=stop)
        (said,) = session(world, [run])
        assert {one["finished"] for one in said} == {stop == 0}
        assert {one["step"] for one in said} == {stop or 3}
    assert left_by(tmp_path / "whole") == left_by(tmp_path / "parts")
