"""Tokenizers of several kinds, trained on a few sentences, and a small model saved with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}"
    "{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TRIMS = CHATML.replace("message['content']", "message['content'] | trim")
SAID = [
    "How do tides work? The moon pulls the water.",
    "first second helpful harmless [first=0.80 second=0.20] ++++++++--",
    "Write two lines: [a] (b), 2024 = 1,000.50. Who are you? A model.",
    " ".join(map(chr, range(33, 127))),
] * 3
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_level(template: str | dict[str, str] = CHATML, eos: str = "<|im_end|>") -> Any:
    """GPT-2's kind; `<tool>` is an added token that is not special."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(
        SAID,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        ),
    )
    core.add_tokens([AddedToken("<tool>", special=False)])
    return _words(core, template, bos_token="<|endoftext|>", eos_token=eos)


def metaspace(template: str = INST, kind: str = "normalizer") -> Any:
    """SentencePiece's kind, a space mark before every text: as Llama-2's files have it
    (`normalizer`, merges run over spaces), as newer ones (`always`, `first`), or Unigram."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    if kind == "unigram":
        core = Tokenizer(models.Unigram())
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=480, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    if kind == "normalizer":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        core.normalizer = normalizers.Sequence(steps)
    else:
        scheme = "first" if kind == "first" else "always"
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    core.train_from_iterator(SAID, trainer)
    return _words(core, template, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _words(core: Tokenizer, template: str | dict[str, str], **special: str) -> Any:
    words = PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, **special
    )
    words.chat_template = template
    return words


def saved(words: Any, folder: Path) -> str:
    """Save a random model with the tokenizer; give the folder's path."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(words),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                eos_token_id=words.eos_token_id,
                bos_token_id=words.bos_token_id,
            )
        )
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)
