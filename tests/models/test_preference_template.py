"""The chat template that says a preference: as training says it, and nothing else."""

import random

import pytest

pytest.importorskip("transformers")

from jinja2.exceptions import TemplateError

from meal_fast.data.preferences import Goals, lattice, preference_text
from meal_fast.data.toy import build_world
from meal_fast.models.preference_template import preference_template, without_preference

NAMES = ("helpful", "harmless", "brief")
ASKED = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " How so? "}]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(build_world("tiny"))


def applied(tokenizer, messages, preference, names=NAMES[:2], style="bar", goals=None):
    template = preference_template(tokenizer.chat_template, names, style, goals)
    return tokenizer.apply_chat_template(
        messages,
        chat_template=template,
        preference=preference,
        tokenize=False,
        add_generation_prompt=True,
    )


def said_by_hand(tokenizer, text):
    turns = [ASKED[0], {"role": "user", "content": f"How so? {text}"}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def sweeps():
    rng = random.Random(0)
    for k, points in ((2, 11), (2, 5), (2, 41), (2, 1001), (3, 11), (3, 41)):
        yield from lattice(k, points)
    for k in (2, 3):
        for _ in range(40):
            drawn = [rng.random() for _ in range(k)]
            yield tuple(x / sum(drawn) for x in drawn)


@pytest.mark.parametrize("style", ["bar", "numbers", "scores"])
def test_a_mapping_is_said_as_training_says_it(tokenizer, style):
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    ends = ((-1.25, 0.3, -0.04), (2.0, 0.9, 0.04))
    compiled = {}
    for k in (2, 3):
        goals = Goals(*(end[:k] for end in ends)) if style == "scores" else None
        whole = preference_template("{{ messages[-1]['content'] }}", NAMES[:k], style, goals)
        compiled[k] = environment.from_string(whole), goals
    for w in sweeps():
        (template, goals), names = compiled[len(w)], NAMES[: len(w)]
        given = dict(zip(names, w, strict=True))
        read = w if goals is None else goals.of(w)
        said = template.render(messages=[{"role": "user", "content": "Hi"}], preference=given)
        assert said == f"Hi {preference_text(read, names, style)}", w


def test_the_order_of_a_mapping_does_not_matter_and_a_text_is_taken_as_it_is(tokenizer):
    text = preference_text((0.8, 0.2), NAMES[:2])
    expected = said_by_hand(tokenizer, text)
    assert applied(tokenizer, ASKED, {"harmless": 0.2, "helpful": 0.8}) == expected
    assert applied(tokenizer, ASKED, text) == expected


def test_without_a_preference_the_template_is_the_base_models(tokenizer):
    plain = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    for nothing in (None, ""):
        assert applied(tokenizer, ASKED, nothing) == plain


def test_it_is_said_in_the_last_turn_of_the_user_of_whatever_parts(tokenizer):
    parts = [{"type": "text", "text": "How "}, {"type": "text", "text": "so? "}]
    in_parts = [ASKED[0], {"role": "user", "content": parts}]
    w = {"helpful": 1.0, "harmless": 0}
    assert applied(tokenizer, in_parts, w) == applied(tokenizer, ASKED, w)
    continued = applied(tokenizer, [*ASKED, {"role": "assistant", "content": "Well"}], w)
    assert continued.count("[helpful=1.00") == 1
    assert continued.index("[helpful=1.00") < continued.index("Well")


@pytest.mark.parametrize(
    ("preference", "said"),
    [
        ({"helpful": 0.8, "harmles": 0.2}, "harmles is none of helpful, harmless"),
        ({"helpful": 1.0}, "lacks harmless"),
        ({"helpful": 0.8, "harmless": 0.8}, "must sum to 1"),
        ({"helpful": -0.2, "harmless": 1.2}, "helpful must be a number"),
        ({"helpful": float("nan"), "harmless": 1.0}, "helpful must be a number"),
        ({"helpful": float("inf"), "harmless": 0.0}, "must sum to 1"),
        ({"helpful": "0.8", "harmless": 0.2}, "helpful must be a number"),
        ({"helpful": True, "harmless": 0.0}, "helpful must be a number"),
        ([0.8, 0.2], "give a text, or a mapping of helpful, harmless"),
        (0.8, "give a text, or a mapping"),
        (False, "give a text, or a mapping"),
        ([], "give a text, or a mapping"),
    ],
)
def test_what_is_neither_is_refused_in_a_line(tokenizer, preference, said):
    with pytest.raises(TemplateError, match=said) as refused:
        applied(tokenizer, ASKED, preference)
    assert "\n" not in str(refused.value)


def test_vllm_still_takes_it_for_a_template_of_texts():
    """vLLM gives a template lists of parts if it loops over a message's content [read, not run]."""
    from jinja2 import Environment, nodes

    whole = preference_template("{{ messages[0]['content'] }}", NAMES, "bar")
    for loop in Environment().parse(whole).find_all(nodes.For):
        if isinstance(loop.iter, nodes.Getitem | nodes.Getattr):
            said = loop.iter.attr if isinstance(loop.iter, nodes.Getattr) else loop.iter.arg.value
            assert said != "content"


@pytest.mark.parametrize("base", ["\n{{ messages[0]['content'] }}", "  {{ 1 }}\n"])
def test_what_a_base_template_begins_with_stays(base):
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    asked = {"messages": [{"role": "user", "content": "Hi"}]}
    plain = environment.from_string(base).render(**asked)
    whole = preference_template(base, NAMES, "bar")
    assert environment.from_string(whole).render(**asked) == plain
    assert without_preference(whole) == base


def test_images_and_a_conversation_without_a_user_are_refused(tokenizer):
    w = {"helpful": 1.0, "harmless": 0.0}
    picture = [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}]
    with pytest.raises(TemplateError, match="must be text alone"):
        applied(tokenizer, picture, w)
    with pytest.raises(TemplateError, match="needs a turn of the user"):
        applied(tokenizer, ASKED[:1], w)


def test_a_policy_that_was_trained_on_has_one_preference_and_names_need_no_care(tokenizer):
    plain = tokenizer.chat_template
    first = preference_template(plain, NAMES[:2], "bar")
    odd = ("it's {{ 1 }} é", 'a "b" %} c 🙂')
    again = preference_template(first, odd, "numbers")
    assert without_preference(again) == without_preference(first) == plain
    said = applied(tokenizer, ASKED, dict(zip(odd, (0.5, 0.5), strict=True)), odd, "numbers")
    assert said == said_by_hand(tokenizer, preference_text((0.5, 0.5), odd, "numbers"))
    older = (
        "{%- if preference is defined and preference -%}"
        "{%- set messages = messages[:-1] -%}{%- endif -%}"
    )
    assert preference_template(older + plain, NAMES[:2], "none") == plain


def test_a_guide_of_rewards_without_its_statistics_takes_a_text_alone(tokenizer):
    w = {"helpful": 1.0, "harmless": 0.0}
    with pytest.raises(TemplateError, match="takes its text alone"):
        applied(tokenizer, ASKED, w, style="scores")
    text = "<rm1_score> 0.3 <rm2_score> -1.2"
    assert applied(tokenizer, ASKED, text, style="scores") == said_by_hand(tokenizer, text)
