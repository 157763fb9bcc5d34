"""Folders of models and runs made to run code, or to break their reader: refused in one line."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from meal_fast import chat, evaluate, export, train
from meal_fast.config.cli import one_line_errors
from meal_fast.models.policy import load_policy
from meal_fast.training.checkpoint_files import read_checkpoint
from meal_fast.training.preference_net import PreferenceNet
from tests.helpers.processes import assert_one_line
from tests.helpers.run_folder import build_run, tiny_config

ROOT = Path(__file__).resolve().parents[2]


class Evil:
    """What a pickle runs when it is read: makes the file named."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    build_run(folder, tiny_config(), scale=0.3)
    return folder


@pytest.fixture
def run(built, tmp_path):
    return shutil.copytree(built, tmp_path / "run")


def said_by(command, capsys, *argv):
    """What the command leaves on stderr; it must end with exit code 2 and one line."""
    with pytest.raises(SystemExit) as stop:
        command.main(list(map(str, argv)))
    err = capsys.readouterr().err
    assert stop.value.code == 2, err
    last = err[err.rindex("meal-fast: error: ") :]
    assert_one_line(last)
    assert "Traceback" not in err and len(last) < 2000
    return last


def edited(path, **changes):
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | changes))


ASK = ("--prompt", "Write a word.", "--max-new-tokens", "2")


@pytest.mark.reliability("attack", "pickles in a run that execute: weights, adapter, checkpoint")
@pytest.mark.parametrize("place", ["policy", "adapter"])
def test_pickled_weights_are_not_read(run, tmp_path, capsys, place):
    mark = tmp_path / "pwned"
    folder = run / "policy" / ("" if place == "policy" else "adapter")
    names = {"policy": "pytorch_model.bin", "adapter": "adapter_model.bin"}
    (folder / names[place]).write_bytes(pickle.dumps(Evil(mark)))
    (folder / "training_args.bin").write_bytes(pickle.dumps(Evil(mark)))
    chat.main([str(run), *ASK])  # beside weights that are none, no file of pickles is looked at
    capsys.readouterr()
    for path in folder.glob("*.safetensors"):
        path.unlink()
    for command, argv in ((chat, ASK), (evaluate, ()), (export, ("--to", "adapter"))):
        assert "pickle" in said_by(command, capsys, run, *argv)
    assert not mark.exists()


@pytest.mark.reliability(
    "attack", "a checkpoint and a preference net that are pickles that execute"
)
@pytest.mark.parametrize("how", ["plain", "torch", "torch zip"])
def test_a_checkpoint_that_executes_is_refused(run, tmp_path, capsys, how):
    mark = tmp_path / "pwned"
    for name in ("checkpoint.pt", "checkpoint.previous.pt", "preference_net.safetensors"):
        if how == "plain":
            (run / name).write_bytes(pickle.dumps({"step": Evil(mark)}))
        else:
            new = how == "torch zip"
            torch.save({"step": Evil(mark)}, run / name, _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match=r"damaged, cut short, or no checkpoint"):
        read_checkpoint(run / "checkpoint.pt")
    said = said_by(train, capsys, "--resume", "--out", run, "--no-evaluate")
    assert "nothing to go on from: checkpoint.pt is damaged" in said
    with pytest.raises(ValueError, match="preference net"):
        PreferenceNet.load(run / "preference_net.safetensors", ("first", "second"))
    assert "preference net" in said_by(chat, capsys, run, *ASK)
    assert not mark.exists()


@pytest.mark.reliability(
    "attack", "remote code in config.json and tokenizer_config.json (auto_map)"
)
@pytest.mark.parametrize("known", [True, False])
def test_remote_code_is_never_run(run, tmp_path, known):
    mark = tmp_path / "pwned"
    code = f"import os\nos.mkdir({str(mark)!r})\nclass E: pass\n"
    for folder in (run / "policy", tmp_path / "base"):
        if folder.name == "base":
            shutil.copytree(run / "policy", folder, ignore=shutil.ignore_patterns("adapter"))
        (folder / "evil.py").write_text(code)
        kinds = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
        edited(folder / "config.json", auto_map={kind: "evil.E" for kind in kinds})
        edited(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.E", "evil.E"]})
        if not known:
            edited(folder / "config.json", model_type="evil", architectures=["E"])
            edited(folder / "tokenizer_config.json", tokenizer_class="E")
    edited(run / "config.json", policy=tiny_policy(run, str(tmp_path / "base")))
    ran = subprocess.run(
        [sys.executable, "-m", "meal_fast.chat", str(run), *ASK],
        cwd=run / "policy",
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        input="y\ny\n",
        timeout=120,
    )
    assert ran.returncode == (0 if known else 2), ran.stderr
    assert known or ran.stderr.count("\n") == 1
    assert not mark.exists()


def tiny_policy(run, path):
    return json.loads((run / "config.json").read_text())["policy"] | {"path": path}


@pytest.mark.reliability("attack", "an adapter whose settings import a module (megatron_core)")
def test_an_adapter_imports_nothing(run, tmp_path, capsys):
    edited(
        run / "policy" / "adapter" / "adapter_config.json",
        megatron_config={"tensor_model_parallel_size": 1},
        megatron_core="evil",
    )
    assert "megatron" in said_by(chat, capsys, run, *ASK)


BROKEN = {
    "a header of an exabyte": ("policy/adapter/adapter_model.safetensors", b"\xff" * 7 + b"\x0f{}"),
    "a header cut short": ("policy/adapter/adapter_model.safetensors", b"\x00\x01\0\0\0\0\0\0{"),
    "an adapter that is text": ("policy/adapter/adapter_model.safetensors", b"hello"),
    "an adapter's settings that are text": ("policy/adapter/adapter_config.json", b"hello"),
    "an adapter of another kind": ("policy/adapter/adapter_config.json", b'{"peft_type": "x"}'),
    "a config nested 100,000 deep": ("config.json", b'{"policy": ' * 100_000),
    "a policy's config nested deep": ("policy/config.json", b"[" * 100_000),
    "a config of UTF-16": ("config.json", "{}".encode("utf-16")),
    "a config of NULs": ("config.json", b"\0" * 64),
    "a config with a key twice": ("config.json", b'{"seed": 1, "seed": 2}'),
    "a seed of 5,000 digits": ("config.json", b'{"seed": 1' + b"0" * 5000 + b"}"),
    "a seed of 4,000 digits": ("config.json", b'{"seed": 1' + b"0" * 4000 + b"}"),
    "a temperature of 400 digits": (
        "config.json",
        b'{"rollout": {"temperature": 1' + b"0" * 400 + b"}}",
    ),
    "a temperature of 1e999": ("config.json", b'{"rollout": {"temperature": 1e999}}'),
    "a temperature of NaN": ("config.json", b'{"rollout": {"temperature": NaN}}'),
    "a NUL in a path": ("config.json", b'{"policy": {"path": "a\\u0000b"}}'),
    "half a character in a path": ("config.json", b'{"policy": {"path": "a\\ud800b"}}'),
    "a path that leads out": ("config.json", b'{"policy": {"path": "../../../../etc"}}'),
    "a list for a table": ("config.json", b'{"policy": []}'),
}


@pytest.mark.reliability(
    "attack", "weights and settings that are cut, nested, or beyond all bounds"
)
@pytest.mark.parametrize("what", BROKEN)
def test_broken_files_of_a_run_are_one_line(run, capsys, what):
    name, content = BROKEN[what]
    if name == "config.json" and content.startswith(b'{"') and content.endswith(b"}"):
        try:
            values = json.loads((run / name).read_text()) | json.loads(content)
            content = json.dumps(values).encode() if "twice" not in what else content
        except ValueError:
            pass
    (run / name).write_bytes(content)
    said = said_by(chat, capsys, run, *ASK)
    assert said_by(evaluate, capsys, run)[:60] == said[:60]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": "\\ud800"}', "is not UTF-8"),
        (b'{"prompt": "\xff"}', "cannot be read"),
        (b'{"prompt": 1}', "needs"),
        (b"\0\0", "not JSON"),
    ],
)
@pytest.mark.reliability("attack", "prompts files that are nested, not UTF-8, or a device")
def test_hostile_prompts_files_are_one_line(tmp_path, content, said):
    from meal_fast.data.prompts import load_prompts

    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content + b"\n")
    with pytest.raises(ValueError, match=said) as refused:
        load_prompts(str(path), "train")
    assert "prompts.jsonl" in str(refused.value)
    (tmp_path / "device.txt").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="no file"):
        load_prompts(str(tmp_path / "device.txt"), "train")


@pytest.mark.reliability(
    "attack", "a prompt of 3 MB in a file, on the command line's place, in chat"
)
def test_a_prompt_of_3_mb_is_answered_in_a_line(run, tmp_path, capsys, monkeypatch):
    import io

    from meal_fast.data.prompts import load_prompts

    long = "word " * 600_000
    policy = load_policy(tiny_config().policy, ("first", "second"))
    (tmp_path / "prompts.txt").write_text(f"Write.\n{long}\n")
    count = lambda text: len(policy.encode_prompt(text))  # noqa: E731
    kept = load_prompts(
        str(tmp_path / "prompts.txt"), "evaluation", whole=True, count_tokens=count, max_tokens=99
    )
    assert [p.text for p in kept] == ["Write."]
    assert "shorten it" in said_by(chat, capsys, run, "--prompt", long)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{long}\nWrite a word.\n"))
    chat.main([str(run), "--max-new-tokens", "2"])
    out, err = capsys.readouterr()
    assert "shorten it" in err and out.count("\n") == 1


@pytest.mark.reliability("attack", "bytes that are not UTF-8 typed into chat and given as a prompt")
def test_bytes_that_are_no_text_are_told_and_the_next_line_is_answered(run):
    def chatting(*argv, **more):
        return subprocess.run(
            [sys.executable, "-m", "meal_fast.chat", str(run), "--max-new-tokens", "2", *argv],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            timeout=120,
            **more,
        )

    ran = chatting(input=b"\xff\xfe\xff\nWrite a word.\n/w \xff=1\n")
    assert ran.returncode == 0 and b"Traceback" not in ran.stderr, ran.stderr
    assert ran.stderr.count(b"not UTF-8") == 1 and ran.stdout.count(b"\n") == 1
    ran = chatting("--prompt", b"\xff\xfe")
    assert ran.returncode == 2 and b"not UTF-8" in ran.stderr and ran.stderr.count(b"\n") == 1


@pytest.mark.reliability("attack", "a chat template that loops, reads files, or raises")
@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.mkdir('pwned') }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ ''.__class__.__mro__ }}{% for m in messages %}{{ m.content }}{% endfor %}",
        "{{ raise_exception('\x1b]52;c;x\x07') }}",
        "{% if %}",
    ],
)
def test_a_hostile_chat_template_does_nothing(run, tmp_path, monkeypatch, capsys, template):
    monkeypatch.chdir(tmp_path)
    base = shutil.copytree(
        run / "policy", tmp_path / "base", ignore=shutil.ignore_patterns("adapter")
    )
    (base / "chat_template.jinja").write_text(template)
    edited(run / "config.json", policy=tiny_policy(run, str(base)))
    said = said_by(chat, capsys, run, *ASK)
    assert "\x1b" not in said and not (tmp_path / "pwned").exists()
    assert not Path("pwned").exists()


def test_an_error_of_any_library_is_a_line(capsys):
    from meal_fast.common import opening

    @one_line_errors
    def main():
        with opening("a file", "make it anew"):
            raise pickle.UnpicklingError("no\n good \x1b[31m")

    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert_one_line(said, "a file cannot be read (UnpicklingError: no good", "make it anew")
    assert "\x1b" not in said
