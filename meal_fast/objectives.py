"""Objectives: anything that scores (prompts, responses), behind one interface.

An objective is given as `NAME=SOURCE`, or `NAME=SOURCE?key=value&key=value`. SOURCE is one of

    packaged:complied, packaged:harmless     the reward models of `make assets`
    Ray2333/gpt2-large-helpful-reward_model  a hub name in `HUB`: its right format is known
    PATH or owner/name                       any sequence-classification model, format given
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
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

import torch
from torch import Tensor

from .assets import NAMES as ASSETS
from .assets import asset
from .ops.gemm import accelerate
from .quiet import quiet

FORMATS = ("pair", "response", "response+prompt", "template:TEXT")
BATCH = 32  # rows of a forward pass, of like length

# TL;DR prompts carry their post between these marks (RiC's layout): see meal_fast.prompts.
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

    def __init__(self, scorers: dict[str, Scorer]) -> None:
        if len(scorers) < 2:
            raise ValueError(
                f"objectives={list(scorers)!r}: two or more are needed, there is nothing to steer"
            )
        self.names = tuple(scorers)
        self._scorers = scorers

    def score(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Raw rewards (R, K), float32 on the CPU; row r scores `responses[r]` to `prompts[r]`.

        Raises ObjectiveError when an objective raises, returns another number of scores than R, or
        one that is NaN or infinite.
        """
        if len(prompts) != len(responses):
            raise ValueError(f"{len(prompts)} prompts, but {len(responses)} responses")
        columns = [
            _checked(name, scorer, prompts, responses) for name, scorer in self._scorers.items()
        ]
        return torch.stack(columns, dim=1)


@quiet()
def load_objectives(specs: Sequence[str], device: str | torch.device = "cpu") -> Objectives:
    """The objectives that `specs` name (the grammar is at the head of this file), on `device`.

    Raises ValueError for a broken spec, an unknown key or format, or a model that cannot be loaded.
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
    device = torch.device(device)
    return Objectives(
        {
            name: ClassifierScorer(name, target, device)
            if isinstance(target, Classifier)
            else target
            for name, target in parsed.items()
        }
    )


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
    bad = (~torch.isfinite(column)).nonzero().flatten().tolist()
    if bad:
        raise ObjectiveError(
            f"objective {name!r} returned {column[bad[0]].item()} for row {bad[0]}, "
            f"the response {_short(responses[bad[0]])}"
        )
    return column


def _column(scorer: Scorer, prompts: Sequence[str], responses: Sequence[str]) -> Tensor | Exception:
    """What the scorer says, float32 on the CPU; what it raised: a user's function, so anything."""
    try:
        return torch.as_tensor(scorer(prompts, responses), dtype=torch.float32).detach().cpu()
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

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """(R,) float32 on the CPU. Rows of like length share a batch: padding costs as much."""
        rows = [self.encode(p, r) for p, r in zip(prompts, responses, strict=True)]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        reward = torch.empty(len(rows))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            inputs = self.tokenizer.pad([rows[i] for i in chosen], return_tensors="pt")
            logits = self.model(**inputs.to(self.device)).logits[:, self.spec.logit]
            reward[chosen] = self.spec.sign * logits.float().cpu()
        return reward


@dataclass(frozen=True)
class Normalizer:
    """Reward normalisation, fitted once on a calibration sample and saved with the run [P].

    r̃ = (r − offset) / divisor, per objective: `max` offset 0, divisor max|r| (the default);
    `standard` mean and standard deviation (n − 1); `tanh` that, then tanh; `none` 0 and 1.
    """

    mode: str
    offset: tuple[float, ...]  # (K,)
    divisor: tuple[float, ...]  # (K,)

    def __post_init__(self) -> None:
        if self.mode not in ("max", "standard", "tanh", "none"):
            raise ValueError(
                f"score.normalization={self.mode!r}: choose from max, standard, tanh, none"
            )
        if len(self.offset) != len(self.divisor) or not self.offset:
            raise ValueError("a normaliser needs one offset and one divisor per objective")
        values = torch.tensor([self.offset, self.divisor], dtype=torch.float64)
        if not torch.isfinite(values).all() or not (values[1] > 0).all():
            raise ValueError(f"divisors must be positive and finite, got {self.divisor}")

    @classmethod
    def fit(cls, reward_RK: Tensor, mode: str) -> Normalizer:
        """The statistics of a calibration sample (R, K), R ≥ 2.

        Raises ValueError for a reward that is not finite, and for an objective that gives every
        response of the sample the same reward: it cannot be normalised, nor steered.
        """
        if reward_RK.ndim != 2 or reward_RK.shape[0] < 2:
            raise ValueError(
                f"calibration rewards of shape {tuple(reward_RK.shape)}: at least 2 rows are needed"
            )
        reward = reward_RK.double()
        if not torch.isfinite(reward).all():
            raise ValueError("calibration rewards must be finite")
        if mode != "none":
            for k, (low, high) in enumerate(zip(*reward.aminmax(dim=0), strict=True)):
                if low == high:
                    raise ValueError(
                        f"objective {k} (from 0) gives every response of the calibration sample "
                        f"the reward {low.item():g}: use a larger sample or another objective"
                    )
        zero, one = torch.zeros(reward.shape[1]), torch.ones(reward.shape[1])
        if mode in ("standard", "tanh"):
            zero, one = reward.mean(dim=0), reward.std(dim=0)
        elif mode == "max":
            one = reward.abs().amax(dim=0)
        return cls(mode, tuple(zero.tolist()), tuple(one.tolist()))

    @property
    def linear(self) -> bool:
        """Whether offset and divisor are all there is to it (not so for `tanh`)."""
        return self.mode != "tanh"

    def apply(self, reward_RK: Tensor) -> Tensor:
        """r̃ (R, K) in the dtype and on the device of `reward_RK`."""
        if reward_RK.shape[-1] != len(self.offset):
            raise ValueError(
                f"rewards of {reward_RK.shape[-1]} objectives, statistics of {len(self.offset)}"
            )
        scaled = (reward_RK - reward_RK.new_tensor(self.offset)) / reward_RK.new_tensor(
            self.divisor
        )
        return scaled.tanh() if self.mode == "tanh" else scaled

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; `from_dict` reads them back exactly."""
        return {"mode": self.mode, "offset": list(self.offset), "divisor": list(self.divisor)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Normalizer:
        """What `to_dict` gave. Raises ValueError for anything else."""
        if not isinstance(values, dict) or set(values) != {"mode", "offset", "divisor"}:
            raise ValueError(f"not a normaliser's values: {values!r}")
        return cls(values["mode"], tuple(values["offset"]), tuple(values["divisor"]))


def default_utopia(normalized_RK: Tensor) -> Tensor:
    """z* (K,): per objective the calibration sample's maximum plus a tenth of its range [R]."""
    low, high = normalized_RK.aminmax(dim=0)
    return high + 0.1 * (high - low)
