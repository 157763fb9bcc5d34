"""meal-fast: train one language model that its user steers between objectives by a preference w."""

import importlib as _importlib
import os as _os
import sys as _sys
import warnings as _warnings
from importlib.machinery import ModuleSpec as _ModuleSpec

__version__ = "0.1.0"

# In a wheel kernels/ and csrc/ lie inside this package; in a checkout they lie beside it. With this
# `meal_fast.kernels` and `meal_fast.csrc` are their names in both.
_here = _os.path.dirname(_os.path.abspath(__file__))
if not _os.path.isdir(_os.path.join(_here, "kernels")):
    __path__.append(_os.path.dirname(_here))

# Modules that users import, by the names that they had before there were rooms.
_MOVED = {
    "objectives": "data.objectives",
    "policy": "models.policy",
    "preference": "data.preferences",
    "presets": "config.presets",
    "prompts": "data.prompts",
    "trainer": "training.trainer",
    "worlds": "data.toy",
}


class _OldNames:
    """Imports a module under an old name: the very module, with a DeprecationWarning."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        package, _, rest = name.partition(".")
        head, dot, tail = rest.partition(".")
        if package != __name__ or head not in _MOVED:
            return None
        return _ModuleSpec(name, cls, loader_state=f"{__name__}.{_MOVED[head]}{dot}{tail}")  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec):
        new = spec.loader_state
        _warnings.warn(f"{spec.name} is now {new}", DeprecationWarning, stacklevel=2)
        module = _importlib.import_module(new)
        spec.loader_state = module.__spec__
        return module

    @staticmethod
    def exec_module(module):
        module.__spec__ = module.__spec__.loader_state  # its own: it has been loaded before


_sys.meta_path.insert(0, _OldNames)  # first: a package's own path would be searched otherwise
