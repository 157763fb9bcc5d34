"""Small reward models of transformers' real classes, with heads whose mistakes show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TEXTS = [
    "How do tides work? The moon pulls the water.",
    "Write a poem about the sea and the sky.",
    "Tell me a joke about cats, dogs and birds. user assistant Question Answer",
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
)
BOS, START, END = 0, 1, 2  # of every tokenizer here
# One set of sizes, each known to some of the configurations.
SIZES: dict[str, Any] = {
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32, "word_embed_proj_dim": 32,
    "embedding_size": 32, "intermediate_size": 64, "ffn_dim": 64, "d_ff": 64, "hidden_dim": 64,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_hidden_layers": 2, "n_layer": 2,
    "num_layers": 2, "num_decoder_layers": 2, "n_layers": 2, "encoder_layers": 1,
    "decoder_layers": 1, "num_attention_heads": 4, "n_head": 4, "num_heads": 4, "n_heads": 4,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "d_kv": 8, "max_position_embeddings": 512, "n_positions": 512,
}  # fmt: skip


def byte_level(
    *, pad: str | None = None, eos: str = "<|im_end|>", template: str | None = CHATML,
    adds_bos: bool = False,
) -> tf.PreTrainedTokenizerFast:  # fmt: skip
    """A byte-level BPE tokenizer; `adds_bos`: it puts its bos before every text by itself."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    core.train_from_iterator(TEXTS * 4, trainer)
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", pair="<|endoftext|> $A $B",
            special_tokens=[("<|endoftext|>", BOS)],
        )  # fmt: skip
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|endoftext|>", eos_token=eos, pad_token=pad,
        model_max_length=512,
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


def settings_of(
    kind: str, tokenizer: tf.PreTrainedTokenizerFast, labels: int = 1, **own: Any
) -> tf.PreTrainedConfig:
    """The configuration of a small model of a type of transformers (`model_type`)."""
    config = tf.AutoConfig.for_model(kind)
    sizes = {k: v for k, v in SIZES.items() if hasattr(config, k)}
    if kind == "falcon":  # it works that out
        del sizes["head_dim"]
    sizes |= {"vocab_size": len(tokenizer), "num_labels": labels}
    settings = type(config)(**{**sizes, **own})
    for key in ("pad", "bos", "eos"):
        setattr(settings, f"{key}_token_id", getattr(tokenizer, f"{key}_token_id"))
    settings.decoder_start_token_id = tokenizer.bos_token_id
    return settings


def classifier(
    kind: str, tokenizer: tf.PreTrainedTokenizerFast, labels: int = 1, **own: Any
) -> tf.PreTrainedModel:
    """A random sequence-classification model of a type of transformers."""
    settings = settings_of(kind, tokenizer, labels, **own)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = tf.AutoModelForSequenceClassification.from_config(settings).eval()
        with torch.no_grad():  # the initial heads are so small that any mistake would pass
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def saved(
    folder: Path, kind: str, tokenizer: tf.PreTrainedTokenizerFast, labels: int = 1, **own: Any
) -> str:
    """The same, in a folder with its tokenizer."""
    classifier(kind, tokenizer, labels, **own).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def at_the_last_token(folder: str, rows: list[list[int]], output: int = 0) -> torch.Tensor:
    """What a causal reward model says at the last token of each row, alone and unpadded.

    Written out from its parts: the layers, and the head on the last hidden state.
    """
    model: Any = tf.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    layers = getattr(model, model.base_model_prefix).eval()
    head = getattr(model, "score", None) or model.classifier
    said = [head(layers(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]) for ids in rows]
    return torch.stack(said)[:, output]
