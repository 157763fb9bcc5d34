"""Real input that needs no model hub: a small policy, two reward models, prompt sets.

`make assets` (`python -m meal_fast.assets`) builds them once into a cache folder; `asset` finds
them there.
"""

from __future__ import annotations

from pathlib import Path

from meal_fast.assets.parts import cache_dir, is_complete

NAMES = ("smollm2-135m", "complied", "harmless", "prompts")

__all__ = ["NAMES", "asset", "cache_dir"]


def asset(name: str) -> Path:
    """The folder of a packaged asset: `smollm2-135m`, `complied`, `harmless` or `prompts`.

    Raises ValueError when the name is unknown, or the asset is not (wholly) in the cache folder,
    which is `$MEAL_FAST_CACHE` or `~/.cache/meal-fast`.
    """
    if name not in NAMES:
        raise ValueError(f"asset {name!r}: unknown; choose from {', '.join(NAMES)}")
    folder = cache_dir() / name
    if not is_complete(folder):
        raise ValueError(f"asset {name!r}: not in {cache_dir()}; run `make assets`")
    return folder
