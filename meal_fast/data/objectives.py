"""Objectives: anything that scores (prompts, responses), behind one interface.

An objective is given as `NAME=SOURCE`, or `NAME=SOURCE?key=value&key=value`. SOURCE is one of

    packaged:complied, packaged:harmless     the reward models of `make assets`
    Ray2333/gpt2-large-helpful-reward_model  a hub name in `HUB`: its right format is known
    PATH or owner/name                       any sequence-classification model, format given
    world:first, world:second                exact rewards of a toy world: meal_fast.data.toy
    module:function                          Python: (prompts, responses) -> R numbers

and the keys of a model, with `%0A` for a newline and `%26` for `&`, are

    format      pair                (prompt, response) as the tokenizer's pair: the default
                response            the response alone
                response+prompt     the tokenizer's pair in the reversed order
                template:TEXT       one text; {prompt}, {response}, {bos}, {eos}, {sep} are put in
    prompt      how the prompt is written, with {prompt}; `{post}` is a TL;DR prompt's post alone
    logit       which output is the reward (0)
    sign        1, or -1 when lower is better
    max_length  tokens; longer inputs are cut (default: what the model takes, 1024 at most)
    path        where the weights lie, when not at SOURCE
    device      where it runs: cpu, cuda, cuda:N (default: the option objectives_device)
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

import torch
from torch import Tensor

from meal_fast.common import quiet
from meal_fast.config.schema import check_device
from meal_fast.ops.gemm import accelerate

from .assets import NAMES as ASSETS
from .assets import asset
from .devices import device_of
from .toy import world_objective

FORMATS = ("pair", "response", "response+prompt", "template:TEXT")
BATCH = 32  # rows of a forward pass on a CPU, of like length
PASS_TOKENS = 32_768  # with padding, of one on a GPU: 32 rows of 1,024, or 512 of 64

# TL;DR prompts carry their post between these marks (RiC's layout): see meal_fast.data.prompts.
_POST = re.compile(r"### Input:(.*?)(?:### Response:|$)", re.DOTALL)


class ObjectiveError(ValueError):
    """An objective failed while scoring; the message names it, and the row where there is one."""


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

Scorer = Callable[[Sequence[str], Sequence[str]], Any]


class Objectives:
    """K objectives in order. `score` is the only way in; it checks what comes out."""

    def __init__(self, scorers: dict[str, Scorer], device: str | torch.device = "cpu") -> None:
        if len(scorers) < 2:
            raise ValueError(
                f"objectives={list(scorers)!r}: two or more are needed, there is nothing to steer"
            )
        self.names = tuple(scorers)
        self.device = torch.device(device)  # of the rewards, wherever the scorers run
        self._scorers = scorers

    def rewards(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Raw rewards (R, K), float32 on `device`; row r scores `responses[r]` to `prompts[r]`.

        Raises ObjectiveError when an objective raises, returns another number of scores than R, or
        one that is NaN or infinite.
        """
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts, but {len(responses)} responses")
        columns = [
            _checked(name, scorer, prompts, responses) for name, scorer in self._scorers.items()
        ]
        # Looked at and copied together: every objective on a GPU has then been asked its work.
        places = {column.device for column in columns}
        at = places.pop() if len(places) == 1 else self.device
        reward_RK = torch.stack([column.to(at) for column in columns], dim=1)
        _check_finite(self.names, reward_RK, responses)
        return reward_RK.to(self.device)


@quiet()
def load_objectives(
    specs: Sequence[str],
    device: str | torch.device = "auto",  # of the models whose spec names none; auto: `to`
    to: str | torch.device = "cpu",  # of the rewards: the policy's
) -> Objectives:
    """The objectives that `specs` name (the grammar is at the head of this file).

    Raises ValueError for a broken spec, an unknown key or format, a device that is not there, or a
    model that cannot be loaded.
    """
    sources = {}
    for spec in specs:
        name, equals, source = spec.partition("=")
        if not name.strip() or not equals or not source.strip():
            raise ValueError(f"objectives: {spec!r} is not of the form NAME=SOURCE")
        if name in sources:
            raise ValueError(f"objectives: the name {name!r} is given twice")
        sources[name] = source
    # All are parsed before one is loaded: a misprint in the last must not cost the first's loading.
    parsed = {name: _parse(name, source) for name, source in sources.items()}
    if len(parsed) < 2:
        raise ValueError(f"objectives={list(specs)!r}: two or more are needed")
    given = device_of(str(to if str(device) == "auto" else device), "objectives_device")
    runs_on = {
        name: device_of(target.device, f"objective {name!r}: device") if target.device else given
        for name, target in parsed.items()
        if isinstance(target, Classifier)
    }
    scorers = {
        name: ClassifierScorer(name, target, runs_on[name])
        if isinstance(target, Classifier)
        else target
        for name, target in parsed.items()
    }
    return Objectives(scorers, to)


def _checked(
    name: str, scorer: Scorer, prompts: Sequence[str], responses: Sequence[str]
) -> Tensor:  # (R,) float32
    column = _column(scorer, prompts, responses)
    if isinstance(column, ObjectiveError):
        raise column
    if isinstance(column, Exception):
        row = _first_failing(scorer, prompts, responses)
        raise ObjectiveError(
            f"objective {name!r} raised {type(column).__name__}: {column} ({row})"
        ) from column
    if column.shape != (len(responses),):
        raise ObjectiveError(
            f"objective {name!r} returned shape {tuple(column.shape)} for {len(responses)} "
            f"responses: one number for each is needed"
        )
    return column


def _check_finite(names: Sequence[str], reward_RK: Tensor, responses: Sequence[str]) -> None:
    bad_RK = ~torch.isfinite(reward_RK)
    if bool(bad_RK.any()):
        k, row = bad_RK.T.nonzero()[0].tolist()
        raise ObjectiveError(
            f"objective {names[k]!r} returned {reward_RK[row, k].item()} for row {row}, "
            f"the response {_short(responses[row])}"
        )


def _column(scorer: Scorer, prompts: Sequence[str], responses: Sequence[str]) -> Tensor | Exception:
    """What the scorer says, float32; what it raised: a user's function, so anything."""
    try:
        return torch.as_tensor(scorer(prompts, responses), dtype=torch.float32).detach()
    except Exception as error:
        return error


def _first_failing(scorer: Scorer, prompts: Sequence[str], responses: Sequence[str]) -> str:
    """Which row alone makes the scorer raise; only called when it has raised."""
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if isinstance(_column(scorer, [prompt], [response]), Exception):
            return f"row {row}, the response {_short(response)}"
    return f"a batch of {len(responses)}, though no row of it alone"


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _parse(name: str, spec: str) -> Classifier | Scorer:
    source, _, query = spec.partition("?")
    kind, _, of_world = source.partition(":")
    if kind in ("world", "meal_fast.worlds"):  # the latter in runs of before
        if query:
            raise ValueError(f"objective {name!r}: {source} takes no options, got {query!r}")
        return world_objective(of_world)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", source) and not source.startswith("packaged:"):
        if query:
            raise ValueError(
                f"objective {name!r}: a Python function takes no options, got {query!r}"
            )
        return _function(name, source)
    if source.startswith("packaged:"):
        model = source.removeprefix("packaged:")
        known = [a for a in ASSETS if a in ("complied", "harmless")]
        if model not in known:
            raise ValueError(
                f"objective {name!r}: no packaged reward model {model!r}; choose from "
                f"{', '.join(known)}"
            )
        base = Classifier(str(asset(model)))
    else:
        base = HUB.get(source, Classifier(source))
    return _with_options(name, base, query)


def _function(name: str, source: str) -> Scorer:
    module_name, _, attribute = source.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"objective {name!r}: {source!r} cannot be imported ({error})") from error
    if not callable(function):
        raise ValueError(f"objective {name!r}: {source!r} is not a function")
    return function


def _with_options(name: str, base: Classifier, query: str) -> Classifier:
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
