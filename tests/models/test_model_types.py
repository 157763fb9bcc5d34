"""Every type of causal language model of transformers: right, or refused in one line."""

from collections import Counter

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tools.model_types import PAGE, page, rows, sweep


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.reliability("silent", "every type of causal language model that transformers has")
def test_every_type_is_right_or_refused(record_property):
    """Nothing wrong, nothing that ends in a traceback; and the page says what comes out."""
    outcomes = list(sweep(list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)))
    counted = Counter(outcome.said for _, outcome in outcomes)
    for said in ("right", "refused", "wrong", "not built"):
        record_property(f"model types {said}", f"{counted[said]} builds")
    off = [o for _, o in outcomes if o.said in ("wrong", "traceback")]
    assert not off
    assert counted["right"] >= 75
    assert counted["not built"] <= 25
    text = PAGE.read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}," in text:
        fresh = [row[:3] for row in rows(page(outcomes))]
        assert fresh == [row[:3] for row in rows(text)], "run `make docs-models`"
