"""Reward models: how a sequence-classification model is fed, read and run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

import torch
from torch import Tensor

from meal_fast.config.schema import check_device
from meal_fast.ops.gemm import accelerate

FORMATS = ("pair", "response", "response+prompt", "template:TEXT")
BATCH = 32  # rows of a forward pass on a CPU, of like length
PASS_TOKENS = 32_768  # with padding, of one on a GPU: 32 rows of 1,024, or 512 of 64

# TL;DR prompts carry their post between these marks (RiC's layout): see meal_fast.data.prompts.
_POST = re.compile(r"### Input:(.*?)(?:### Response:|$)", re.DOTALL)


@dataclass(frozen=True)
class Classifier:
    """How a sequence-classification model is fed and read."""

    path: str
    format: str = "pair"
    prompt: str = "{prompt}"
    logit: int = 0
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


def with_options(name: str, base: Classifier, query: str) -> Classifier:
    """Give `base` with the options of a source's query, `key=value&key=value`, put in."""
    kinds: dict[str, Callable[[str], Any]] = {
        "format": str,
        "prompt": str,
        "logit": int,
        "sign": float,
        "max_length": int,
        "path": str,
        "device": str,
    }
    options: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        key, _, text = part.partition("=")
        if key not in kinds:
            raise ValueError(f"objective {name!r}: unknown key {key!r}; known: {', '.join(kinds)}")
        try:
            options[key] = kinds[key](unquote(text))
        except ValueError as error:
            raise ValueError(f"objective {name!r}: {key}={text!r} is not a number") from error
    if options.get("device"):
        check_device(f"objective {name!r}: device", options["device"])
    model = replace(base, **options)
    if model.format not in FORMATS[:3] and not model.format.startswith("template:"):
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
        if getattr(model, key) < 0:
            raise ValueError(f"objective {name!r}: {key}={getattr(model, key)} is negative")
    return model


def _check_fields(name: str, key: str, text: str, known: set[str]) -> None:
    unknown = sorted(set(re.findall(r"\{(\w*)\}", text)) - known)
    if unknown:
        raise ValueError(
            f"objective {name!r}: {key} has {{{unknown[0]}}}; known: {', '.join(sorted(known))}"
        )


def _put(template: str, **values: str) -> str:
    """`template` with its {fields} put in; other braces, and those of the values, stay."""
    return re.sub(r"\{(\w+)\}", lambda m: values.get(m.group(1), m.group(0)), template)


def post_of(prompt: str) -> str:
    """The post of a TL;DR prompt, without the instruction around it; any other text unchanged."""
    found = _POST.search(prompt)
    return (found.group(1) if found else prompt).strip()


class ClassifierScorer:
    """A sequence-classification model as an objective."""

    def __init__(self, name: str, spec: Classifier, device: torch.device) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self.spec, self.device = spec, device
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(spec.path)
            self.model, found = AutoModelForSequenceClassification.from_pretrained(
                spec.path, dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
            raise ValueError(
                f"objective {name!r}: {spec.path!r} cannot be loaded as a sequence-classification "
                f"model ({reason})"
            ) from error
        words = set(self.tokenizer("one two three")["input_ids"])
        if not words - set(self.tokenizer.all_special_ids):  # it was made up from nothing
            raise ValueError(f"objective {name!r}: {spec.path!r} has no tokenizer files")
        if found["missing_keys"]:  # transformers would fill them in at random, and go on
            missing = sorted(found["missing_keys"])[0]
            raise ValueError(
                f"objective {name!r}: {spec.path!r} is no trained classifier, it lacks {missing}"
            )
        accelerate(self.model).to(device).eval().requires_grad_(False)
        labels = self.model.config.num_labels
        if spec.logit >= labels:
            raise ValueError(f"objective {name!r}: logit={spec.logit}, but there are {labels}")
        if self.tokenizer.pad_token is None:  # GPT-2 has none; its head reads the last other token
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = "right"
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        positions = getattr(self.model.config, "max_position_embeddings", None) or 1024
        limit = min(1024, positions, self.tokenizer.model_max_length)
        if spec.max_length > limit:
            raise ValueError(f"objective {name!r}: max_length={spec.max_length} is above {limit}")
        self.max_length = spec.max_length or limit

    def encode(self, prompt: str, response: str) -> dict[str, list[int]]:
        """Token ids (and what else the model takes) of one row."""
        tokenizer, spec = self.tokenizer, self.spec
        prompt = _put(spec.prompt, prompt=prompt, post=post_of(prompt))
        texts: tuple[str, ...]
        if spec.format == "pair":
            texts = (prompt, response)
        elif spec.format == "response":
            texts = (response,)
        elif spec.format == "response+prompt":
            texts = (response, prompt)
        else:
            special = {
                key: getattr(tokenizer, f"{key}_token") or "" for key in ("bos", "eos", "sep")
            }
            template = spec.format.removeprefix("template:")
            texts = (_put(template, prompt=prompt, response=response, **special),)
        # As lists, because a bare empty string as the second text is taken for no second text.
        lists = [[text] for text in texts]
        encoded = tokenizer(*lists, truncation=True, max_length=self.max_length)
        if not encoded["input_ids"][0]:  # an empty response alone, and no special tokens
            encoded = tokenizer([tokenizer.eos_token])
        return {key: rows[0] for key, rows in encoded.items()}

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """(R,) float32 on its device, which is not waited for.

        Rows of like length share a batch: padding costs as much.
        """
        rows = [self.encode(p, r) for p, r in zip(prompts, responses, strict=True)]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        made = []
        for chosen in self._batches(rows, order):
            inputs = self.tokenizer.pad([rows[i] for i in chosen], return_tensors="pt")
            given = {name: self._sent(value) for name, value in inputs.items()}
            logits = self.model(**given).logits[:, self.spec.logit]
            made.append(self.spec.sign * logits.float())
        reward = torch.empty(len(rows), device=self.device)
        if made:
            reward[self._sent(torch.tensor(order))] = torch.cat(made)
        return reward

    def _batches(
        self, rows: Sequence[dict[str, list[int]]], order: Sequence[int]
    ) -> Iterator[Sequence[int]]:
        """Runs of `order`, which goes by length: of BATCH rows, on a GPU of PASS_TOKENS tokens."""
        start = 0
        while start < len(order):
            end = start + BATCH
            if self.device.type != "cpu":
                end = start + 1
                while end < len(order):
                    longest = len(rows[order[end]]["input_ids"])
                    if (end + 1 - start) * longest > PASS_TOKENS:
                        break
                    end += 1
            yield order[start:end]
            start = end

    def _sent(self, value: Tensor) -> Tensor:
        """On its device; from pinned memory, so that nothing waits for the copy."""
        if self.device.type != "cuda":
            return value.to(self.device)
        return value.pin_memory().to(self.device, non_blocking=True)
