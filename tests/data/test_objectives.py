"""Objectives: every format against the tokenizer and model called by hand, on tiny checkpoints."""

import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from meal_fast.data.objectives import ObjectiveError, Objectives, load_objectives
from meal_fast.data.reward_models import HUB, post_of
from meal_fast.data.reward_statistics import Normalizer, default_utopia

PROMPTS = [
    "How do tides work?",
    "Write a poem",
    "Why is the sky blue, and the sea green on some days of the year?",
    "Hi",
    "Name three birds",
]
RESPONSES = [
    "The moon pulls the water.",
    "No.",
    "Light is scattered by air; short waves more than long ones, and so we see blue.",
    "",
    "Robin, wren and owl, owl, owl",
]
CORPUS = [*PROMPTS, *RESPONSES, "### Input: a post ### Response: Human: Assistant: summary"]


def byte_level(bos: str | None, template: processors.TemplateProcessing | None, **special: str):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=sorted(set(special.values())),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    if template:
        tokenizer.post_processor = template
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **special)


def gpt2_tokenizer():
    end = "<|endoftext|>"
    return byte_level(end, None, bos_token=end, eos_token=end, unk_token=end)


def bart_tokenizer():
    special = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>"}
    ids = {token: i for i, token in enumerate(sorted(set(special.values())))}
    template = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=list(ids.items())
    )
    return byte_level("<s>", template, **special)


def bert_tokenizer():
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    ids = {token: i for i, token in enumerate(sorted(special.values()))}
    template = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=list(ids.items()),
    )
    return byte_level(None, template, **special)


def save(folder: Path, config, tokenizer) -> str:
    config.vocab_size = len(tokenizer)
    for key in ("pad", "bos", "eos"):
        setattr(config, f"{key}_token_id", getattr(tokenizer, f"{key}_token_id"))
    torch.manual_seed(len(str(config.model_type)))
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():  # the initial heads are so small that any mistake would pass
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("reward-models")
    gpt2 = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 256, "num_labels": 1}
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"intermediate_size": 64, "max_position_embeddings": 256}
    return {
        "gpt2": save(root / "gpt2", GPT2Config(**gpt2), gpt2_tokenizer()),
        "distilbert": save(
            root / "distilbert",
            DistilBertConfig(
                dim=32, n_layers=2, n_heads=2, hidden_dim=64, num_labels=2,
                max_position_embeddings=256,
            ),
            bert_tokenizer(),
        ),
        "bert": save(root / "bert", BertConfig(num_labels=1, **small), bert_tokenizer()),
        "deberta": save(
            root / "deberta", DebertaV2Config(num_labels=1, type_vocab_size=0, **small),
            bert_tokenizer(),
        ),
        "bart": save(
            root / "bart",
            BartConfig(
                d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
                max_position_embeddings=256, id2label={0: "HALLUCINATED", 1: "FAITHFUL"},
            ),
            bart_tokenizer(),
        ),
    }  # fmt: skip


@torch.no_grad()
def by_hand(folder: str, texts: Sequence[tuple[str, ...]], logit: int) -> torch.Tensor:
    """One row at a time: no padding, no batches, no code of ours."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.eos_token_id
    lists = [[[text] for text in row] for row in texts]  # a bare "" would count as no second text
    return torch.stack(
        [model(**tokenizer(*row, return_tensors="pt")).logits[0, logit] for row in lists]
    )


TLDR = "### Instruction: Generate a one-sentence summary of this post. ### Input: {} ### Response:"

HUB_CASES = {
    "Ray2333/gpt2-large-helpful-reward_model": (
        "gpt2", 0, lambda p, r: (f"\n\nHuman: {p} \n\nAssistant:", r),
    ),
    "Ray2333/gpt2-large-harmless-reward_model": (
        "gpt2", 0, lambda p, r: (f"\n\nHuman: {p} \n\nAssistant:", r),
    ),
    "mohameddhiab/humor-no-humor": ("distilbert", 1, lambda p, r: (r,)),
    "Tristan/gpt2_reward_summarization": (
        "gpt2", 0, lambda p, r: (f"{r} <|endoftext|> {p}",),
    ),
    "CogComp/bart-faithful-summary-detector": ("bart", 1, lambda p, r: (r, p)),
    "OpenAssistant/reward-model-deberta-v3-large-v2": ("deberta", 0, lambda p, r: (p, r)),
}  # fmt: skip


def column(objectives: Objectives, prompts=PROMPTS, responses=RESPONSES) -> torch.Tensor:
    return objectives.rewards(prompts, responses)[:, 0]


def length(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [float(len(r)) for r in responses]


def other(spec: str, path: str) -> list[str]:
    return [f"a={spec}{'&' if '?' in spec else '?'}path={path}", "b=operator_module:length"]


@pytest.fixture(autouse=True)
def functions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A module of objectives, as a user would have one beside their data."""
    (tmp_path / "operator_module.py").write_text(
        "import torch\n"
        "def length(prompts, responses): return [float(len(r)) for r in responses]\n"
        "def tensor(prompts, responses): return torch.arange(len(responses)).double()\n"
        "def short(prompts, responses): return [1.0] * (len(responses) - 1)\n"
        "def wide(prompts, responses): return torch.ones(len(responses), 2)\n"
        "def nan(prompts, responses): return [1e999 * 0 if r == 'No.' else 0 for r in responses]\n"
        "def inf(prompts, responses): return [1e999 if 'wren' in r else 0 for r in responses]\n"
        "def fails(prompts, responses): return [1 / len(r) for r in responses]\n"
        "def text(prompts, responses): return 'good'\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("operator_module", None)


def test_every_hub_model_has_its_published_format(checkpoints: dict[str, str]) -> None:
    assert set(HUB_CASES) == set(HUB)
    for name, (model, logit, texts) in HUB_CASES.items():
        summary = "summar" in name
        prompts = [TLDR.format(p) for p in PROMPTS] if summary else PROMPTS
        got = column(load_objectives(other(name, checkpoints[model])), prompts)
        rows = [texts(p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
        want = by_hand(checkpoints[model], rows, logit)
        assert want.std() > 1e-3, name  # else any format would do
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ("", lambda p, r: (p, r)),
        ("?format=response+prompt", lambda p, r: (r, p)),
        ("?format=response", lambda p, r: (r,)),
        (
            "?format=template:Q%3A {prompt}%0AA%3A {response}{sep}",
            lambda p, r: (f"Q: {p}\nA: {r}[SEP]",),
        ),
        ("?prompt=Asked%3A {prompt}", lambda p, r: (f"Asked: {p}", r)),
    ],
)
def test_formats_of_a_local_model(checkpoints: dict[str, str], options: str, texts) -> None:
    folder = checkpoints["bert"]
    got = column(load_objectives([f"a={folder}{options}", "b=operator_module:length"]))
    want = by_hand(folder, [texts(p, r) for p, r in zip(PROMPTS, RESPONSES, strict=True)], 0)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_braces_in_the_texts_are_left_alone(checkpoints: dict[str, str]) -> None:
    folder = checkpoints["bert"]
    spec = f"a={folder}?format=template:{{prompt}} / {{response}}"
    got = column(load_objectives([spec, "b=operator_module:length"]), ["{response}"], ["{x} {0}"])
    want = by_hand(folder, [("{response} / {x} {0}",)], 0)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_sign_logit_and_max_length(checkpoints: dict[str, str]) -> None:
    folder = checkpoints["bart"]
    plus, minus, first, cut = (
        column(load_objectives([f"a={folder}?{options}", "b=operator_module:length"]))
        for options in ("logit=1", "logit=1&sign=-1", "logit=0", "logit=1&max_length=30")
    )
    torch.testing.assert_close(minus, -plus)
    assert (plus - first).abs().max() > 1e-3
    assert (cut - plus).abs().max() > 1e-3
    tokenizer = AutoTokenizer.from_pretrained(folder)
    suffixes = [PROMPTS[2][i:] for i in range(len(PROMPTS[2]))]  # of which the longest are left out
    fit = [s for s in suffixes if 27 <= len(tokenizer(s, RESPONSES[2])["input_ids"]) <= 30]
    cuts = by_hand(folder, [(s, RESPONSES[2]) for s in fit], 1)
    assert (cuts - cut[2]).abs().min() < 1e-5


def test_a_row_scores_the_same_in_any_batch_and_order(checkpoints: dict[str, str]) -> None:
    objectives = load_objectives(
        [
            f"a={checkpoints['gpt2']}",
            f"b={checkpoints['deberta']}",
            f"c={checkpoints['bart']}?logit=1",
        ]
    )
    prompts = [PROMPTS[i % 5] for i in range(75)]
    responses = [RESPONSES[i * 3 % 5] + " word" * (i % 11) for i in range(75)]
    together = objectives.rewards(prompts, responses)
    assert together.shape == (75, 3) and together.dtype == torch.float32
    for i in (0, 7, 41, 74):
        alone = objectives.rewards([prompts[i]], [responses[i]])
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)
    backwards = objectives.rewards(prompts[::-1], responses[::-1])
    torch.testing.assert_close(backwards.flip(0), together, atol=1e-5, rtol=1e-5)


def test_functions_and_names() -> None:
    objectives = load_objectives(["x=operator_module:length", "y=operator_module:tensor"])
    assert objectives.names == ("x", "y")
    got = objectives.rewards(["p", "p", "p"], ["", "ab", "abcd"])
    assert got.tolist() == [[0, 0], [2, 1], [4, 2]] and got.dtype == torch.float32


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("short", r"'bad' returned shape \(4,\) for 5 responses"),
        ("wide", r"'bad' returned shape \(5, 2\)"),
        ("nan", r"'bad' returned nan for row 1, the response 'No\.'"),
        ("inf", r"'bad' returned inf for row 4, the response 'Robin"),
        ("fails", r"'bad' raised ZeroDivisionError: .* \(row 3, the response ''\)"),
        ("text", r"'bad' returned a str; a list of 5 numbers is needed"),
    ],
)
def test_a_broken_objective_is_named_with_the_row(function: str, message: str) -> None:
    objectives = load_objectives(["good=operator_module:length", f"bad=operator_module:{function}"])
    with pytest.raises(ObjectiveError, match=message):
        objectives.rewards(PROMPTS, RESPONSES)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["a=operator_module:length"], "two or more"),
        (["a=operator_module:length", "a=operator_module:tensor"], "'a': is given twice"),
        (["a=operator_module:length", "nothing"], "'nothing' is not of the form NAME=SOURCE"),
        (["a=operator_module:length", "b=operator_module:no"], "'b': 'operator_module:no' cannot"),
        (["a=operator_module:length", "b=no_such_module_x:f"], "'b'.*cannot be imported"),
        (["a=operator_module:length", "b=operator_module:number"], "is not a function"),
        (["a=operator_module:length", "b=operator_module:tensor?sign=1"], "takes no options"),
        (["a=operator_module:length", "b=packaged:nice"], "no packaged reward model 'nice'"),
        (["a=operator_module:length", "b=/no/such/folder"], "'/no/such/folder' cannot be loaded"),
        (["a=operator_module:length", "b=x/y?format=both"], "unknown format 'both'"),
        (["a=operator_module:length", "b=x/y?form=pair"], "unknown key 'form'"),
        (["a=operator_module:length", "b=x/y?logit=one"], "logit='one' is not a number"),
        (["a=operator_module:length", "b=x/y?logit=-1"], "logit=-1 is negative"),
        (["a=operator_module:length", "b=x/y?sign=2"], "sign=2 must be 1 or -1"),
        (["a=operator_module:length", "b=x/y?format=template:{prompt}"], "lacks {response}"),
        (["a=operator_module:length", "b=x/y?format=template:{respnse}"], "{respnse}; known"),
        (["a=operator_module:length", "b=x/y?prompt={text}"], "prompt has {text}"),
    ],
)
def test_bad_specs_are_refused_in_one_line(specs: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("{", r"\{")) as error:
        load_objectives(specs)
    assert "\n" not in str(error.value)


def test_what_only_the_model_can_tell(checkpoints: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="'a': logit=1, but there are 1"):
        load_objectives([f"a={checkpoints['bert']}?logit=1", "b=operator_module:length"])
    with pytest.raises(ValueError, match="max_length=900 is above 256"):
        load_objectives([f"a={checkpoints['bert']}?max_length=900", "b=operator_module:length"])


def test_an_empty_response_alone_is_scored(checkpoints: dict[str, str]) -> None:
    spec = (
        f"a={checkpoints['gpt2']}?format=response"  # GPT-2 adds no special tokens: no input at all
    )
    objectives = load_objectives([spec, "b=operator_module:length"])
    got = objectives.rewards(["p", "p"], ["", "some words"])
    torch.testing.assert_close(got[:1, 0], by_hand(checkpoints["gpt2"], [("<|endoftext|>",)], 0))


def test_a_model_without_a_trained_head_is_refused(tmp_path: Path) -> None:
    tokenizer = gpt2_tokenizer()
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=len(tokenizer))
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'a': .* no trained classifier, it lacks score\.weight"):
        load_objectives([f"a={tmp_path}", "b=operator_module:length"])


def test_a_model_without_a_tokenizer_is_refused(
    checkpoints: dict[str, str], tmp_path: Path
) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(checkpoints["bert"]) / name, tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer files"):
        load_objectives([f"a={tmp_path}", "b=operator_module:length"])


def test_post_of_a_summary_prompt() -> None:
    assert post_of(TLDR.format("My dog ran off.")) == "My dog ran off."
    assert post_of("Plain question?") == "Plain question?"


CALIBRATION = torch.tensor([[1.0, -4.0], [3.0, 0.0], [-2.0, 2.0], [0.0, 1.0]])


def test_normalizer_by_its_formulas() -> None:
    mean, std = CALIBRATION.mean(0), CALIBRATION.std(0)
    want = {
        "max": CALIBRATION / torch.tensor([3.0, 4.0]),
        "standard": (CALIBRATION - mean) / std,
        "tanh": ((CALIBRATION - mean) / std).tanh(),
        "none": CALIBRATION,
    }
    for mode, expected in want.items():
        normalizer = Normalizer.fit(CALIBRATION, mode)
        torch.testing.assert_close(normalizer.apply(CALIBRATION), expected, msg=mode)
        assert normalizer.linear == (mode != "tanh")
        # other rewards use the calibration's statistics, not their own
        fresh = torch.tensor([[6.0, 6.0]])
        if mode == "max":
            torch.testing.assert_close(normalizer.apply(fresh), torch.tensor([[2.0, 1.5]]))
        if normalizer.linear:
            by_parts = (fresh - torch.tensor(normalizer.offset)) / torch.tensor(normalizer.divisor)
            torch.testing.assert_close(normalizer.apply(fresh), by_parts)


def test_normalizer_survives_json_exactly() -> None:
    for mode in ("max", "standard", "tanh", "none"):
        normalizer = Normalizer.fit(CALIBRATION * math.pi, mode)
        again = Normalizer.from_dict(json.loads(json.dumps(normalizer.to_dict())))
        assert again == normalizer


@pytest.mark.parametrize(
    ("reward", "mode", "message"),
    [
        (torch.tensor([[1.0, 5.0], [2.0, 5.0]]), "max", "objective 1 .* the reward 5"),
        (torch.zeros(4, 2), "standard", "objective 0 .* the reward 0"),
        (torch.tensor([[1.0, 2.0]]), "max", "at least 2 rows"),
        (torch.tensor([[1.0, 2.0], [float("inf"), 3.0]]), "max", "finite"),
        (torch.tensor([[1.0, math.nan], [2.0, math.nan]]), "none", "1 .* applies to no response"),
        (CALIBRATION, "minmax", "score.normalization='minmax'"),
    ],
)
def test_normalizer_refuses(reward: torch.Tensor, mode: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Normalizer.fit(reward, mode)


def test_normalizer_of_another_width() -> None:
    with pytest.raises(ValueError, match="rewards of 3 objectives, statistics of 2"):
        Normalizer.fit(CALIBRATION, "max").apply(torch.ones(2, 3))
    with pytest.raises(ValueError, match="not a normaliser's values"):
        Normalizer.from_dict({"mode": "max"})


def test_default_utopia_is_a_tenth_above() -> None:
    torch.testing.assert_close(default_utopia(CALIBRATION), torch.tensor([3.5, 2.6]))
