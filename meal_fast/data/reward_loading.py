"""Loading a reward model: weights that are all there, no code of a folder's, adapters merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from meal_fast.config.model_files import check_model_files

from .reward_specs import Classifier

_ADAPTER, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def load_classifier(name: str, spec: Classifier) -> tuple[Any, Any]:
    """Give model (float32, on the CPU) and tokenizer of a spec.

    Raises ValueError for what cannot be loaded: no sequence-classification model, code or weights
    that are no safetensors, a head or a tokenizer that is missing, which would be made up.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    adapter = _adapter_of(name, spec.path)
    source, labels = spec.path, {}
    if adapter is not None:
        source, labels = adapter.base, {"num_labels": adapter.labels}
    for place in {spec.path, source}:
        if Path(place).is_dir():
            check_model_files(Path(place), f"objective {name!r}")
    read = {"trust_remote_code": False}
    try:
        with_words = source
        if adapter is not None and (adapter.folder / "tokenizer_config.json").is_file():
            with_words = str(adapter.folder)
        tokenizer = AutoTokenizer.from_pretrained(with_words, **read)
        model, found = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, use_safetensors=True,
            **read, **labels,
        )  # fmt: skip
    except Exception as error:  # of files that anything may be wrong with
        raise _unloadable(name, source, error) from error
    words = set(tokenizer("one two three")["input_ids"])
    if not words - set(tokenizer.all_special_ids):  # it was made up from nothing
        raise ValueError(f"objective {name!r}: {spec.path!r} has no tokenizer files")
    missing = set(found["missing_keys"]) | {str(k[0]) for k in found.get("mismatched_keys", ())}
    if adapter is not None:
        model, missing = adapter.merged(name, model, missing)
    if missing:  # transformers would fill them in at random, and go on
        raise ValueError(
            f"objective {name!r}: {spec.path!r} is no trained classifier, it lacks "
            f"{sorted(missing)[0]}; name a sequence-classification model with its head"
        )
    return model, tokenizer


class _Adapter:
    """A PEFT adapter of a sequence-classification model."""

    def __init__(self, name: str, folder: Path) -> None:
        from safetensors import safe_open

        self.folder = folder
        try:
            config = json.loads((folder / _ADAPTER).read_text(encoding="utf-8"))
            self.base = str(config["base_model_name_or_path"] or "")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"objective {name!r}: {str(folder / _ADAPTER)!r} cannot be read ({error})"
            ) from error
        merge = "merge it into its base and name that folder (peft: model.merge_and_unload())"
        if not self.base:
            raise ValueError(
                f"objective {name!r}: {str(folder)!r} is a PEFT adapter that names no base model; "
                f"{merge}"
            )
        if not (folder / _ADAPTER_WEIGHTS).is_file():
            raise ValueError(
                f"objective {name!r}: {str(folder)!r} is a PEFT adapter without "
                f"{_ADAPTER_WEIGHTS}; save it anew as safetensors"
            )
        try:
            with safe_open(folder / _ADAPTER_WEIGHTS, "pt") as held:
                heads = {
                    key: held.get_tensor(key)
                    for key in held.keys()
                    if key.rpartition(".")[2] in ("weight", "bias")
                    and any(part in _HEADS for part in key.split("."))
                    and "lora" not in key
                }
        except Exception as error:  # of a damaged file: anything
            raise _unloadable(name, str(folder), error) from error
        self.heads = {key.removeprefix("base_model.model."): value for key, value in heads.items()}
        weights = [v for k, v in self.heads.items() if k.endswith("weight") and v.dim() == 2]
        if not weights:
            raise ValueError(
                f"objective {name!r}: {str(folder)!r} is a PEFT adapter (task_type "
                f"{config.get('task_type')}) without a classification head, which would be random; "
                "train it with task_type=SEQ_CLS, which saves the head (modules_to_save)"
            )
        self.labels = min(len(w) for w in weights)

    def merged(self, name: str, model: Any, missing: set[str]) -> tuple[Any, set[str]]:
        """Put it into its base; give what no file had."""
        from peft import PeftModel

        try:
            whole = PeftModel.from_pretrained(model, str(self.folder)).merge_and_unload()
        except Exception as error:  # of another package's code, and a stranger's file
            raise _unloadable(name, str(self.folder), error) from error
        held = whole.state_dict()
        for key, value in self.heads.items():
            there = held.get(key)
            if there is None or not torch.equal(there.float(), value.float()):
                raise ValueError(
                    f"objective {name!r}: {str(self.folder)!r} is a PEFT adapter whose {key} does "
                    f"not fit its base {self.base!r}; merge it and name that folder"
                )
        return whole, missing - set(self.heads)


_HEADS = ("score", "classifier", "classification_head", "pre_classifier", "out_proj")


def _adapter_of(name: str, path: str) -> _Adapter | None:
    """The PEFT adapter that a path is, if it is one; a hub's as well."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / _ADAPTER).is_file():
            return None
        if (folder / "config.json").is_file():
            raise ValueError(
                f"objective {name!r}: {path!r} holds a model (config.json) and a PEFT adapter "
                f"({_ADAPTER}); remove the one that is not meant"
            )
        return _Adapter(name, folder)
    if folder.exists():
        return None
    from transformers.utils import cached_file

    try:
        quiet = {"_raise_exceptions_for_missing_entries": False,
                 "_raise_exceptions_for_connection_errors": False,
                 "_raise_exceptions_for_gated_repo": False}  # fmt: skip
        found = cached_file(path, _ADAPTER, **quiet)
        if found is None:
            return None
        cached_file(path, _ADAPTER_WEIGHTS, **quiet)
    except (OSError, ValueError):  # the model itself is asked for next, and says what is wrong
        return None
    return _Adapter(name, Path(found).parent)


def _unloadable(name: str, path: str, error: Exception) -> ValueError:
    lines = [line for line in str(error).splitlines() if line.strip()]
    reason = lines[0].strip() if lines else type(error).__name__
    return ValueError(
        f"objective {name!r}: {path!r} cannot be loaded as a sequence-classification model "
        f"({reason})"
    )
