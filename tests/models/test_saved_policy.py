"""A saved policy is the one that was trained, stops where it stopped, and names no machine."""

import json
import os

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from meal_fast.config.config import PolicyConfig
from meal_fast.data_types import Prompt
from meal_fast.models.policy import load_policy
from meal_fast.rollout import Request, Sampling, open_backend
from meal_fast.rollout.sequence import as_drawn
from tests.helpers.chat_tokenizers import byte_level, saved

NAMES = ("first", "second")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def trained(path, tuning="lora", dtype="bfloat16", size=4e-3):
    config = PolicyConfig(path=str(path), tuning=tuning, dtype=dtype, device="cpu", lora_rank=4)
    policy = load_policy(config, NAMES)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable:
            parameter.normal_(0.0, size, generator=generator)
    return policy


@pytest.mark.reliability("silent", "a bfloat16 base whose LoRA factors are smaller than its steps")
@torch.no_grad()
def test_what_is_saved_is_what_was_trained_also_in_bfloat16(tmp_path, record_property):
    peft = pytest.importorskip("peft")
    policy = trained("world:tiny")
    policy.save(tmp_path / "policy")

    def logp(model):
        return model.float().eval()(IDS).logits.log_softmax(-1)

    path = policy.causal_lm.config.name_or_path
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).float()
    before = logp(base)
    apart = logp(peft.PeftModel.from_pretrained(base, tmp_path / "policy" / "adapter"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    went, off = (apart - before).abs().mean(), (logp(model) - apart).abs().mean()
    assert went > 0 and off < 1e-3 * went
    share = f"{100 * off / went:.2g} % of what training did"
    record_property("policy/ of a bfloat16 run differs from base and adapter by", share)
    # rounded to the base's type, much of it would be gone
    rounded = logp(AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.bfloat16))
    assert (rounded - apart).abs().mean() > 0.03 * went


@pytest.mark.reliability("silent", "a guide on a bfloat16 base")
def test_a_guide_is_merged_in_float32(tmp_path):
    policy = trained("world:tiny", "bilinear")
    policy.save(tmp_path / "policy")
    weights = load_file(tmp_path / "policy" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert weights[name].dtype == torch.float32
    assert not torch.equal(weights[name], weights[name].bfloat16().float())


@pytest.mark.reliability(
    "silent", "a saved policy stops at the end of a turn, in other programs too"
)
def test_generation_stops_at_the_template_s_end_wherever_it_is_loaded(tmp_path):
    words = byte_level(eos="<|endoftext|>")
    policy = trained(saved(words, tmp_path / "base"), dtype="float32")
    end, eos = words.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert policy.stop_ids == {end, eos}
    policy.save(tmp_path / "policy")
    assert GenerationConfig.from_pretrained(tmp_path / "policy").eos_token_id == sorted([end, eos])
    answer = as_drawn(policy, " Water. ", 64)
    assert answer.tokens[-1] == end and answer.finish == "stop"


@pytest.mark.reliability("message", "an adapter that says what it is, for others to read")
def test_the_adapter_is_whole_and_names_no_folder_of_this_machine(tmp_path):
    policy = trained(saved(byte_level(), tmp_path / "base"), dtype="float32")
    held = os.umask(0o022)
    try:
        policy.save(tmp_path / "policy")
    finally:
        os.umask(held)
    folder = tmp_path / "policy" / "adapter"
    said = AutoTokenizer.from_pretrained(folder)
    assert said.chat_template == AutoTokenizer.from_pretrained(tmp_path / "policy").chat_template
    assert "preference" in said.chat_template
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "base"
    for path in sorted((tmp_path / "policy").rglob("*")):
        if path.is_file():
            assert path.stat().st_mode & 0o777 == 0o644, path
            if path.suffix in (".json", ".md", ".jinja"):
                assert str(tmp_path) not in path.read_text(), path
    card = (folder / "README.md").read_text()
    assert "More Information Needed" not in card and "`base`" in card and "first and second" in card
    again = load_policy(
        PolicyConfig(path=str(tmp_path / "base"), device="cpu", lora_rank=4),
        NAMES,
        trained=tmp_path / "policy",
    )
    assert all(torch.equal(a, b) for a, b in zip(again.trainable, policy.trainable, strict=True))


@pytest.mark.reliability("silent", "answers that run on behind the end of a turn, in each sampler")
@pytest.mark.parametrize("backend", ["engine", "generate"])
def test_no_answer_goes_on_behind_the_end_of_its_turn(tmp_path, backend):
    words = byte_level(eos="<|endoftext|>")
    policy = trained(saved(words, tmp_path / "base"), dtype="float32")
    end = words.convert_tokens_to_ids("<|im_end|>")
    requests = [Request(Prompt("a", "How do tides work?"), (0.3, 0.7), 96)]
    with open_backend(backend, policy) as sampler:
        out = sampler.generate(requests, Sampling(24, 1.0, seed=0))
    rows = [t[m].tolist() for t, m in zip(out.tokens_RT, out.mask_RT, strict=True)]
    ended = [end in row for row in rows]
    assert any(ended) and not any(end in row[:-1] for row in rows)
    assert not any("<|im_end|>" in text for text in out.texts)
