"""The frozen copy: mapped from its file where that is the same model, and safe to give back."""

import torch
from safetensors.torch import save_file

from meal_fast.config.config import PolicyConfig
from meal_fast.models.policy import load_policy
from meal_fast.models.reference_offload import FrozenCopy

IDS = torch.tensor([[5, 6, 7, 8]])


def policy_of(tuning):
    return load_policy(PolicyConfig(path="world:tiny", tuning=tuning, device="cpu"), ("a", "b"))


def test_weights_of_the_same_file_are_mapped_and_survive_their_release():
    policy = policy_of("full")
    frozen = policy.frozen
    assert frozen._ranges, "the tiny world's own file holds these weights"
    before = frozen.model(input_ids=IDS, use_cache=False).logits
    with torch.no_grad():
        for parameter in policy.trainable:
            parameter += 1.0
    frozen.release()
    torch.testing.assert_close(
        frozen.model(input_ids=IDS, use_cache=False).logits, before, rtol=0, atol=0
    )
    moved = policy.model(input_ids=IDS, use_cache=False).logits
    assert not torch.allclose(moved, before), "the policy trains, the copy does not"


def test_the_reference_of_a_policy_is_where_it_started():
    policy = policy_of("full")
    with policy.reference() as reference:
        before = reference.body(input_ids=IDS, use_cache=False).last_hidden_state
    with torch.no_grad():
        for parameter in policy.trainable:
            parameter.mul_(1.5)
    with policy.reference() as reference:
        after = reference.body(input_ids=IDS, use_cache=False).last_hidden_state
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_folder_with_other_weights_is_not_used(tmp_path):
    policy = policy_of("lora")
    model = policy.causal_lm
    changed = {n: p.detach() + 1 for n, p in model.named_parameters()}
    save_file(changed, str(tmp_path / "model.safetensors"))
    for folder in (str(tmp_path), "some/hub-name"):
        copied = FrozenCopy(model, folder)
        assert not copied._ranges
        copied.release()
        for mine, theirs in zip(copied.model.parameters(), model.parameters(), strict=True):
            assert torch.equal(mine, theirs) and mine.data_ptr() != theirs.data_ptr()
