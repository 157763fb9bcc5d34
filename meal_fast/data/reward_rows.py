"""What a reward model reads: a prompt and a response as tokens, in the model's own format.

A row that is longer than the model takes is cut where it costs least, and counted: its prompt from
the left, and only a response that is too long by itself at its end. The format's own text stays
whole in either case.

Special tokens are those of the format. In the text of a user or of the policy `<|im_end|>` is ten
characters and no end of a turn: else a response could write turns of its own.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from typing import Any

from .reward_specs import Classifier, post_of, put
from .template_dates import frozen

Encoded = dict[str, list[int]]  # input_ids and what else the model takes, all of one length

DAY = datetime.datetime(2024, 7, 26)  # that a chat template prints: a reward is the same on any
_MARK = "\u241f"  # stands for a response while it is looked for in what the template makes

_HELD = 0xF0000  # of a plane for private use: characters that stand for special tokens in a text


class RowEncoder:
    """Writes rows in a model's format; `cut_prompts` and `cut_responses` count the cut ones.

    Raises ValueError where the format's own text leaves no room for a response, and for a format
    `chat` without a chat template.
    """

    def __init__(self, name: str, tokenizer: Any, spec: Classifier, max_length: int) -> None:
        self.tokenizer, self.spec, self.max_length = tokenizer, spec, max_length
        self.cut_prompts = self.cut_responses = 0
        special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
        self._special = sorted(special - {""}, key=len, reverse=True)
        self._live = re.compile("|".join(map(re.escape, self._special)) or r"(?!)")
        if spec.format == "chat" and not tokenizer.chat_template:
            raise ValueError(
                f"objective {name!r}: format=chat, but the tokenizer of {spec.path!r} has no chat "
                "template; write the format out: ?format=template:TEXT"
            )
        if spec.format == "chat":
            template = tokenizer.get_chat_template()
            dated = frozen(template, DAY)
            self._template = f"{dated}{{#- the day +#}}{template}" if dated else template
        self._doubled = self._doubles()
        own = len(self._whole("", "")["input_ids"])
        if own >= max_length:
            raise ValueError(
                f"objective {name!r}: max_length={max_length}, but the format's own text has {own} "
                "tokens; choose a shorter format, or a model (or max_length) that takes more"
            )
        if spec.format == "chat":
            self._check_chat(name)

    def __call__(self, prompt: str, response: str) -> Encoded:
        """Token ids (and what else the model takes) of one row, of at most `max_length`."""
        row = self._whole(prompt, response)
        if len(row["input_ids"]) <= self.max_length:
            return row
        if "{post}" in self.spec.prompt:  # what is cut is what the model is shown
            prompt = post_of(prompt)
        if self._fits("", response):
            self.cut_prompts += 1
            n = len(prompt)
            kept = _most(n, lambda keep: self._fits(prompt[n - keep :], response))
            return self._whole(prompt[n - kept :], response)
        self.cut_responses += 1
        kept = _most(len(response), lambda keep: self._fits("", response[:keep]))
        return self._whole("", response[:kept])

    def _fits(self, prompt: str, response: str) -> bool:
        return len(self._whole(prompt, response)["input_ids"]) <= self.max_length

    def _whole(self, prompt: str, response: str) -> Encoded:
        """A row however long it is."""
        held = bool(self._live.search(prompt) or self._live.search(response))
        if held:
            prompt, response = self._hold(prompt), self._hold(response)
        texts, added = self._texts(prompt, response)
        if not held:
            return self._tokens(texts, added)[0]
        found = [self._released(text) for text in texts]
        row, spans = self._tokens([text for text, _ in found], added)
        return self._split(row, spans, [inside for _, inside in found])

    def _texts(self, prompt: str, response: str) -> tuple[list[str], bool]:
        """What the tokenizer is given, and whether it adds special tokens of its own."""
        tokenizer, spec = self.tokenizer, self.spec
        if spec.format == "chat":
            asked = put(spec.prompt, prompt=prompt, post=post_of(prompt))
            said = self._chat(asked, response)
            bare, before = _bare(said), _bare(asked)
            if _bare(response) not in bare[bare.find(before) + len(before) :]:  # thoughts cut off
                said = self._chat(asked, _MARK).replace(_MARK, response)
            return [said], False
        prompt = put(spec.prompt, prompt=prompt, post=post_of(prompt))
        if spec.format == "pair":
            return [prompt, response], True
        if spec.format == "response":
            return [response], True
        if spec.format == "response+prompt":
            return [response, prompt], True
        special = {key: getattr(tokenizer, f"{key}_token") or "" for key in ("bos", "eos", "sep")}
        template = spec.format.removeprefix("template:")
        return [put(template, prompt=prompt, response=response, **special)], True

    def _chat(self, asked: str, response: str) -> str:
        """What the tokenizer's chat template makes of a prompt and a response."""
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": response}]
        said: str = self.tokenizer.apply_chat_template(
            turns, chat_template=self._template, tokenize=False
        )
        return said

    def _check_chat(self, name: str) -> None:
        """Raises ValueError where the chat template does not say both texts whole, each once."""
        long = " ".join(f"{n}x" for n in range(1000, 1667))  # 4,000 characters
        for asked, response, whole in (
            ("7prompt7", "7response7", ("7prompt7", "7response7")),
            ("7prompt7", long, ("7prompt7", long)),
            (long, "7response7", (long, "7response7")),
            ("7prompt7", "7before7</think>7behind7", ("7prompt7", "7before7", "7behind7")),
        ):
            said = _bare(self._chat(asked, response))
            for text in whole:
                if said.count(_bare(text)) != 1:
                    raise ValueError(
                        f"objective {name!r}: format=chat, but the chat template of "
                        f"{self.spec.path!r} does not say {text[:20]!r} of a prompt of "
                        f"{len(asked)} and a response of {len(response)} characters whole and "
                        "once; write the format out: ?format=template:TEXT"
                    )

    def _tokens(
        self, texts: list[str], added: bool
    ) -> tuple[Encoded, list[tuple[int | None, int, int]]]:
        """A row, and where each token comes from: which text (None: from none), from, to."""
        tokenizer = self.tokenizer
        # As lists, because a bare empty string as the second text is taken for no second text.
        found = tokenizer(
            *[[text] for text in texts], add_special_tokens=added, truncation=False, verbose=False,
            **({"return_offsets_mapping": True} if tokenizer.is_fast else {}),
        )  # fmt: skip
        if not found["input_ids"][0]:  # an empty response alone, and no special tokens
            found = tokenizer([tokenizer.eos_token])
        row = {key: rows[0] for key, rows in found.items() if key != "offset_mapping"}
        spans: list[tuple[int | None, int, int]] = []
        if "offset_mapping" in found:
            of = found.sequence_ids(0)
            spans = [(t, *at) for t, at in zip(of, found["offset_mapping"][0], strict=True)]
        first, last = self._doubled if added else (False, False)
        whole = slice(int(first), -1 if last else None)
        return {key: values[whole] for key, values in row.items()}, spans[whole]

    def _doubles(self) -> tuple[bool, bool]:
        """Whether the tokenizer puts a bos first, and an eos last, where the format has its own."""
        tokenizer, template = self.tokenizer, self.spec.format.removeprefix("template:")
        if template == self.spec.format:
            return False, False
        own, plain = (
            tokenizer("a")["input_ids"],
            tokenizer("a", add_special_tokens=False)["input_ids"],
        )
        bos, eos = tokenizer.bos_token, tokenizer.eos_token
        begins = bool(bos) and template.startswith(("{bos}", bos))
        ends = bool(eos) and template.endswith(("{eos}", eos))
        more = own != plain
        return (
            begins and more and own[0] == tokenizer.bos_token_id,
            ends and more and own[-1] == tokenizer.eos_token_id,
        )

    def _hold(self, text: str) -> str:
        """The text with a character for each special token that it spells out."""
        return self._live.sub(lambda m: chr(_HELD + self._special.index(m.group())), text)

    def _released(self, text: str) -> tuple[str, list[tuple[int, int]]]:
        """The text as it was before `_hold`, and where in it special tokens are only spelt out."""
        parts: list[str] = []
        inside: list[tuple[int, int]] = []
        length = 0
        for character in text:
            at = ord(character) - _HELD
            if 0 <= at < len(self._special):
                character = self._special[at]
                inside.append((length, length + len(character)))
            parts.append(character)
            length += len(character)
        return "".join(parts), inside

    def _split(
        self, row: Encoded, spans: list[Any], inside: list[list[tuple[int, int]]]
    ) -> Encoded:
        """Puts the tokens of its spelling for every special token that is one by spelling alone."""
        if not spans:  # a tokenizer in Python says not where its tokens come from
            return row
        ids, special = row["input_ids"], set(self.tokenizer.all_special_ids)
        special |= {i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        new: Encoded = {key: [] for key in row}
        for i, (text, start, end) in enumerate(spans):
            spelt = [ids[i]]
            if text is not None and ids[i] in special:
                if any(start < b and a < end for a, b in inside[text]):
                    said = self.tokenizer.decode([ids[i]], skip_special_tokens=False)
                    spelt = self.tokenizer(
                        said, add_special_tokens=False, split_special_tokens=True, verbose=False
                    )["input_ids"]
            for key, values in new.items():
                values += spelt if key == "input_ids" else [row[key][i]] * len(spelt)
        return new


def _bare(text: str) -> str:
    """The text without spaces: a template may trim it, and put lines around its thoughts."""
    return "".join(text.split())


def _most(n: int, fits: Callable[[int], bool]) -> int:
    """The largest number of characters, of n, that fits; 0 is known to."""
    low, high = 0, n
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
