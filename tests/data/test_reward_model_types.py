"""Every sequence-classification type of transformers: its rewards are right, or it is refused."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers as tf
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from meal_fast.data.reward_models import Classifier, ClassifierScorer
from tests.helpers.reward_models import byte_level, saved, settings_of

PROMPTS = ["How do tides work?", "Tell me a joke.", "Hi"]
RESPONSES = ["The moon pulls the water.", "A cat", ""]
UNUSED = 399  # a token of the vocabulary that is in none of the rows


def verdict(kind: str, folder: Path) -> str:
    """Compare a batch of rows, which end in the pad token, with each row alone and unpadded."""
    tokenizer = byte_level(pad="<|im_end|>")
    try:
        with torch.device("meta"):
            plan = tf.AutoModelForSequenceClassification.from_config(settings_of(kind, tokenizer))
        if sum(p.numel() for p in plan.parameters()) > 10_000_000:
            return "not built small"
        path = saved(folder, kind, tokenizer)
        model = tf.AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    except Exception:  # of a configuration that asks for more than sizes
        return "not built small"
    try:
        form = "template:{prompt} {response}{eos}"
        scorer = ClassifierScorer("a", Classifier(path, format=form), torch.device("cpu"))
    except ValueError as error:
        assert str(error).startswith("objective 'a': ") and "\n" not in str(error), kind
        return "refused"
    got = scorer(PROMPTS, RESPONSES)
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = UNUSED
    rows = [f"{p} {r}<|im_end|>" for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    with torch.no_grad():
        alone = [model.eval()(**tokenizer(row, return_tensors="pt")).logits[0, 0] for row in rows]
    return "right" if (torch.stack(alone) - got).abs().max() < 1e-4 else "WRONG"


@pytest.mark.slow
@pytest.mark.reliability("silent", "every sequence-classification type of transformers, pad = eos")
def test_every_type_is_right_or_refused(tmp_path: Path, record_property) -> None:
    kinds = sorted(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
    found = {kind: verdict(kind, tmp_path / kind) for kind in kinds}
    counts = Counter(found.values())
    record_property("types of reward models", ", ".join(f"{n} {w}" for w, n in counts.items()))
    assert [kind for kind, said in found.items() if said == "WRONG"] == []
    assert counts["right"] > 80, found
