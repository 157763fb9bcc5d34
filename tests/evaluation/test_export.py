"""`meal-fast export`: what others load is the policy, and its card says how it is asked."""

import json
import re

import pytest
import torch
import yaml

from meal_fast import export, train
from meal_fast.config.run_dir import read_config
from meal_fast.data.preferences import preference_text
from meal_fast.models.model_soup import load_served
from tests.helpers.bpe_model import saved
from tests.helpers.run_folder import build_run, evaluated, tiny_config

transformers = pytest.importorskip("transformers")
ASKED = [{"role": "user", "content": "Write a short word."}]
W = (0.8, 0.2)


def exported(run, to, *options):
    export.main([str(run), "--to", to, *options])
    return run / "export"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "knob"
    config = tiny_config(evaluation={"marks": ["refuses", "both"]})
    policy = build_run(folder, config, scale=0.3)
    result = evaluated(folder, config, policy)
    (folder / "evaluation.json").write_text(json.dumps(result))
    (folder / "front.png").write_bytes(b"a picture")
    return folder


@torch.no_grad()
def logits_of(model, tokenizer):
    inputs = tokenizer.apply_chat_template(
        ASKED,
        preference=dict(zip(("first", "second"), W, strict=True)),
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    return inputs["input_ids"][0].tolist(), model(**inputs).logits[0].float()


def served_logits(run):
    """Those of the run itself, of a prompt encoded as training encodes it."""
    policy, _ = load_served(run, read_config(run))
    ids = [*policy.encode_prompt(ASKED[0]["content"]), *policy.encode_suffix(W)]
    with torch.no_grad():
        return ids, policy.causal_lm(input_ids=torch.tensor([ids])).logits[0].float()


def test_the_hub_s_folder_is_the_policy_and_says_a_preference(run, capsys):
    folder = exported(run, "hub") / "knob"
    out, err = capsys.readouterr()
    assert out == f"{folder}\n" and err == f'to publish it: hf upload OWNER/knob "{folder}"\n'
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    ids, logits = logits_of(model, transformers.AutoTokenizer.from_pretrained(folder))
    own_ids, own = served_logits(run)
    assert ids == own_ids
    torch.testing.assert_close(logits, own, atol=1e-4, rtol=1e-4)
    assert not (folder / "adapter").exists() and (folder / "front.png").is_file()


def test_the_adapter_makes_the_policy_of_its_base(run):
    peft = pytest.importorskip("peft")
    from meal_fast.models.loading import resolve

    folder = exported(run, "adapter", "--base", "owner/tiny") / "knob-adapter"
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "owner/tiny"
    base = transformers.AutoModelForCausalLM.from_pretrained(resolve("world:tiny"))
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    ids, logits = logits_of(model, transformers.AutoTokenizer.from_pretrained(folder))
    own_ids, own = served_logits(run)
    assert ids == own_ids
    torch.testing.assert_close(logits, own, atol=1e-4, rtol=1e-4)
    card = (folder / "README.md").read_text()
    assert 'name = "knob-adapter"' in card and "PeftModel.from_pretrained(model, name)" in card
    assert '"owner/tiny"' in card and "library_name: peft" in card


def test_a_gguf_file_is_read_back_and_its_card_says_how_to_ask(tmp_path, capsys):
    run = tmp_path / "small"
    saved(tmp_path / "base", "llama", "smollm")
    policy = {"path": str(tmp_path / "base"), "tuning": "full", "preference_text": "bar"}
    build_run(run, tiny_config(policy=policy))
    capsys.readouterr()
    folder = exported(run, "gguf", "--type", "q8_0") / "small-gguf"
    assert re.fullmatch(
        r"read back: KL\(policy \|\| file\) \S+ nats a token\n", capsys.readouterr().err
    )
    assert {p.name for p in folder.iterdir()} == {"small-q8_0.gguf", "README.md"}
    card = (folder / "README.md").read_text()
    assert "llama-server -m small-q8_0.gguf --jinja" in card
    assert '"chat_template_kwargs": {"preference": {"first": 0.8, "second": 0.2}}' in card
    assert "This run has not been evaluated" in card


def test_a_gguf_file_that_does_not_read_back_is_not_kept(tmp_path, capsys, monkeypatch):
    from meal_fast.models import gguf_file

    run = tmp_path / "small"
    saved(tmp_path / "base", "llama", "smollm")
    policy = {"path": str(tmp_path / "base"), "tuning": "full"}
    build_run(run, tiny_config(policy=policy), scale=0.5)
    monkeypatch.setattr(gguf_file, "_interleaved", lambda name, tensor, config: tensor)
    with pytest.raises(SystemExit) as stop:
        exported(run, "gguf", "--type", "f32")
    assert stop.value.code == 2
    assert "read back it differs from the policy by" in capsys.readouterr().err
    assert not (run / "export").exists()


def test_the_card_has_the_front_the_objectives_and_nothing_of_the_machine(run, tmp_path):
    folder = tmp_path / "a|b"
    export.main([str(run), "--to", "hub", "--out", str(folder)])
    card = (folder / "README.md").read_text()
    front_matter = yaml.safe_load(card.split("---")[1])
    assert front_matter["license"] == "other" and "base_model" not in front_matter
    assert front_matter["library_name"] == "transformers"
    assert preference_text(W, ("first", "second"), "numbers") in card
    result = json.loads((run / "evaluation.json").read_text())
    assert f"{len(result['prompts'])} held-out prompts at 5 weights" in card
    for line in ("- **first**: ", "- **middle**: ", "- **front**: ", "| `first` | `world:first` |"):
        assert line in card
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows if row.startswith(("| reward", "| w of"))}) == 1
    for path in folder.rglob("*"):
        if path.suffix in (".json", ".md", ".jinja"):
            assert str(run.parent) not in path.read_text(), path
            assert str(tmp_path) not in path.read_text(), path
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)
    compile(code, "card", "exec")


def test_objectives_and_models_of_this_machine_go_by_their_last_name():
    from meal_fast.evaluation.model_card import _source, base_name

    assert _source("/srv/rewards/kind?format=pair&path=/data/x") == "`kind?format=pair`"
    assert _source("./kind?device=cpu") == "`kind`"
    assert _source("owner/kind?logit=0") == "`owner/kind?logit=0`"
    assert _source("rewards/prompts.jsonl") == "`prompts.jsonl`"
    assert "did what was asked" in _source("packaged:complied?device=cpu")
    assert base_name(tiny_config()) == "tiny"
    packaged = tiny_config(policy={"path": "packaged:smollm2-135m"})
    assert base_name(packaged) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    # It may be a folder elsewhere: a hub's name is what the hub's cache has.
    assert base_name(tiny_config(policy={"path": "models/mine"})) == "mine"


def test_a_warning_about_harmful_requests_stays_whatever_keys_a_source_has(tmp_path):
    from meal_fast.evaluation.model_card import model_card

    changed = {
        "objectives": ["asked=packaged:complied?device=cpu", "safe=packaged:harmless"],
        "prompts": {"train": "packaged:safety"},
        "warmup": {"answers": ["safe=packaged:refusals"], "benign": "packaged:benign"},
    }
    for steps, listed in ((0, False), (3, True)):
        config = tiny_config(**changed | {"warmup": changed["warmup"] | {"steps": steps}})
        card = model_card(tmp_path, config, "hub", title="a")
        assert "asked means that the answer does what was asked, harmful requests included" in card
        assert ("packaged:refusals" in card) is listed
        assert "read back from 4 bits" not in card
        assert "front.png" not in card and "not known here" in card  # the base model's licence


def test_of_a_family_the_model_that_serves_a_preference_is_written(tmp_path, capsys):
    run = tmp_path / "soup"
    train.main(
        ["tiny", "--recipe", "rewarded-soups", "--meta.steps", "1", "--no-evaluate",
         "--out", str(run)]
    )  # fmt: skip
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        exported(run, "hub")
    assert stop.value.code == 2
    assert "has a model for each preference: say whose" in capsys.readouterr().err
    folder = exported(run, "hub", "--w", "first=0.8,second=0.2") / "soup"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    policy, family = load_served(run, read_config(run))
    with family.at(policy, W):
        ids = torch.tensor([policy.encode_prompt("Write a word.")])
        with torch.no_grad():
            own = policy.causal_lm(input_ids=ids).logits
            torch.testing.assert_close(model(ids).logits, own, atol=1e-4, rtol=1e-4)
    card = (folder / "README.md").read_text()
    assert 'recipe rewarded-soups serves at {"first": 0.8, "second": 0.2}' in card
    assert "preference=" not in card and "may also write a preference" not in card
    assert "this model is what serves" in card
    assert not (folder / "saved").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--to", "zip"], "invalid choice: 'zip'"),
        (["--to", "hub", "--w", "first=1,second=0"], "has one model for all preferences"),
        (["--to", "hub", "--base", "/srv/secret"], "is no hub name, OWNER/NAME"),
        (["--to", "hub", "--base", ""], "is no hub name, OWNER/NAME"),
        (["--to", "adapter", "--type", "f32"], "is for --to gguf"),
        (["--to", "gguf"], "a tokenizer that cuts text in a way that has no name in GGUF"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(run, tmp_path, capsys, options, said):
    with pytest.raises(SystemExit) as stop:
        export.main([str(run), *options, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_and_a_run_that_is_none_are_refused(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "keep.tmp").mkdir()
    for arguments, said in (
        ([str(run), "--out", str(tmp_path / "file" / "a")], "cannot be made (File exists)"),
        ([str(run), "--out", str(tmp_path / ("a" * 300))], "cannot be made (File name too long)"),
        ([str(run), "--out", str(run / "policy" / "a")], "lies in the policy itself"),
        ([str(run), "--to", "hub", "--out", str(tmp_path)], "exists; name another folder"),
        ([str(tmp_path), "--to", "hub"], "no config.json"),
    ):
        with pytest.raises(SystemExit) as stop:
            export.main(arguments)
        assert stop.value.code == 2 and said in capsys.readouterr().err
    export.main([str(run), "--out", str(tmp_path / "keep")])
    assert (tmp_path / "keep.tmp").is_dir()  # somebody else's


def test_full_parameters_have_no_adapter_and_a_guide_no_single_model(tmp_path, capsys):
    for changes, to, said in (
        ({"policy": {"tuning": "full"}}, "adapter", "no adapter in policy/"),
        ({"recipe": "parm", "policy": {"tuning": "bilinear"}}, "hub", "serve the run"),
    ):
        run = tmp_path / to
        build_run(run, tiny_config(**changes))
        with pytest.raises(SystemExit) as stop:
            exported(run, to)
        assert stop.value.code == 2 and said in capsys.readouterr().err
