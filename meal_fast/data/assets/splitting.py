"""Stable splits: which side a text falls on depends on the text alone, on any machine, for ever."""

from __future__ import annotations

import hashlib
import re
import unicodedata

SPLITS = ("train", "validation", "evaluation")


def normalize(text: str) -> str:
    """The form in which two texts count as the same: case, punctuation and spacing left out."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded)) or folded.strip()


def text_hash(text: str) -> int:
    """A 64-bit hash of the normalised text (Python's own hash differs from process to process)."""
    digest = hashlib.sha256(normalize(text).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big")


def text_id(text: str) -> str:
    """The hash as 16 hexadecimal digits."""
    return f"{text_hash(text):016x}"


def split_of(text: str) -> str:
    """ "train" (75 %), "validation" (10 %) or "evaluation" (15 %), by the text's hash."""
    share = text_hash(text) % 100
    return "train" if share < 75 else "validation" if share < 85 else "evaluation"


def unique(texts: list[str], seen: set[str] | None = None) -> list[str]:
    """`texts` stripped, without empty ones, repeats, and those whose normal form is in `seen`."""
    known = set(seen or ())
    kept = []
    for text in map(str.strip, texts):
        form = normalize(text)
        if form and form not in known:
            known.add(form)
            kept.append(text)
    return kept
