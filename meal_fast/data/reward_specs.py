"""What is said of a reward model: the options of a source, and those of the hub's models."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

from meal_fast.config.schema import check_device

FORMATS = ("pair", "response", "response+prompt", "chat", "template:TEXT")

# TL;DR prompts carry their post between these marks (RiC's layout): see meal_fast.data.prompts.
_POST = re.compile(r"### Input:(.*?)(?:### Response:|$)", re.DOTALL)


@dataclass(frozen=True)
class Classifier:
    """How a sequence-classification model is fed and read."""

    path: str
    format: str = "pair"
    prompt: str = "{prompt}"
    logit: int | None = None  # which output is the reward; may be left out where there is one
    label: str = ""  # the same by its name
    sign: float = 1.0
    max_length: int = 0  # 0: what tokenizer and model allow
    device: str = ""  # empty: where the others run


_HH = "\n\nHuman: {prompt} \n\nAssistant:"

# Each model's published format: model cards of Ray2333 and OpenAssistant, the code of
# "Rewards-in-Context" (RiC) for the others [P].
HUB: dict[str, Classifier] = {
    model.path: model
    for model in (
        Classifier("Ray2333/gpt2-large-helpful-reward_model", prompt=_HH),
        Classifier("Ray2333/gpt2-large-harmless-reward_model", prompt=_HH),
        Classifier("mohameddhiab/humor-no-humor", format="response", logit=1),
        Classifier(
            "Tristan/gpt2_reward_summarization",
            format="template:{response} {bos} {prompt}",
            prompt="{post}",
        ),
        Classifier(
            "CogComp/bart-faithful-summary-detector",
            format="response+prompt",
            prompt="{post}",
            logit=1,
        ),
        Classifier("OpenAssistant/reward-model-deberta-v3-large-v2"),
    )
}


def query_options(
    name: str, query: str, kinds: Mapping[str, Callable[[str], Any]]
) -> dict[str, Any]:
    """Read `key=value&key=value` of an objective's source: each value as its key's kind."""
    options: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        key, _, text = part.partition("=")
        if key not in kinds:
            raise ValueError(f"objective {name!r}: unknown key {key!r}; known: {', '.join(kinds)}")
        try:
            options[key] = kinds[key](unquote(text))
        except ValueError as error:
            raise ValueError(f"objective {name!r}: {key}={text!r} is not a number") from error
    return options


def with_options(name: str, base: Classifier, query: str) -> Classifier:
    """Give `base` with the options of a source's query, `key=value&key=value`, put in."""
    kinds: dict[str, Callable[[str], Any]] = {
        "format": str,
        "prompt": str,
        "logit": int,
        "label": str,
        "sign": float,
        "max_length": int,
        "path": str,
        "device": str,
    }
    options = query_options(name, query, kinds)
    if options.get("device"):
        check_device(f"objective {name!r}: device", options["device"])
    model = replace(base, **options)
    if model.format not in FORMATS[:-1] and not model.format.startswith("template:"):
        raise ValueError(
            f"objective {name!r}: unknown format {model.format!r}; choose from {', '.join(FORMATS)}"
        )
    if model.format.startswith("template:"):
        _check_fields(name, "format", model.format, {"prompt", "response", "bos", "eos", "sep"})
        if "{response}" not in model.format:
            raise ValueError(f"objective {name!r}: format={model.format!r} lacks {{response}}")
    _check_fields(name, "prompt", model.prompt, {"prompt", "post"})
    if model.sign not in (1.0, -1.0):
        raise ValueError(f"objective {name!r}: sign={model.sign:g} must be 1 or -1")
    for key in ("logit", "max_length"):
        if (getattr(model, key) or 0) < 0:
            raise ValueError(f"objective {name!r}: {key}={getattr(model, key)} is negative")
    if "label" in options:  # a model of the hub's table has a logit; who names a label means that
        if "logit" in options:
            raise ValueError(f"objective {name!r}: logit and label say the same; give one of them")
        model = replace(model, logit=None)
    return model


def _check_fields(name: str, key: str, text: str, known: set[str]) -> None:
    unknown = sorted(set(re.findall(r"\{(\w*)\}", text)) - known)
    if unknown:
        raise ValueError(
            f"objective {name!r}: {key} has {{{unknown[0]}}}; known: {', '.join(sorted(known))}"
        )


def put(template: str, **values: str) -> str:
    """`template` with its {fields} put in; other braces, and those of the values, stay."""
    return re.sub(r"\{(\w+)\}", lambda m: values.get(m.group(1), m.group(0)), template)


def post_of(prompt: str) -> str:
    """The post of a TL;DR prompt, without the instruction around it; any other text unchanged."""
    found = _POST.search(prompt)
    return (found.group(1) if found else prompt).strip()
