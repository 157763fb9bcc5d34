"""Small policies with a byte-level BPE tokenizer, of the architectures that GGUF files are for."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama import LlamaConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

from meal_fast.data.preferences import Goals, lattice, preference_text
from meal_fast.models.gguf_file import _QWEN2
from meal_fast.models.preference_template import preference_template

NAMES = ("helpful", "harmless")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CUTS = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)],
    "gpt-2": [pre_tokenizers.ByteLevel(False)],
    "qwen2": [
        pre_tokenizers.Split(Regex(_QWEN2), "isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False),
    ],
}
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
KINDS = {
    "llama": (LlamaConfig, {"tie_word_embeddings": True, "rope_theta": 100000.0}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True, "head_dim": 32}),
}


def tokenizer(cut: str) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    steps = CUTS[cut]
    core.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    said = [f"How do tides work? {preference_text(w, NAMES)}" for w in lattice(2, 11)]
    core.train_from_iterator(said, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )


def saved(folder: Path, kind: str, cut: str, style: str = "bar", names=NAMES, **changes) -> Path:
    """Writes a random model with its tokenizer, as `save_policy` writes one."""
    words = tokenizer(cut)
    goals = Goals((-1.25, 1e-5), (2.0, 0.9)) if style == "scores" else None
    words.chat_template = preference_template(TEMPLATE, names, style, goals)
    config, own = KINDS[kind]
    settings = config(vocab_size=len(words), eos_token_id=2, **SHAPE, **own, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(settings)
        for parameter in model.parameters():
            parameter.data.normal_(0.0, 0.3 if parameter.dim() > 1 else 1.0)  # biases too
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder
