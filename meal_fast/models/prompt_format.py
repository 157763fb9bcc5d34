"""How a conversation and a preference become tokens: the chat template, applied whole."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from meal_fast.data.preferences import Goals, preference_text

from .chat_template import applied, default_template, end_of_turn, prepared, text_markers
from .preference_template import GLUE, plain_pairs, preference_template

# Ends, digits, brackets and marks of many kinds, where a tokenizer might merge across a cut.
PLAIN_TEXTS = (
    "How do tides work?",
    " \n two lines,\n\tindented  \n",
    "naïve 東京 🙂👩‍👩‍👧",
    "cafe\u0301 नि",
    "2024 = 1,000.50",
    "a [list] (of",
    "C++ --- [a] *b*",
    ".",
)

_APPLY = inspect.signature(PreTrainedTokenizerBase.apply_chat_template)
_TELLS_TEXT = "sanitize_control_tokens" in _APPLY.parameters

Ids = tuple[int, ...]
History = tuple[tuple[str, str], ...]  # (role, text) of earlier turns


class PromptFormat:
    """What a policy reads and says, as tokens.

    They are those of `template`, the saved policy's own, applied whole by transformers: training,
    evaluation, chat and serving read what any other program reads that applies it. What a message
    says is encoded as text, also where it is spelt like a token of the tokenizer's. The tokens are
    cut in two where the preference begins, so that what stands before it is computed once for all
    preferences.

    template: as `chat_template.prepared` gives it; None: the tokenizer's, without more ado.
    """

    def __init__(
        self,
        tokenizer: Any,
        names: Sequence[str],
        style: str = "bar",
        goals: Goals | None = None,
        template: str | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                "its tokenizer is written in Python, and is not supported; save it as a fast one"
            )
        self.tokenizer = tokenizer
        self.names = tuple(names)
        self.style = style
        self.goals = goals  # of style `scores`; None in training, whose requests hold rewards
        if template is None:
            template = prepared(tokenizer, default_template(tokenizer))
        self.base_template = template
        self.markers = text_markers(tokenizer, template)
        self.end = end_of_turn(tokenizer, template)
        ids = tokenizer.encode(self.end, add_special_tokens=False) if self.end else []
        if self.end in tokenizer.added_tokens_encoder:
            ids = [tokenizer.added_tokens_encoder[self.end]]
        self.end_ids = frozenset(ids)  # that ends an assistant's turn; none: there is no such turn
        # As transformers has them: what is special, and what the template has besides.
        added = [t for t in tokenizer.added_tokens_decoder.values() if t.content.strip()]
        controls = [t.content for t in added if t.special or t.content in template]
        self._controls = sorted(controls, key=len, reverse=True)
        unknown = tokenizer.unk_token_id
        self._special = frozenset(tokenizer.all_special_ids) - {unknown}
        self._normalizer = getattr(tokenizer.backend_tokenizer, "normalizer", None)
        self._foul = [
            old for old, _ in plain_pairs(names, style, self.markers) if "\u241f" not in old
        ]
        for glue in GLUE:
            self._begin(glue)
            if self._stable():
                return
        raise ValueError(
            "its tokenizer merges the end of a prompt with the preference behind it, in other "
            "tokens for each; use a model whose tokenizer keeps words apart"
        )

    def _begin(self, glue: str) -> None:
        """Say preferences behind `glue`."""
        self.glue = glue
        self.template = self.saved_template()
        self._written: dict[bool, int] = {}
        self.encode_prompt = lru_cache(maxsize=4096)(self._encode_prompt)
        self._encoded = lru_cache(maxsize=4096)(self._encode)
        whole = self._whole("a", "" if self.style == "none" else "[", ())
        self._tail = whole[min(_common(whole, self._otherwise("a", ())), len(whole) - 1) :]

    def saved_template(self) -> str:
        """Give the saved policy's chat template: `template`, and of `scores` with its goals."""
        how = (self.names, self.style, self.goals, self.markers, self.glue)
        return preference_template(self.base_template, *how)

    def _stable(self) -> bool:
        """Say whether a text's tokens and a preference's are those of both together."""
        if self.style == "none":
            return True
        k = len(self.names)
        said = [self.said(tuple(float(i == j) for j in range(k))) for i in range(k)]
        apart = [self._encoded("a", s, ())[1] for s in said]
        return all(
            (*self.encode_prompt(text), *suffix) == self._whole(text, s, ())
            for text in PLAIN_TEXTS
            for s, suffix in zip(said, apart, strict=True)
        )

    def said(self, w: tuple[float, ...] | None) -> str:
        """Give the text by which the policy reads a preference; none: no text."""
        if w is None:
            return ""
        read = w if self.goals is None else self.goals.of(w)
        return preference_text(read, self.names, self.style)

    def encode(
        self, text: str, w: tuple[float, ...] | None = None, history: History = ()
    ) -> tuple[Ids, Ids]:
        """Encode the user's `text` behind earlier turns, up to the preference, and what follows it:
        the preference (None: no preference text) and the assistant's header.

        Raises ValueError for turns that the chat template does not take.
        """
        try:
            return self._encoded(text, self.said(w), tuple(history))
        except ValueError as error:
            if not history:
                raise
            said = f"messages: the chat template does not take them ({error})"
            raise ValueError(said) from None

    def encode_suffix(self, w: tuple[float, ...] | None) -> Ids:
        """Encode the preference and the header, as they stand behind most texts: see `encode`."""
        return self._encoded("a", self.said(w), ())[1]

    def _encode_prompt(self, text: str) -> Ids:
        """Encode what stands before the preference: template, system line, the user's text.

        Without a text that is the template alone.
        """
        if text.strip():
            return self._shared(text, ())
        one, other = self._shared("a", ()), self._shared("?", ())
        return one[: _common(one, other)]

    def _encode(self, text: str, said: str, history: History) -> tuple[Ids, Ids]:
        whole = self._whole(text, said, history)
        n = _common(whole, self._shared(text, history) if history else self.encode_prompt(text))
        n = max(n, 1)  # some tokenizers merge a text's end with what follows: cut before that
        return whole[:n], whole[n:]

    def _shared(self, text: str, history: History) -> Ids:
        tail, said = self._tail, "" if self.style == "none" else "["
        whole = self._whole(text, said, history)
        if whole[-len(tail) :] == tail:
            return whole[: -len(tail)]
        return whole[: _common(whole, self._otherwise(text, history))]  # the cut is in a token

    def _otherwise(self, text: str, history: History) -> Ids:
        """Encode the text with what no preference begins with behind it."""
        if self.style == "none":
            return self._whole(f"{text} [", "", history)
        return self._whole(text, "\u241f", history)

    def _whole(self, text: str, said: str, history: History) -> Ids:
        return self.apply([*history, ("user", text)], said)

    def apply(self, turns: Sequence[tuple[str, str]], said: str, *, reply: bool = True) -> Ids:
        """Apply the template to (role, text) of turns. Raises ValueError, one line, where it fails.

        reply: end with the header of an answer.
        """
        given: dict[str, Any] = {"preference": said} if said else {}
        turns = [(role, self._folded(text)) for role, text in turns]
        if any(token in text for _, text in turns for token in self._controls):
            return self._as_text(turns, reply, given)
        return self._checked(turns, reply, given)

    def _folded(self, text: str) -> str:
        """Give the text as the tokenizer folds it (letters of other widths, say) where only that
        has what the template puts out."""
        if self._normalizer is None:
            return text
        seen = self._normalizer.normalize_str(text)
        hidden = any(foul in seen and foul not in text for foul in self._foul)
        return seen.replace("\u2581", " ").strip() if hidden else text

    def _as_text(self, turns: Sequence[tuple[str, str]], reply: bool, given: dict[str, Any]) -> Ids:
        """Encode turns that hold tokens of the tokenizer's as the text that they are.

        Such a token gets a space where the tokenizer makes it of that text too, and where
        transformers (before 5.23) cannot tell whose it is.
        """
        if _TELLS_TEXT:
            messages = [{"role": role, "content": text} for role, text in turns]
            try:
                ids = self.tokenizer.apply_chat_template(
                    messages,
                    chat_template=self.template,
                    add_generation_prompt=reply,
                    sanitize_control_tokens=True,
                    return_dict=False,
                    **given,
                )
                return tuple(ids)
            except Exception as error:  # jinja2's own; "can't sanitize"
                if "sanitize" not in str(error):
                    raise ValueError(" ".join(str(error).split())) from None
        return self._checked([(role, self._spaced(text)) for role, text in turns], reply, given)

    def _checked(self, turns: Sequence[tuple[str, str]], reply: bool, given: dict[str, Any]) -> Ids:
        whole = applied(self.tokenizer, self.template, turns, reply=reply, **given)
        ids = tuple(self.tokenizer.encode(whole, add_special_tokens=False))
        if len(turns) == 1 and reply and self._special:
            own = self._special_in(bool(given))
            if sum(token in self._special for token in ids) != own:
                raise ValueError(
                    f"the text {turns[0][1][:40]!r} becomes tokens that only a chat template may "
                    "write; leave them out"
                )
        return ids

    def _special_in(self, preferred: bool) -> int:
        """Count the special tokens that the template itself writes around one turn."""
        if preferred not in self._written:
            given: dict[str, Any] = {"preference": "["} if preferred else {}
            whole = applied(self.tokenizer, self.template, [("user", "a")], **given)
            ids = self.tokenizer.encode(whole, add_special_tokens=False)
            self._written[preferred] = sum(token in self._special for token in ids)
        return self._written[preferred]

    def _spaced(self, text: str) -> str:
        for token in self._controls:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def answer(self, text: str) -> Ids:
        """Encode a text as an assistant's whole turn, behind its header, with the token that ends
        it."""
        asked = self._whole("a", "", ())
        end = self.end_ids
        try:
            whole = self.apply([("user", "a"), ("assistant", text)], "", reply=False)
        except ValueError:
            whole = ()
        ids = whole[len(asked) :] if whole[: len(asked)] == asked else ()
        ends = [i for i, token in enumerate(ids) if token in end]
        if ends:
            return ids[: ends[-1] + 1]
        plain = tuple(self.tokenizer.encode(text, add_special_tokens=False))
        last = min(end, default=self.tokenizer.eos_token_id)
        return plain if last is None else (*plain, last)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a response."""
        return self.end_ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Give the text of these tokens, special ones and those that end a response left out."""
        stop = self.stop_ids
        return self.tokenizer.decode([t for t in tokens if t not in stop], skip_special_tokens=True)


def _common(one: Ids, other: Ids) -> int:
    """Count the tokens that both begin with."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
