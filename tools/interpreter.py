"""Whether Triton's interpreter can be used: for the tests, and for rehearsals without a card."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os


def interpreter_obstacle(interpret: str | None = None) -> str | None:
    """Say why Triton cannot interpret its kernels on CPU tensors here; None where it can.

    `interpret`: what TRITON_INTERPRET would be; None: what it is.
    """
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if (interpret or os.environ.get("TRITON_INTERPRET")) != "1":
        return "Triton compiles here: TRITON_INTERPRET is not 1"
    triton, numpy = (
        tuple(map(int, importlib.metadata.version(name).split(".")[:2]))
        for name in ("triton", "numpy")
    )
    # It takes int() of arrays of one element, which numpy 2.4 refuses.
    if triton <= (3, 6) and numpy >= (2, 4):
        return "Triton 3.6's interpreter does not work with numpy 2.4 or later"
    return None
