"""`python -m meal_fast.assets`: see meal_fast.data.assets."""

import sys

from meal_fast.data.assets import NAMES, asset, cache_dir
from meal_fast.data.assets.build import main

__all__ = ["NAMES", "asset", "cache_dir", "main"]

if __name__ == "__main__":
    sys.exit(main())
