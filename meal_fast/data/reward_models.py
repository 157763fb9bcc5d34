"""Reward models: a sequence-classification model as an objective, and where its reward is read."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from meal_fast.ops.gemm import accelerate

from .devices import exact_angles, full_products
from .reward_loading import load_classifier
from .reward_rows import Encoded, RowEncoder
from .reward_specs import FORMATS, HUB, Classifier, post_of, with_options

__all__ = ["FORMATS", "HUB", "Classifier", "ClassifierScorer", "post_of", "with_options"]

BATCH = 32  # rows of a forward pass on a CPU, of like length
PASS_TOKENS = 32_768  # with padding, of one on a GPU: 32 rows of 1,024, or 512 of 64
MAX_LENGTH = 1024  # tokens of a row, where the spec does not say and the model allows them
TOLERANCE = 1e-4  # of a reward in a batch, to that of its row alone; relative above 1

# Rows of unlike length: in a batch the shorter ones are padded.
_PROBE = (
    ("How do tides work?", "The moon pulls the water, and so does the sun, if less so. " * 2),
    ("Name three birds.", "Robin, wren and owl."),
    ("Hi", "Yes"),
)


class ClassifierScorer:
    """A sequence-classification model as an objective.

    Causal models read their reward at the last token, which those of transformers look for by
    comparing tokens with the pad token: one too early where a text ends in that token. Here a batch
    is padded with a token that none of its rows has. Rows in a batch are compared with rows alone
    when the model is loaded.

    Raises ValueError for a model that cannot be loaded or read in batches, and for one of several
    outputs of which the spec names none.
    """

    def __init__(self, name: str, spec: Classifier, device: torch.device) -> None:
        self.name, self.spec, self.device = name, spec, device
        self.model, self.tokenizer = load_classifier(name, spec)
        accelerate(self.model).to(device).eval().requires_grad_(False)
        if device.type == "cuda":
            exact_angles(self.model)
        self.logit = _chosen(name, spec, self.model.config)
        limit = min(_positions(self.model), self.tokenizer.model_max_length)
        if spec.max_length > limit:
            raise ValueError(f"objective {name!r}: max_length={spec.max_length} is above {limit}")
        self.max_length = spec.max_length or min(MAX_LENGTH, limit)
        self._reads_by_pad = False
        try:
            self.encode = RowEncoder(name, self.tokenizer, spec, self.max_length)
            with full_products():  # what rounding adds is no fault of the model
                self._probe()
        except ValueError as error:
            if str(error).startswith("objective "):
                raise
            raise self._unreadable(error) from error
        except Exception as error:  # of another model's code, or a template's: anything
            raise self._unreadable(error) from error
        self._told = False

    @property
    def cuts(self) -> dict[str, int]:
        """How many prompts and responses had to be cut, so far."""
        return {"cut_prompts": self.encode.cut_prompts, "cut_responses": self.encode.cut_responses}

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """(R,) float32 on its device, which is not waited for.

        Rows of like length share a batch: padding costs as much.
        """
        rows = [self.encode(p, r) for p, r in zip(prompts, responses, strict=True)]
        if self.encode.cut_responses and not self._told:
            self._told = True
            warnings.warn(
                f"objective {self.name!r}: a response is longer than the {self.max_length} tokens "
                "that the reward model is given, and is cut at its end; raise its max_length, or "
                "lower rollout.max_new_tokens",
                stacklevel=2,
            )
        return self._rewards(rows)

    def _rewards(self, rows: Sequence[Encoded]) -> Tensor:
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]["input_ids"]))
        made = [self._read([rows[i] for i in chosen]) for chosen in self._batches(rows, order)]
        reward = torch.empty(len(rows), device=self.device)
        if made:
            reward[self._sent(torch.tensor(order))] = torch.cat(made)
        return reward

    def _read(self, rows: Sequence[Encoded]) -> Tensor:
        """The rewards of a batch."""
        pad = self._pad(rows)
        if self._reads_by_pad:
            self._say_pad(pad)
        width = max(len(row["input_ids"]) for row in rows)
        given = {}
        for key in rows[0]:
            fill = pad if key == "input_ids" else 0
            filled = [row[key] + [fill] * (width - len(row[key])) for row in rows]
            given[key] = self._sent(torch.tensor(filled))
        return self.spec.sign * self.model(**given).logits[:, self.logit].float()

    def _pad(self, rows: Sequence[Encoded]) -> int:
        """The token that rows are padded with: the usual one, or one of none of them."""
        there = {token for row in rows for token in row["input_ids"]}
        usual = self.tokenizer.pad_token_id
        known = len(self.model.get_input_embeddings().weight)
        if usual is not None and usual not in there and usual < known:
            return int(usual)
        return next(token for token in range(len(there) + 1) if token not in there)

    def _say_pad(self, pad: int | None) -> None:
        for config in (self.model.config, self.model.config.get_text_config()):
            config.pad_token_id = pad

    @torch.no_grad()
    def _probe(self) -> None:
        """Find whether the model looks for its pad token, and compare a batch with rows alone."""
        rows = [self.encode._whole(prompt, response) for prompt, response in _PROBE]
        ids, before = rows[0]["input_ids"], self.model.config.pad_token_id
        self._say_pad(ids[-1])
        with_last = self._read(rows[:1])
        unused = next(token for token in range(len(ids) + 1) if token not in ids)
        self._say_pad(unused)
        without = self._read(rows[:1])
        self._reads_by_pad = bool((with_last != without).any())
        self._say_pad(before)
        alone = torch.cat([self._read([row]) for row in rows])
        batch = self._rewards(rows)
        for one, among in zip(alone.tolist(), batch.tolist(), strict=True):
            if not abs(one - among) <= TOLERANCE * max(1.0, abs(one)):
                raise ValueError(
                    f"objective {self.name!r}: {self.spec.path!r} gives a row {one:g} alone and "
                    f"{among:g} in a batch with a longer one: its rewards would depend on the "
                    "other rows; choose a reward model of another type"
                )

    def _unreadable(self, error: Exception) -> ValueError:
        reason = " ".join(str(error).split()) or "no reason given"
        return ValueError(
            f"objective {self.name!r}: {self.spec.path!r} cannot score two trial rows "
            f"({type(error).__name__}: {reason})"
        )

    def _batches(self, rows: Sequence[Encoded], order: Sequence[int]) -> Iterator[Sequence[int]]:
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


def _chosen(name: str, spec: Classifier, config: Any) -> int:
    """Which output is the reward. Raises ValueError where there are several, and none is named."""
    count, names = config.num_labels, config.id2label or {}
    listed = ", ".join(f"{i}={names.get(i, '?')}" for i in range(count))
    if spec.label:
        wanted = spec.label.casefold()
        at = [i for i in range(count) if str(names.get(i, "")).casefold() == wanted]
        if len(at) != 1:
            raise ValueError(
                f"objective {name!r}: label={spec.label!r} is none of its labels: {listed}"
            )
        return at[0]
    if spec.logit is None:
        if count > 1:
            last = names.get(count - 1, "?")
            raise ValueError(
                f"objective {name!r}: {spec.path!r} has {count} outputs ({listed}), and which of "
                f"them is the reward is not said; add ?logit={count - 1}, or ?label={last}"
            )
        return 0
    if spec.logit >= count:
        raise ValueError(f"objective {name!r}: logit={spec.logit}, but there are {count}")
    return spec.logit


def _positions(model: nn.Module) -> int:
    """How many tokens a model has positions for."""
    config: Any = model.config
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    most = int(most) if isinstance(most, int) and most > 0 else MAX_LENGTH
    for name, module in model.named_modules():  # RoBERTa's begin behind that of the padding
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            if module.padding_idx is not None:
                most = min(most, module.num_embeddings - module.padding_idx - 1)
    return most
