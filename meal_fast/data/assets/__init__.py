"""Real input that needs no model hub: a small policy, two reward models, prompt sets.

`make assets` (`python -m meal_fast.assets`) builds them once into a cache folder; `asset` finds
them there.
"""

from __future__ import annotations

from pathlib import Path

from meal_fast.common import cache_folder as cache_dir

from .keys import asset_code
from .parts import is_complete, read_manifest

NAMES = ("smollm2-135m", "complied", "harmless", "prompts")

__all__ = ["NAMES", "asset", "cache_dir"]


def asset(name: str) -> Path:
    """The folder of a packaged asset: `smollm2-135m`, `complied`, `harmless` or `prompts`.

    Raises ValueError when the name is unknown, or the asset is not (wholly) in the cache folder,
    `common.cache_folder`, or was made by other code than this. One
    that was made with other versions of the libraries is taken: it differs in last digits, if at
    all, and its manifest says which they were; `make assets` makes it anew.
    """
    if name not in NAMES:
        raise ValueError(f"asset {name!r}: unknown; choose from {', '.join(NAMES)}")
    folder = cache_dir() / name
    if not is_complete(folder):
        raise ValueError(f"asset {name!r}: not in {cache_dir()}; run `make assets`")
    manifest = read_manifest(folder)
    if manifest is None or manifest["key"].get("code") != asset_code(name):
        raise ValueError(
            f"asset {name!r}: in {cache_dir()}, but made by another version of meal-fast; "
            "run `make assets`"
        )
    return folder
