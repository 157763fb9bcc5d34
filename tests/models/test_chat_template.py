"""Chat templates as transformers has them: named, dated, of parts, with switches, with a system."""

import datetime
import json

import pytest

pytest.importorskip("transformers")

from transformers import AutoTokenizer

from meal_fast.config.config import PolicyConfig, from_dict
from meal_fast.config.run_dir import read_config
from meal_fast.models.chat_template import kept_template, prepared
from meal_fast.models.model_soup import load_served
from meal_fast.models.policy import load_policy
from meal_fast.training.trainer import Trainer
from tests.helpers.chat_tokenizers import CHATML, byte_level, saved
from tests.helpers.run_folder import tiny_config


def length(prompts, responses):
    return [float(len(x)) for x in responses]


def vowels(prompts, responses):
    return [float(sum(c in "aeiou" for c in x)) for x in responses]


NAMES = ("first", "second")
W = (0.3, 0.7)
DATED = (
    "{% if strftime_now is defined %}{% set today = strftime_now('%d %b %Y') %}{% else %}"
    "{% set today = '26 Jul 2024' %}{% endif %}"
    "{{ '<|im_start|>system\nToday is ' + today + '<|im_end|>\n' }}" + CHATML
)
PARTS = CHATML.replace("message['content']", "message['content'][0]['text']")
BOTH = CHATML.replace(
    "message['content']",
    "(message['content'] if message['content'] is string else message['content'][0]['text'])",
)
THINKS = CHATML.replace(
    "assistant\n' }}", "assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think></think>' }}{% endif %}"
)  # fmt: skip
SYSTEM_FIRST = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ raise_exception('System message\nmust come first') }}{% endif %}" + CHATML
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}"
    "{% endif %}" + CHATML
)
ALTERNATES = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)


def policy_of(template, tmp_path, **options):
    path = saved(byte_level(template), tmp_path / "base")
    return load_policy(PolicyConfig(path=path, device="cpu", **options), NAMES)


def served(folder, text, w=W, parts=False):
    """The ids that the saved policy's tokenizer gives, whatever the day."""
    content = [{"type": "text", "text": text}] if parts else text
    return tuple(
        AutoTokenizer.from_pretrained(folder).apply_chat_template(
            [{"role": "user", "content": content}],
            preference=dict(zip(NAMES, w, strict=True)),
            add_generation_prompt=True,
            return_dict=False,
        )
    )


@pytest.mark.reliability("silent", "chat templates: named, of parts, dated, with a system turn")
@pytest.mark.parametrize(
    ("template", "options"),
    [
        (CHATML, {}),
        ({"default": CHATML, "tool_use": DATED}, {}),
        (PARTS, {}),
        (BOTH, {}),
        (DATED, {}),
        (THINKS, {"template_kwargs": ("enable_thinking=false",)}),
        (SYSTEM_FIRST, {"system": 'Be "kind".\nAlways.'}),
        (DEFAULT_SYSTEM, {}),
        (DEFAULT_SYSTEM, {"system": "Be kind."}),
        (ALTERNATES, {}),
    ],
    ids=["plain", "named", "parts", "both", "dated", "thinks", "system", "own", "other", "turns"],
)
def test_what_is_trained_is_what_the_saved_policy_s_template_says(template, options, tmp_path):
    policy = policy_of(template, tmp_path, **options)
    policy.save(tmp_path / "policy")
    prompt, suffix = policy.encode("How do tides work?", W)
    for parts in (False, True) if template in (PARTS, BOTH) else (False,):
        assert prompt + suffix == served(tmp_path / "policy", "How do tides work?", parts=parts)
    said = policy.tokenizer.decode(prompt + suffix)
    for there in (
        "How do tides work? [first=0.30 second=0.70]",
        *("<think></think>" for _ in options.get("template_kwargs", ())),
        *(f"system\n{text}<|im_end|>" for text in (options.get("system"),) if text),
    ):
        assert there in said
    # a policy that was trained on is a base like any other
    again = load_policy(PolicyConfig(path=str(tmp_path / "policy"), device="cpu"), NAMES)
    assert again.encode("How do tides work?", W) == (prompt, suffix)


@pytest.mark.reliability("lost", "named chat templates, saved only after the last update")
def test_other_named_templates_are_kept(tmp_path):
    policy = policy_of({"default": CHATML, "tool_use": DATED}, tmp_path)
    policy.save(tmp_path / "policy")
    held = AutoTokenizer.from_pretrained(tmp_path / "policy").chat_template
    assert set(held) == {"default", "tool_use"} and held["tool_use"] == DATED
    assert held["default"] == policy.saved_template()


@pytest.mark.parametrize(
    ("template", "options", "said"),
    [
        ({"tool_use": CHATML, "rag": CHATML}, {}, "templates rag, tool_use, and none is named def"),
        (CHATML, {"template_kwargs": ("think=1",)}, "does not read 'think'; what it reads: none"),
        (THINKS, {"template_kwargs": ("thinking=1",)}, "what it reads: enable_thinking"),
        (SYSTEM_FIRST, {}, "wants a system turn .* policy.system"),
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            + CHATML,
            {"system": "Be kind."},
            r"policy\.system='Be kind\.': .* does not take it \(no system\)",
        ),
        ("{% for m in messages %}", {}, "is no Jinja template"),
        ("{{ messages[0].content.nothing.there }}", {}, "cannot say a user's turn"),
        ("{{ 'Hi' }}", {}, "does not hold the user's text exactly once"),
        ("{{ raise_exception('no\nway') }}", {}, r"cannot say a user's turn \(no way\)"),
    ],
)
@pytest.mark.reliability("message", "chat templates that cannot be used")
def test_what_cannot_be_used_is_refused_in_a_line(template, options, said, tmp_path):
    with pytest.raises(ValueError, match=said) as refused:
        policy_of(template, tmp_path, **options)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith("policy.")


@pytest.mark.reliability("message", "a tokenizer without a chat template")
def test_no_template_is_refused_with_a_remedy(tmp_path):
    words = byte_level()
    words.chat_template = None
    config = PolicyConfig(path=saved(words, tmp_path / "base"), device="cpu")
    with pytest.raises(ValueError, match=r"no chat template; put one .*chat_template\.jinja"):
        load_policy(config, NAMES)
    with pytest.raises(ValueError, match=r"policy\.template_kwargs='think': must be name=value"):
        PolicyConfig(template_kwargs=("think",))


def test_switches_are_json_or_texts_and_give_way_to_what_is_given():
    template = "{{ [one, two, three, four] }}" + CHATML
    asked = ("one=false", "two=null", 'three={"a": [1, "b"]}', "four=it's")
    whole = prepared(byte_level(), template, asked)
    turns = [{"role": "user", "content": "Hi"}]

    def said(**given):
        text = byte_level().apply_chat_template(turns, chat_template=whole, tokenize=False, **given)
        return text.partition("<|im")[0]

    assert said() == "[False, None, {'a': [1, 'b']}, \"it's\"]"
    assert said(one=True, four=2) == "[True, None, {'a': [1, 'b']}, 2]"


LETTERS = [f"%{letter}" for letter in "aAbBcCdDeFfgGhHIjklmMnpPrRSsTtuUVwWxXyYzZ"]


@pytest.mark.reliability("silent", "a template that writes the date in a form of any kind")
@pytest.mark.parametrize("asked", ["'FORM'", "['FORM'] | first", "format='FORM'", "messages[0].f"])
def test_a_date_in_any_form_is_the_one_of_the_day_or_refused(asked):
    then, words = datetime.datetime(2024, 2, 9, 15, 4, 5, 7), byte_level()
    forms = [*LETTERS, "%-d.%-m.%y", "%%d", "%d%%", "%%%d %%%%Y", "no", "100 %% of %F %T"]
    for form in forms:
        template = "{{ strftime_now(ASKED) }}".replace("ASKED", asked.replace("FORM", form))
        turns = [{"role": "user", "content": "Hi", "f": form}]
        whole = prepared(words, template + CHATML, now=then)
        said = words.apply_chat_template(turns, chat_template=whole, tokenize=False)
        assert said.partition("<|im")[0] == then.strftime(form), form
    if "|" in asked:  # made up where it is applied, and nothing that is known
        with pytest.raises(ValueError, match="cannot be written as %Q"):
            prepared(words, "{{ strftime_now(['%Q'] | first) }}" + CHATML, now=then)


@pytest.mark.parametrize("form", ["%d %b %Y", "%A, %B %-d, %Y %H:%M", "%Y-%m-%d %j %y", "%I%p"])
def test_a_date_stays_whatever_its_form(form):
    then = datetime.datetime(2024, 2, 9, 15, 4, 5)
    template = f"{{{{ strftime_now('{form}') }}}}" + CHATML
    whole = prepared(byte_level(), template, now=then)
    turns = [{"role": "user", "content": "Hi"}]
    said = byte_level().apply_chat_template(turns, chat_template=whole, tokenize=False)
    assert said.partition("<|im")[0] == then.strftime(form)
    later = prepared(byte_level(), whole, now=datetime.datetime(2030, 1, 1))
    assert later == whole


@pytest.mark.reliability("silent", "a template that prints today's date, resumed on another day")
def test_a_run_is_trained_resumed_and_served_on_its_first_day(tmp_path):
    base = saved(byte_level({"default": DATED, "rag": CHATML}), tmp_path / "base")
    config = from_dict(
        {
            "objectives": [f"first={__name__}:length", f"second={__name__}:vowels"],
            "policy": {"path": base, "preference_text": "bar"},
            "meta": {"steps": 2, "tasks": 1, "n_inner": 2},
            "score": {"calibration": 8, "normalization": "standard"},
            "prompts": {"train": "world:tiny"},
        },
        tiny_config(),
    )
    run = tmp_path / "run"
    first = Trainer(config, run)
    template = kept_template(run)
    told = first.policy.encode("Hi", W)
    # another day: what was kept says the first one
    text = json.loads((run / "template.json").read_text())["chat_template"]
    today = datetime.datetime.now().strftime("%Y")
    text = text.replace(f' {today}"}}', ' 1999"}')
    (run / "template.json").write_text(json.dumps({"chat_template": text}))
    later = Trainer(config, run, resume=True)
    assert later.policy.base_template == text != template
    later.train()
    policy, _ = load_served(run, read_config(run))
    assert "1999<|im_end|>" in policy.tokenizer.decode(policy.encode_prompt("Hi"))
    assert policy.encode("Hi", W) == later.policy.encode("Hi", W) != told
    assert sum(policy.encode("Hi", W), ()) == served(run / "policy", "Hi")
    (run / "template.json").write_text("{}")
    with pytest.raises(ValueError, match=r"template\.json holds no chat_template"):
        load_served(run, read_config(run))


@pytest.mark.reliability("silent", "a policy's template that cuts or changes what is asked")
@pytest.mark.parametrize("how", ["[:200]", "[-200:]", "[:3990]", "|upper", "|replace('[', '(')"])
@pytest.mark.parametrize("style", ["bar", "numbers", "none"])
def test_a_template_that_does_not_say_a_text_as_it_is_is_refused(how, style, tmp_path):
    template = CHATML.replace("message['content']", f"(message['content']{how})")
    with pytest.raises(ValueError, match=r"^policy\.path=.* cuts or changes .*it is$"):
        policy_of(template, tmp_path, preference_text=style)


def test_a_conversation_s_own_system_turn_takes_the_run_s_place(tmp_path):
    policy = policy_of(SYSTEM_FIRST, tmp_path, system="Be kind.")
    said = policy.tokenizer.decode(sum(policy.encode("Hi", W, (("system", "Be short."),)), ()))
    assert "Be short." in said and "Be kind." not in said
    policy = policy_of(ALTERNATES, tmp_path / "other")
    with pytest.raises(ValueError, match=r"messages: .* does not take them \(roles must alt"):
        policy.encode("Hi", W, (("user", "Who?"),))
