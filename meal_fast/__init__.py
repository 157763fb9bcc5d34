"""meal-fast: train one language model that its user steers between objectives by a preference w."""

import os as _os

__version__ = "0.1.0"

# In a wheel kernels/ and csrc/ lie inside this package; in a checkout they lie beside it. With this
# `meal_fast.kernels` and `meal_fast.csrc` are their names in both.
_here = _os.path.dirname(_os.path.abspath(__file__))
if not _os.path.isdir(_os.path.join(_here, "kernels")):
    __path__.append(_os.path.dirname(_here))
