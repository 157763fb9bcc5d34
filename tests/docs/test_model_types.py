"""docs/model-types.md says what its own rows say, of every type that transformers has."""

import re
from collections import Counter

import pytest
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tools.model_types import PAGE, SAID, rows

TEXT = PAGE.read_text(encoding="utf-8")


def test_its_counts_are_those_of_its_rows():
    counted = Counter(row[2] for row in rows(TEXT))
    assert set(counted) <= set(SAID)
    assert dict(re.findall(r"^\| ([a-z ]+) \| (\d+) \|$", TEXT, re.M)) == {
        said: str(counted[said]) for said in SAID
    }
    types = {row[0] for row in rows(TEXT)}
    assert f"Each of the {len(types)} types" in TEXT


def test_nothing_is_wrong_and_what_is_refused_says_why():
    for kind, _, said, apart, why in rows(TEXT):
        assert said in ("right", "refused", "not built"), kind
        assert bool(why) == (said != "right"), kind
        assert said != "right" or float(apart) < 1e-3, kind


def test_it_lists_every_type_of_the_version_that_it_names():
    if f"transformers {transformers.__version__}," not in TEXT:
        pytest.skip("the page is of another version of transformers")
    assert list(dict.fromkeys(row[0] for row in rows(TEXT))) == list(
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    )
