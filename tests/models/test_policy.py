"""The policy's kinds: one surface, and nobody who goes behind it."""

import re
from pathlib import Path

import pytest
import torch

from meal_fast.config.config import PolicyConfig
from meal_fast.models.policy import FullPolicy, LoRAPolicy, PBLoRAPolicy, Policy, load_policy

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"full": FullPolicy, "lora": LoRAPolicy, "bilinear": PBLoRAPolicy}
IDS = torch.tensor([[5, 6, 7, 8]])


def policy_of(tuning: str) -> Policy:
    return load_policy(PolicyConfig(path="world:tiny", tuning=tuning, device="cpu"), ("a", "b"))


@pytest.mark.parametrize("tuning", list(KINDS))
def test_tuning_makes_the_kind_and_the_reference_is_where_it_started(tuning):
    policy = policy_of(tuning)
    assert type(policy) is KINDS[tuning]
    assert policy.network.body is policy.causal_lm.base_model
    assert (policy.reference_lm is policy.causal_lm) == (tuning != "full")
    assert (policy.adapter is not None) == (tuning == "bilinear")
    assert (policy.rank > 0) == (tuning == "lora")
    with policy.reference() as base:
        assert base.body is policy.reference_lm.base_model
        before = base.body(input_ids=IDS, use_cache=False).last_hidden_state
    with torch.no_grad():
        for parameter in policy.trainable:
            parameter += 0.1
    with policy.reference() as base:
        after = base.body(input_ids=IDS, use_cache=False).last_hidden_state
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("tuning", list(KINDS))
def test_what_is_held_is_given_back_also_when_something_fails(tuning):
    policy = policy_of(tuning)
    before = {name: p.detach().clone() for name, p in policy.named.items()}
    values = {name: p + 1 for name, p in before.items()}
    with pytest.raises(RuntimeError, match="inside"), policy.holding(values):
        assert all(torch.equal(p, values[name]) for name, p in policy.named.items())
        raise RuntimeError("inside")
    assert all(torch.equal(p, before[name]) for name, p in policy.named.items())


@pytest.mark.parametrize("tuning", list(KINDS))
def test_the_merged_state_is_a_plain_models(tuning):
    policy = policy_of(tuning)
    plain = policy_of("full").causal_lm.state_dict()
    merged = policy.merged_state()
    assert merged.keys() == plain.keys()
    for name, value in plain.items():  # nothing is trained yet
        torch.testing.assert_close(merged[name], value, rtol=0, atol=0)


def behind(source: str) -> list[str]:
    """Uses of what a policy keeps for itself."""
    return re.findall(r"\bpolicy\._(?!_)\w+|\._base\b|\._frozen\b", source)


def test_nobody_goes_behind_a_policy():
    assert behind("cut(self.policy._base)") and behind("x._frozen.model")
    found = {
        str(path.relative_to(ROOT)): uses
        for room in ("meal_fast", "bench", "tools")
        for path in (ROOT / room).rglob("*.py")
        if (uses := behind(path.read_text()))
    }
    assert found == {}
