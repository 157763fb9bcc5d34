"""Whether a policy reads, token by token, what its saved chat template says: seen at load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from meal_fast.config.config import PolicyConfig
from meal_fast.data.preferences import Goals

from .chat_template import applied, default_template, prepared
from .preference_template import plain_pairs
from .prompt_format import PLAIN_TEXTS, PromptFormat

TEXTS = (*PLAIN_TEXTS, "▁x▁", " [", "<b>")
_LONG = "\n".join(f"Line {n} of a Long text." for n in range(1000, 1160))  # 4,000 characters
_TURNS = (("user", "Who are you?"), ("assistant", "A model."))


def words_of(
    config: PolicyConfig,
    tokenizer: Any,
    names: Sequence[str],
    goals: Goals | None,
    template: str | None,  # as the run has kept it; None: the tokenizer's, made fast now
) -> tuple[Any, ...]:
    """Give what `PromptFormat` is made of, once it has been seen to be right.

    Raises ValueError, naming the option, where the template cannot be used, where it cuts or
    changes what it is to say, and where the tokens that training would see are not those of the
    saved template applied by transformers.
    """
    try:
        if template is None:
            own = default_template(tokenizer)
            template = prepared(tokenizer, own, config.template_kwargs, config.system)
        words = (tokenizer, names, config.preference_text, goals, template)
        _check(PromptFormat(*words))
    except ValueError as error:
        if str(error).startswith("policy."):
            raise
        raise ValueError(f"policy.path={config.path!r}: {error}") from None
    return words


def _check(format: PromptFormat) -> None:
    """Compare training's tokens with transformers', whole, at several texts and preferences."""
    k, tokenizer = len(format.names), format.tokenizer
    corners = [tuple(float(i == j) for j in range(k)) for i in range(k)]
    asked: list[tuple[float, ...] | None] = [None]
    asked += [] if format.style == "none" else [(1.0 / k,) * k, *corners[:3]]
    template = format.saved_template()
    mapped = format.style in ("bar", "numbers") or format.goals is not None
    histories: list[tuple[tuple[str, str], ...]] = [()]
    try:
        format.encode("a", None, _TURNS)
        histories.append(_TURNS)
    except ValueError:
        pass  # a template of single turns
    cases = [(t, w, histories[0]) for t in TEXTS for w in asked]
    cases += [(TEXTS[1], w, h) for w in asked for h in histories[1:]]
    pairs = plain_pairs(format.names, format.style, format.markers)
    for text, w, history in [*cases, *((_LONG, w, histories[0]) for w in asked)]:
        turns = [{"role": role, "content": said} for role, said in (*history, ("user", text))]
        given: dict[str, Any] = {}
        if w is not None:
            given["preference"] = (
                dict(zip(format.names, w, strict=True)) if mapped else format.said(w)
            )
        said = applied(tokenizer, template, [*history, ("user", text)], **given)
        there = text
        for old, new in pairs:
            there = there.replace(old, new)
        if there.strip() + (format.glue + format.said(w) if w is not None else "") not in said:
            behind = "" if w is None else ", with the preference behind it,"
            raise ValueError(
                f"its chat template cuts or changes a user's text of {len(text)} characters, "
                f"{text[:20]!r}{behind} and would change prompts in silence; let it say "
                "message['content'] as it is"
            )
        if text == _LONG:
            continue  # its tokens may be more than the tokenizer's own limit, which it would tell
        prompt, suffix = format.encode(text, w, history)
        whole = tokenizer.apply_chat_template(
            turns, chat_template=template, add_generation_prompt=True, return_dict=False, **given
        )
        if [*prompt, *suffix] != list(whole):
            raise ValueError(
                f"its tokenizer gives other tokens for the prompt {text!r} than its saved chat "
                "template would: what is trained would not be what is served"
            )
