"""How a prompt and a preference become tokens: the chat template, cut at the user's text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from meal_fast.common import opening
from meal_fast.data.preferences import Goals, preference_text

_MARK = "\u241f"  # stands for the user's text while the chat template is cut in two


class PromptFormat:
    """What a policy reads and says, as tokens.

    The prompt's tokens (template, system line, the user's text) do not depend on the preference,
    whose text and the assistant's header are a suffix of their own.
    """

    def __init__(
        self, tokenizer: Any, names: Sequence[str], style: str = "bar", goals: Goals | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.names = tuple(names)
        self.style = style
        self.goals = goals  # of style `scores`; None in training, whose requests hold rewards
        self._before, self._after = split_template(tokenizer)
        self.encode_prompt = lru_cache(maxsize=4096)(self._encode_prompt)
        self._encode_said = lru_cache(maxsize=4096)(self._encode_said_text)

    def _encode_prompt(self, text: str) -> tuple[int, ...]:
        """Tokens of everything before the preference: template, system line, the user's text."""
        ids = self.tokenizer(self._before + text, add_special_tokens=False)["input_ids"]
        return tuple(ids)

    def encode_conversation(self, history: Sequence[tuple[str, str]], text: str) -> tuple[int, ...]:
        """Encode (role, text) of earlier turns, and the user's text, up to the preference.

        Raises ValueError for turns that the chat template does not take.
        """
        try:
            before, after = split_template(self.tokenizer, history)
        except Exception as error:  # jinja2's own, whose classes are not at hand
            raise ValueError(f"messages: the chat template does not take them ({error})") from error
        if after != self._after:
            raise ValueError("messages: the chat template ends otherwise after several turns")
        return tuple(self.tokenizer(before + text, add_special_tokens=False)["input_ids"])

    def said(self, w: tuple[float, ...] | None) -> str:
        """Give the text by which the policy reads a preference; none: no text."""
        if w is None:
            return ""
        read = w if self.goals is None else self.goals.of(w)
        return preference_text(read, self.names, self.style)

    def encode_suffix(self, w: tuple[float, ...] | None) -> tuple[int, ...]:
        """Encode the preference (none: no preference text) and the assistant's header."""
        return self._encode_said(self.said(w))

    def _encode_said_text(self, said: str) -> tuple[int, ...]:
        text = (f" {said}" if said else "") + self._after
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """Give the text of these tokens, special ones left out."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def split_template(tokenizer: Any, history: Sequence[tuple[str, str]] = ()) -> tuple[str, str]:
    """Cut the chat template into the text before and after the user's last turn (the assistant's
    header), behind the turns (role, text) of `history`."""
    messages = [{"role": role, "content": said} for role, said in history]
    messages.append({"role": "user", "content": _MARK})
    with opening("the tokenizer's chat template", "use another model"):
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    before, mark, after = whole.rpartition(_MARK)
    if not mark or (not history and _MARK in before):
        raise ValueError("the tokenizer's chat template does not hold the user's text exactly once")
    return before, after
