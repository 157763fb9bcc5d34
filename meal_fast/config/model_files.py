"""A model's folder, before a library opens it: weights that are data, and no code of its own.

The libraries refuse most of this by themselves, in as many ways as they have versions; here it is
one line, the same in all of them, and before torch is imported. `auto_map` is not refused: many a
model that transformers knows has it, and `trust_remote_code=False` leaves it unread.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meal_fast.common import parse_json

# Files that say how a model and its tokenizer are made; what is not there is not needed.
_SETTINGS = (
    "config.json",
    "tokenizer_config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "adapter_config.json",
)
LARGEST = 64 << 20  # bytes of a file of settings; a tokenizer's vocabulary has another file


def check_model_files(folder: Path, what: str, else_: str = "") -> None:
    """Raise ValueError for a folder whose weights are pickles, or that asks for code.

    what: how a message calls it. else_: what the user may do where that is meant.
    """
    remedy = f"; {else_}" if else_ else ""
    for name in _SETTINGS:
        path = folder / name
        if not path.is_file():
            continue
        asked = _code(read_settings(path, what))
        if asked:
            raise ValueError(
                f"{what}: {str(path)!r} asks for code, {asked}; only models that need none are "
                f"loaded{remedy}"
            )
    weights = {p.suffix for p in folder.iterdir() if p.name.startswith(("model", "pytorch_model"))}
    weights |= {p.suffix for p in folder.iterdir() if p.name.startswith("adapter_model")}
    pickled = weights & {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
    if pickled and ".safetensors" not in weights:
        raise ValueError(
            f"{what}: {str(folder)!r} has its weights as a pickle (*{min(pickled)}), which can "
            f"run code when it is read; save them as safetensors where you trust them, by "
            f"from_pretrained(…).save_pretrained(NEW){remedy}"
        )


def read_settings(path: Path, what: str) -> dict[str, Any]:
    """Read a table from a JSON file. Raises ValueError, with `what` in front, for none."""
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"is longer than {LARGEST} bytes")
        values = parse_json(path.read_bytes(), strict=False)
    except OSError as error:
        raise ValueError(f"{what}: {str(path)!r} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ValueError(f"{what}: {str(path)!r} is not JSON ({error}); copy it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{what}: {str(path)!r} holds no table; copy it again")
    return values


def _code(values: dict[str, Any]) -> str:
    """What of a file of settings names code: "" for nothing. Looks into its sections, too."""
    waiting: list[Any] = [values]
    while waiting:
        found = waiting.pop()
        if isinstance(found, list):
            waiting += found
            continue
        if not isinstance(found, dict):
            continue
        for key, value in found.items():
            # An attention or expert implementation with a slash is fetched from a hub, and run.
            fetched = key.lstrip("_").startswith(("attn_impl", "experts_impl"))
            named = value.values() if isinstance(value, dict) else [value]
            if key == "megatron_config" and value:  # PEFT imports what megatron_core names
                return key
            if key == "megatron_core" and value not in (None, "megatron.core"):
                return f"{key}={value!r:.80}"
            if fetched and any(isinstance(v, str) and "/" in v for v in named):
                return f"{key}={value!r:.80}"
            waiting.append(value)
    return ""
