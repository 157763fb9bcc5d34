"""Several models and what they make of a w: merges by hand, and in a real, tiny policy."""

import re

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from meal_fast.data.preferences import lattice
from meal_fast.data.toy import build_world
from meal_fast.models.model_soup import FILE, Family
from meal_fast.models.policy import Policy
from tests.helpers.run_folder import tiny_config, tiny_policy

CORNERS = ((1.0, 0.0), (0.0, 1.0))
IDS = torch.tensor([[3, 1, 4, 1, 5]])


def family_of(policy: Policy, weights=CORNERS, rule="interpolate") -> Family:
    """Random models of the policy's shapes."""
    generator = torch.Generator().manual_seed(5)
    models = [
        {n: 0.2 * torch.randn(p.shape, generator=generator) for n, p in policy.named.items()}
        for _ in weights
    ]
    return Family(weights, tuple(models), rule)


def logits(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return policy.causal_lm(input_ids=IDS).logits


@pytest.fixture(scope="module", params=["lora", "full"])
def policy(request):
    changes = {"policy": {"tuning": request.param}}
    return tiny_policy(tiny_config(**changes), scale=0.1)


# ---- by hand


def test_parameters_are_interpolated_at_w():
    one = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[4.0]])}
    two = {"a": torch.tensor([5.0, -2.0]), "b": torch.tensor([[0.0]])}
    theta = Family(CORNERS, (one, two), "interpolate").theta((0.25, 0.75))
    assert theta["a"].tolist() == [4.0, -1.0] and theta["b"].tolist() == [[1.0]]
    turned = Family(CORNERS[::-1], (two, one), "interpolate").theta((0.25, 0.75))
    assert turned["a"].tolist() == [4.0, -1.0]


def test_of_lora_the_products_are_interpolated_and_not_the_factors():
    one = {"x.lora_A.y": torch.tensor([[1.0, 2.0]]), "x.lora_B.y": torch.tensor([[3.0], [1.0]])}
    two = {"x.lora_A.y": torch.tensor([[0.0, 1.0]]), "x.lora_B.y": torch.tensor([[2.0], [4.0]])}
    theta = Family(CORNERS, (one, two), "interpolate").theta((0.5, 0.5))
    # 0.5 (3, 1)' (1, 2) + 0.5 (2, 4)' (0, 1); of the averaged factors: 1.25 and 3.75 in both rows
    assert (theta["x.lora_B.y"] @ theta["x.lora_A.y"]).tolist() == [[1.5, 4.0], [0.5, 3.0]]


def test_three_models_and_a_corner_is_its_model():
    models = tuple({"a": torch.tensor([float(10**j)])} for j in range(3))
    family = Family(lattice(3, 2), models, "interpolate")
    assert family.theta((0.5, 0.25, 0.25))["a"].item() == 0.5 + 2.5 + 25.0
    for w, model in zip(lattice(3, 2), models, strict=True):
        assert family.theta(w)["a"] is model["a"]


@pytest.mark.parametrize(
    ("w", "own"),
    [
        ((1.0, 0.0), 0),
        ((0.8, 0.2), 0),
        ((0.75, 0.25), 0),  # as near to the second: the first is taken
        ((0.7, 0.3), 1),
        ((0.25, 0.75), 1),
        ((0.1, 0.9), 2),
    ],
)
def test_the_nearest_model_serves(w, own):
    models = tuple({"a": torch.tensor([float(j)])} for j in range(3))
    family = Family(lattice(2, 3), models, "nearest")
    assert family.theta(w)["a"].item() == own
    assert family.shares(w) == tuple(float(j == own) for j in range(3))


def test_weights_that_the_same_parameters_serve_are_together():
    models = tuple({"a": torch.tensor([float(j)])} for j in range(2))
    weights = lattice(2, 5)
    assert Family(CORNERS, models, "nearest").groups(weights) == [[0, 1, 2], [3, 4]]
    assert Family(CORNERS, models, "interpolate").groups(weights) == [[0], [1], [2], [3], [4]]


# ---- in a policy


@pytest.mark.parametrize("w", [(0.3, 0.7), (0.5, 0.5), (0.0, 1.0)])
def test_the_policy_at_w_is_the_model_of_the_interpolated_weights(policy, tmp_path, w):
    """Every weight of it, LoRA merged; and as it is saved, for transformers and for PEFT."""
    family, before = family_of(policy), logits(policy)
    states = []
    for corner in CORNERS:
        with family.at(policy, corner):
            states.append(policy.merged_state())
    want = {name: w[0] * a + w[1] * states[1][name] for name, a in states[0].items()}
    with family.at(policy, w):
        for name, value in policy.merged_state().items():
            torch.testing.assert_close(value, want[name], atol=1e-5, rtol=1e-5)
        policy.save(tmp_path / "policy")
        inside = logits(policy)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, inside, atol=1e-4, rtol=1e-4)
        if policy.rank:
            base = AutoModelForCausalLM.from_pretrained(build_world("tiny"))
            adapted = PeftModel.from_pretrained(base, tmp_path / "policy" / "adapter")
            torch.testing.assert_close(adapted(IDS).logits, inside, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(before, inside, atol=1e-2)


def test_afterwards_the_policy_is_what_it_was_also_when_something_fails(policy):
    family, before = family_of(policy), logits(policy)
    places = [p.data_ptr() for p in policy.trainable]
    with pytest.raises(RuntimeError, match="inside"), family.at(policy, (0.5, 0.5)):
        raise RuntimeError("inside")
    assert [p.data_ptr() for p in policy.trainable] == places
    assert torch.equal(logits(policy), before)
    if policy.rank:
        settings = policy.model.peft_config["default"]
        assert (settings.r, settings.lora_alpha) == (4, 32)


def test_the_reference_is_the_base_within_it(policy):
    def of_reference():
        with policy.reference() as base, torch.no_grad():
            return base.body(input_ids=IDS).last_hidden_state

    before = of_reference()
    with family_of(policy).at(policy, (0.5, 0.5)):
        assert torch.equal(of_reference(), before)


# ---- the file


def test_a_family_reads_back_from_its_file(policy, tmp_path):
    for rule, weights in (("interpolate", CORNERS), ("nearest", lattice(2, 3))):
        family = family_of(policy, weights, rule)
        (tmp_path / FILE).write_bytes(family.to_bytes(policy.names))
        held = Family.load(tmp_path / FILE)
        assert (held.weights, held.rule) == (weights, rule)
        for one, other in zip(held.models, family.models, strict=True):
            assert list(one) and one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_file_without_a_family_is_refused(tmp_path):
    remedy = "finish the run with `python -m meal_fast.train --resume"
    for content in (None, b"", b"not safetensors"):
        if content is not None:
            (tmp_path / FILE).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{FILE}': no models of a family.*{remedy}"):
            Family.load(tmp_path / FILE)
    save_file({"a": torch.zeros(1)}, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"no models of a family \('family'\)"):
        Family.load(tmp_path / FILE)


# ---- what does not go together


def test_models_that_differ_are_refused_with_their_keys():
    a, b = torch.zeros(2, 3), torch.zeros(4)
    with pytest.raises(ValueError) as caught:
        Family(CORNERS, ({"same": b, "a": a, "b": b}, {"same": b, "a": a.T, "c": b}), "interpolate")
    message = str(caught.value)
    assert message == (
        "the models of w=(1.0, 0.0) and w=(0.0, 1.0) differ in b (in one alone), c (in one alone), "
        "a (2, 3) and (3, 2); train both from one model with the same options"
    )
    many = {f"p{i}": b for i in range(20)}
    with pytest.raises(ValueError, match=r"p15 \(in one alone\) and 12 more; train"):
        Family(CORNERS, (many, {}), "interpolate")


def test_a_policy_of_other_shapes_is_refused_and_left_alone(policy):
    family = family_of(policy)
    other = tiny_policy(tiny_config(policy={"lora_rank": 2, "tuning": "lora"}))
    before = logits(other)
    with pytest.raises(ValueError, match=r"the policy and the family's models differ in .*opt"):
        with family.at(other, (0.5, 0.5)):
            pass
    assert torch.equal(logits(other), before)


@pytest.mark.parametrize(
    ("weights", "count", "rule", "words"),
    [
        (CORNERS, 2, "average", "rule='average': choose from interpolate, nearest"),
        (CORNERS, 1, "nearest", "here are 1 models"),
        ((), 0, "nearest", "one model or more"),
        (((1.0, 0.0), (1.0, 0.0)), 2, "nearest", "each of another preference"),
        (lattice(2, 3), 3, "interpolate", "the models of the corners"),
        (((1.0, 0.0), (0.5, 0.5)), 2, "interpolate", "the models of the corners"),
    ],
)
def test_what_makes_no_family_is_refused(weights, count, rule, words):
    with pytest.raises(ValueError, match=words):
        Family(weights, tuple({"a": torch.zeros(1)} for _ in range(count)), rule)


@pytest.mark.parametrize("rule", ["interpolate", "nearest"])
@pytest.mark.parametrize(
    "w", [(1.0,), (0.5, 0.25, 0.25), (0.5, 0.6), (1.5, -0.5), (float("nan"),) * 2]
)
def test_a_w_off_the_simplex_is_refused(rule, w):
    family = Family(CORNERS, ({"a": torch.zeros(1)}, {"a": torch.ones(1)}), rule)
    with pytest.raises(ValueError, match=rf"^w={re.escape(str(w))}: must be 2 numbers"):
        family.shares(w)
