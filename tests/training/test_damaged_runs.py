"""Every file of a run's folder, damaged in every way: named in one line, or without any effect."""

import json
import os
import pickle
import shutil

import pytest
import torch

from meal_fast import chat, evaluate
from meal_fast.config.config import from_dict
from meal_fast.config.presets import preset
from meal_fast.training.checkpoint_saved import manifest, read_sound
from meal_fast.training.trainer import Trainer
from tests.helpers.checkpoints import as_old, every_file
from tests.helpers.processes import assert_same_runs, train_here

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {
    "checkpoint_every": 1,
    "meta": {"steps": 4, "tasks": 1},
    "rollout": {"prompts": 1, "samples": 4},
    "score": {"calibration": 4},
    "warmup": {"steps": 2, "draws": 8},
    "evaluation": {"prompts": 2, "grid": 3},
}


def flipped(data, at):
    """One bit the other way round."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGES = {
    "missing": None,
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "a byte short": lambda data: data[:-1],
    "a bit flipped in the middle": lambda data: flipped(data, len(data) // 2),
    "a bit flipped at a third": lambda data: flipped(data, len(data) // 3),
    "NULs": lambda data: b"\0" * len(data),
    "garbage": lambda data: b"\x93NUMPY no such thing \xff\xfe" * 3,
}


def damage(path, how):
    change = DAMAGES[how]
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run to its end, and one that was stopped in the middle, both with a warm start."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    config = from_dict(SMALL, preset("tiny"))
    assert Trainer(config, folder / "whole").train()
    trainer = Trainer(config, folder / "half")
    trainer.on_update = lambda m: setattr(trainer, "stop_requested", m["meta_step"] == 2)
    assert not trainer.train()
    return folder


def files_of(run):
    return sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.is_file())


def only_errors(err):
    """The lines that are neither plan nor progress."""
    return [line for line in err.splitlines() if "error" in line or "Traceback" in line]


def resumed(run, capfd):
    """Resume: its exit code and what it says of an error, which is one line."""
    capfd.readouterr()
    code = train_here("--resume", "--no-evaluate", "--out", str(run))
    err = capfd.readouterr().err
    errors = only_errors(err)
    assert "Traceback" not in err and len(errors) == (code != 0), err
    if code:
        assert code == 2 and errors[0].startswith("meal-fast: error: "), err
        assert err.endswith(errors[0] + "\n"), err
    return code, err


@pytest.mark.slow
@pytest.mark.reliability("fault", "every file of a run's folder damaged in 8 ways, then resumed")
def test_resumed_from_a_damaged_folder(runs, tmp_path, capfd, record_property):
    names, tried, refused = files_of(runs / "half"), 0, 0
    assert {*every_file(runs / "half"), "warmup/report.json"} < set(names) and len(names) > 12
    for name in names:
        for how in DAMAGES:
            run = tmp_path / "run"
            shutil.copytree(runs / "half", run)
            damage(run / name, how)
            code, err = resumed(run, capfd)
            tried += 1
            if code:
                refused += 1
                assert os.path.basename(name) in err.splitlines()[-1] or str(run) in err, err
            else:
                assert_same_runs(run, runs / "whole")
            shutil.rmtree(run)
    assert tried == len(names) * len(DAMAGES) and refused > 20
    said = f"{tried} of {tried} ({refused} refused in one line, the others without effect)"
    record_property("damaged files, resumed", said)


@pytest.mark.reliability("fault", "a damaged checkpoint: the one before is gone on with")
@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("part", ["rank-00000.safetensors", "manifest.json"])
def test_the_checkpoint_before_is_taken(runs, tmp_path, capfd, part, how):
    run = shutil.copytree(runs / "half", tmp_path / "run")
    damage(run / "ckpt/step-3" / part, how)
    code, err = resumed(run, capfd)
    assert code == 0
    (line,) = [x for x in err.splitlines() if "going on from ckpt/step-2, meta-step 2" in x]
    assert line.startswith(f"meal-fast: {run}: ckpt/step-3 is ") and part in line
    assert_same_runs(run, runs / "whole")
    assert {p.name for p in (run / "ckpt").iterdir()} == {"step-3", "step-4", "LATEST"}
    both = shutil.copytree(runs / "half", tmp_path / "both")
    for step in (2, 3):
        damage(both / f"ckpt/step-{step}" / part, how)
    code, err = resumed(both, capfd)
    assert code == 2 and "nothing to go on from: ckpt/step-3 is " in err and "ckpt/step-2 is" in err


@pytest.mark.reliability("fault", "a checkpoint or its name missing, or taken for another one")
def test_a_checkpoint_that_is_not_where_it_should_be(runs, tmp_path, capfd):
    def without(run):
        shutil.rmtree(run / "ckpt/step-3")

    def no_folder(run):
        shutil.rmtree(run / "ckpt")

    def swapped(run):
        first, second = (run / f"ckpt/step-{n}" for n in (2, 3))
        first.rename(run / "ckpt/aside")
        second.rename(first)
        (run / "ckpt/aside").rename(second)

    def parts_swapped(run):
        first, second = (run / f"ckpt/step-{n}/rank-00000.safetensors" for n in (2, 3))
        kept = first.read_bytes()
        first.write_bytes(second.read_bytes())
        second.write_bytes(kept)

    def named(text):
        return lambda run: (run / "ckpt/LATEST").write_bytes(text)

    for change, code, words in (
        (without, 0, "ckpt/step-3 is missing; going on from ckpt/step-2, meta-step 2"),
        (no_folder, 0, "has no checkpoint yet"),
        (swapped, 2, "ckpt/step-3 is another one: it was written as step-2"),
        (parts_swapped, 2, "nothing to go on from: ckpt/step-3 is damaged: rank-00000"),
        (named(b""), 0, "ckpt/LATEST names no checkpoint; going on from ckpt/step-3"),
        (named(b"\xff\0"), 0, "ckpt/LATEST names no checkpoint; going on from ckpt/step-3"),
        (named(b"../policy\n"), 0, "ckpt/LATEST names no checkpoint; going on from ckpt/step-3"),
        (named(b"step-9\n"), 0, "ckpt/step-9 is missing; going on from ckpt/step-3"),
        (named(b"step-2\n"), 0, ""),  # by hand: to go back to the one before
        (lambda run: (run / "ckpt/LATEST").unlink(), 0, "LATEST names no checkpoint; going on"),
    ):
        run = shutil.copytree(runs / "half", tmp_path / "run")
        change(run)
        found, err = resumed(run, capfd)
        assert found == code and words in err, err
        assert words or "going on" not in err
        if code == 0:
            assert_same_runs(run, runs / "whole")
        shutil.rmtree(run)
    run = shutil.copytree(runs / "half", tmp_path / "run")
    for step in (2, 3):
        shutil.rmtree(run / f"ckpt/step-{step}")
    code, err = resumed(run, capfd)  # there was one: it does not start again from the first update
    assert code == 2 and "nothing to go on from: ckpt/step-3 is missing" in err
    (run / "ckpt/step-3").symlink_to(runs / "half/ckpt/step-3")
    code, err = resumed(run, capfd)
    assert code == 2 and "'ckpt/step-3' is a link" in err


@pytest.mark.reliability("silent", "one bit flipped in each tensor and each word of a checkpoint")
def test_a_flipped_bit_in_any_tensor_is_seen(runs, tmp_path):
    folder = shutil.copytree(runs / "half/ckpt/step-3", tmp_path / "step-3")
    assert read_sound(folder).step == 3
    path = folder / "rank-00000.safetensors"
    data = path.read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    places = [begin + sum(at["data_offsets"]) // 2 for n, at in header.items() if n[0] != "_"]
    assert len(places) > 40
    for at in (0, 9, begin - 1, *places):
        path.write_bytes(flipped(data, at))
        with pytest.raises(ValueError, match=r"is damaged: rank-\d+\.safetensors is not what was"):
            read_sound(folder)
    path.write_bytes(data)
    path = folder / "manifest.json"
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        path.write_bytes(flipped(data, at))
        with pytest.raises(ValueError, match=r"^is damaged: manifest.json is not what was written"):
            read_sound(folder)


@pytest.mark.reliability("attack", "a manifest, with its digest, that leads elsewhere or lies")
def test_a_manifest_that_was_made_up_is_refused(runs, tmp_path):
    folder = shutil.copytree(runs / "half/ckpt/step-3", tmp_path / "step-3")
    path = folder / "manifest.json"
    good = json.loads(path.read_text())
    del good["digest"]
    (tmp_path / "rank-1.safetensors").write_bytes(b"mine")
    name = next(iter(good["tensors"]))
    huge, file = [1 << 40], "rank-00000.safetensors"

    def read(**changes):
        path.write_text(manifest(good | changes))
        return read_sound(folder).load()

    assert read()["outer"].keys() == {"theta", "adam", "by_preference"}
    changed = good["tensors"][name]

    def tensor(**changes):
        return {"tensors": good["tensors"] | {name: changed | changes}}

    for changes in (
        {"parts": {"../rank-1.safetensors": [4, ""]}},
        {
            "tensors": good["tensors"]
            | {name: changed | {"shape": huge, "chunks": [[file, [0], huge]]}}
        },
        {"tensors": good["tensors"] | {name: changed | {"chunks": []}}},
        {"tensors": good["tensors"] | {name: changed | {"chunks": [["../x", [0, 0], [1, 1]]]}}},
        {"tensors": good["tensors"] | {name: changed | {"dtype": "load"}}},
        {"tensors": {}},
        {"tensors": []},
        {"state": {"exec": "1"}},
        {"state": {"dict": 3}},
        {"state": {"tensor": name}},
        {"step": -1},
        {"step": "3"},
        {"tokens": 1.5},
        {"parts": 3},
        {"format": 2},
    ):
        with pytest.raises(ValueError, match=r"^(is|has) "):
            read(**changes)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("reached",)


@pytest.mark.reliability("attack", "a checkpoint whose pickle runs code")
@pytest.mark.parametrize("place", ["checkpoint.pt", ".metadata", "manifest.json", "part", "LATEST"])
def test_a_checkpoint_that_runs_code_is_refused(runs, tmp_path, capfd, monkeypatch, place):
    run = shutil.copytree(runs / "half", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    evil = pickle.dumps(Payload())
    if place == "checkpoint.pt":
        as_old(run)
        torch.save({"step": 1, "outer": Payload()}, run / "checkpoint.pt")
        words = "checkpoint.pt is damaged, cut short, or no checkpoint"
    elif place == "LATEST":
        (run / "ckpt/LATEST").write_bytes(evil)
        words = "names no checkpoint"
    elif place == ".metadata":  # where torch's own storages have theirs
        (run / "ckpt/step-3/.metadata").write_bytes(evil)
        (run / "ckpt/.metadata").write_bytes(evil)
        words = ""
    else:
        names = {"part": "rank-00000.safetensors", "manifest.json": "manifest.json"}
        (run / "ckpt/step-3" / names[place]).write_bytes(evil)
        words = f"is damaged: {names[place]} is not what was written"
    code, err = resumed(run, capfd)
    assert code == 0 and words in err
    assert not (tmp_path / "reached").exists()
    assert_same_runs(run, runs / "whole")


def test_one_of_an_earlier_version_goes_on_and_gives_way(runs, tmp_path, capfd):
    """A folder with checkpoint.pt is read as before; when two others are there it is removed."""
    for damaged in (False, True):
        run = shutil.copytree(runs / "half", tmp_path / f"run{damaged}")
        as_old(run)
        if damaged:
            damage(run / "checkpoint.pt", "half")
        code, err = resumed(run, capfd)
        assert code == 0 and ("going on from checkpoint.previous.pt, meta-step 2" in err) == damaged
        assert_same_runs(run, runs / "whole")
        names = {p.name for p in run.iterdir()} | {p.name for p in (run / "ckpt").iterdir()}
        assert {"LATEST", "step-4"} < names
        old = {"checkpoint.pt", "checkpoint.previous.pt"}
        assert old.isdisjoint(names) if damaged else old < names  # of meta-steps 3 and 4, or of 4
    (run / "checkpoint.pt").unlink(missing_ok=True)
    as_old(run)
    (run / "checkpoint.pt").unlink()
    code, err = resumed(run, capfd)
    assert code == 0 and "checkpoint.pt is missing; going on from checkpoint.previous.pt" in err


@pytest.mark.reliability("silent", "another option in config.json than the run was saved with")
def test_a_changed_configuration_is_named(runs, tmp_path, capfd):
    run = tmp_path / "run"
    shutil.copytree(runs / "half", run)
    values = json.loads((run / "config.json").read_text())
    values["grpo"]["lr"] *= 2
    (run / "config.json").write_text(json.dumps(values))
    code, err = resumed(run, capfd)
    assert code == 2 and "config.json is not what it was" in err and "grpo.lr" in err


@pytest.mark.reliability("fault", "metrics.jsonl or completions.jsonl cut short, then resumed")
@pytest.mark.parametrize("name", ["metrics.jsonl", "completions.jsonl"])
def test_a_log_that_is_cut_short_is_not_filled_up(runs, tmp_path, capfd, name):
    run = tmp_path / "run"
    shutil.copytree(runs / "half", run)
    path = run / name
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))  # enough for the checkpoint before
    code, err = resumed(run, capfd)
    assert code == 0 and f"goes with a {name} of" in err and "going on from" in err
    assert_same_runs(run, runs / "whole")
    shutil.rmtree(run)
    shutil.copytree(runs / "half", run)
    path.write_bytes(lines[0])
    code, err = resumed(run, capfd)
    assert code == 2 and f"goes with a {name} of" in err
    assert path.read_bytes() == lines[0]
    if name == "completions.jsonl":
        assert "remove it" in err
        path.unlink()
        assert resumed(run, capfd)[0] == 0
        assert_same_runs(run, runs / "whole")


@pytest.mark.reliability("fault", "what a checkpoint would hold is not finite")
def test_no_checkpoint_is_written_of_what_is_not_finite(tmp_path):
    trainer = Trainer(from_dict(SMALL | {"warmup": {"steps": 0}}, preset("tiny")), tmp_path / "run")
    trainer.meta_step()
    trainer.save_checkpoint()
    trainer.checkpoints.finish()
    before = {name: (tmp_path / "run" / name).read_bytes() for name in every_file(tmp_path / "run")}
    with torch.no_grad():
        trainer.policy.trainable[0].view(-1)[0] = float("nan")
    trainer.step += 1
    with pytest.raises(ValueError, match="not finite; the checkpoint before it is kept"):
        trainer.save_checkpoint()
    after = {name: (tmp_path / "run" / name).read_bytes() for name in every_file(tmp_path / "run")}
    assert after == before and len(before) == 3


@pytest.mark.slow
@pytest.mark.reliability("fault", "every file of a finished run damaged in 8 ways, then evaluated")
def test_evaluated_from_a_damaged_folder(runs, tmp_path, capfd, record_property):
    """Refused in one line, or the same evaluation; what only training reads is not looked at."""

    def evaluated(run):
        capfd.readouterr()
        try:
            evaluate.main([str(run), "--no-report"])
        except SystemExit as stop:
            err = capfd.readouterr().err
            errors = only_errors(err)
            assert stop.code == 2 and len(errors) == 1 and "Traceback" not in err, err
            return errors[0]
        found = json.loads((run / "evaluation.json").read_text())
        return {k: found[k] for k in ("answers", "prompts", "utopia", "reference_point")}

    names = [n for n in files_of(runs / "whole") if not n.startswith(("ckpt", "completions"))]
    want, tried, refused = None, 0, 0
    for name in [None, *names]:
        for how in DAMAGES if name else ["whole"]:
            run = tmp_path / "run"
            shutil.copytree(runs / "whole", run)
            if name:
                damage(run / name, how)
            found = evaluated(run)
            want = want or found
            tried += name is not None
            refused += isinstance(found, str)
            assert isinstance(found, str) or found == want, (name, how)
            shutil.rmtree(run)
    assert refused > 60
    said = f"{tried} of {tried} ({refused} refused in one line, the others without effect)"
    record_property("damaged files, evaluated", said)


@pytest.mark.reliability("silent", "another chat template in template.json than the run's own")
@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("assistant", "assXstXnt"),
        lambda text: json.dumps({"chat_template": "constant"}),
        lambda text: json.dumps({"chat_template": ""}),
        None,
    ],
    ids=["edited", "constant", "empty", "missing"],
)
def test_another_template_is_seen(runs, tmp_path, capfd, change):
    for kind in ("half", "whole"):
        path = shutil.copytree(runs / kind, tmp_path / kind) / "template.json"
        if change is None:
            path.unlink()
        else:
            path.write_text(change(path.read_text()))
    code, err = resumed(tmp_path / "half", capfd)
    assert code == 2 and "template.json" in err.splitlines()[-1]
    for command, argv in ((evaluate, ()), (chat, ("--prompt", "Write a word."))):
        with pytest.raises(SystemExit) as stop:
            command.main([str(tmp_path / "whole"), *argv])
        last = capfd.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and "template.json" in last, last


@pytest.mark.reliability("message", "a resume on a disk with room beside what is there")
def test_what_is_there_counts_as_room(runs, tmp_path, capfd, monkeypatch):
    run = shutil.copytree(runs / "half", tmp_path / "half")
    size = sum(p.stat().st_size for p in (run / "ckpt/step-3").iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 2 * size))
    code, err = resumed(run, capfd)
    assert code == 0, err
