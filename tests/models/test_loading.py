"""What cannot be loaded as a policy ends in one line that names it and says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from meal_fast.config.config import PolicyConfig
from meal_fast.models.policy import load_policy
from tests.helpers.model_types import NAMES, tokenizer
from tests.models.test_probe import SMALL, save


def edited(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def overwritten(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"not tensors at all, but text of some length")


def pickled(folder: Path) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def headless(folder: Path) -> None:
    tf.AutoModelForCausalLM.from_pretrained(folder).model.save_pretrained(folder)
    edited(folder, architectures=["LlamaForCausalLM"])


def with_biases(folder: Path) -> None:
    config = tf.LlamaConfig(**SMALL, attention_bias=True)
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    edited(folder, attention_bias=False)


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def without_template(folder: Path) -> None:
    words = tokenizer()
    words.chat_template = None
    (folder / "chat_template.jinja").unlink()
    words.save_pretrained(folder)


def more_words(folder: Path) -> None:
    words = tokenizer()
    words.add_tokens([f"<{n}>" for n in range(40)])
    words.save_pretrained(folder)


def classifier(folder: Path) -> None:
    config = tf.BertConfig(
        vocab_size=288, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64, is_decoder=True,
    )  # fmt: skip
    tf.BertForSequenceClassification(config).save_pretrained(folder)


def written(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "config.json").write_text(text) and None


def changed(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edited(folder, **values)


CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a type of model that nobody knows": (changed(model_type="lamma"), "does not know it"),
    "no type of model": (changed(model_type=None), "does not know it"),
    "an encoder with a decoder": (changed(model_type="t5"), "no causal language model"),
    "code of its own": (
        changed(model_type="mine", auto_map={"AutoConfig": "mine.MyConfig"}),
        "code of its own, which is never run",
    ),
    "a configuration that is no JSON": (written("{"), "config.json' is not JSON"),
    "a configuration that is a list": (written("[1, 2]"), "config.json' holds no table"),
    "an empty configuration": (written(""), "config.json' is not JSON"),
    "heads that are a word": (changed(num_attention_heads="four"), "cannot be"),
    "heads that do not divide": (changed(num_attention_heads=5, head_dim=None), "cannot be"),
    "no layers": (changed(num_hidden_layers=0), "which its configuration leaves out"),
    "a layer less": (changed(num_hidden_layers=1), "which its configuration leaves out"),
    "biases that are left out": (with_biases, "which its configuration leaves out"),
    "negative width": (changed(intermediate_size=-1), "cannot be"),
    "another width": (changed(intermediate_size=96), "its weights cannot be loaded"),
    "another vocabulary": (changed(vocab_size=96), "its weights cannot be loaded"),
    "more layers": (changed(num_hidden_layers=3), "its weights lack model.layers.2"),
    "an unknown activation": (changed(hidden_act="swoosh"), "its weights cannot be loaded"),
    "quantized weights": (
        changed(quantization_config={"quant_method": "gptq", "bits": 4}),
        "its weights are quantized",
    ),
    "an unknown rope": (changed(rope_parameters={"rope_type": "spiral"}), "cannot be"),
    "a body without its head": (headless, "its weights lack lm_head.weight"),
    "a classifier": (classifier, "its weights lack"),
    "weights cut short": (cut_short, "damaged or cut short"),
    "weights that are text": (overwritten, "damaged or cut short"),
    "weights in a pickle": (pickled, "as a pickle (*.bin), which can run code when it is read"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no *.safetensors"),
    "no tokenizer": (without_tokenizer, "tokenizer"),
    "a tokenizer that is no JSON": (
        lambda f: (f / "tokenizer.json").write_text("{") and None,
        "its tokenizer cannot be loaded",
    ),
    "no chat template": (without_template, "chat_template.jinja"),
    "a tokenizer of another model": (more_words, "use the tokenizer that belongs"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    save(folder, tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)))
    return folder


SILENT = {"more layers", "a layer less", "biases that are left out", "a body without its head"}


def marked(case: str) -> Any:
    what = "a policy folder that is damaged, or no causal language model"
    if case in SILENT:  # these would have loaded
        what = "weights of which a part is missing or left out"
    kind = "silent" if case in SILENT else "message"
    return pytest.param(case, marks=pytest.mark.reliability(kind, what))


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_a_policy_that_cannot_be_loaded_is_one_line(whole, tmp_path, capfd, case):
    change, said = CASES[case]
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    change(folder)
    capfd.readouterr()
    with pytest.raises(ValueError, match=r"^policy\.path=") as raised:
        load_policy(PolicyConfig(path=str(folder), tuning="lora", device="cpu"), NAMES)
    text = str(raised.value)
    assert repr(str(folder)) in text
    assert said in text
    assert "\n" not in text
    assert len(text) < 650
    assert ";" in text  # a remedy
    assert capfd.readouterr() == ("", "")  # and nothing besides


def test_tied_weights_lack_nothing(tmp_path):
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, tie_word_embeddings=True))
    load_policy(PolicyConfig(path=save(tmp_path, model), device="cpu"), NAMES)


@pytest.mark.reliability("attack", "a policy folder with code of its own beside a known type")
def test_code_in_a_policy_folder_is_never_run(whole, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    flag = tmp_path / "ran"
    (folder / "mine.py").write_text(f"open({str(flag)!r}, 'w')\n")
    own = {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M", "AutoTokenizer": "mine.T"}
    edited(folder, auto_map=own)
    load_policy(PolicyConfig(path=str(folder), device="cpu"), NAMES)
    assert not flag.exists()
