"""Every file of a run's folder, damaged in every way: named in one line, or without any effect."""

import json
import os
import shutil
import zipfile

import pytest
import torch

from meal_fast import chat, evaluate
from meal_fast.config.config import from_dict
from meal_fast.config.presets import preset
from meal_fast.training.trainer import Trainer
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
    assert {"checkpoint.pt", "checkpoint.previous.pt", "warmup/report.json"} < set(names)
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
def test_the_checkpoint_before_is_taken(runs, tmp_path, capfd, how):
    run = tmp_path / "run"
    shutil.copytree(runs / "half", run)
    damage(run / "checkpoint.pt", how)
    code, err = resumed(run, capfd)
    assert code == 0
    found = [x for x in err.splitlines() if "going on from checkpoint.previous.pt" in x]
    if how.startswith("a bit") and not found:  # between two parts, where nothing is read
        return assert_same_runs(run, runs / "whole")
    (line,) = found
    assert line.startswith(f"meal-fast: {run}: checkpoint.pt is ") and "meta-step 2" in line
    assert_same_runs(run, runs / "whole")
    both = tmp_path / "both"
    shutil.copytree(runs / "half", both)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        damage(both / name, how)
    code, err = resumed(both, capfd)
    if how == "missing":
        assert "has no checkpoint yet" in err and code == 0  # from the first update
        assert_same_runs(both, runs / "whole")
        return
    assert code == 2
    assert "nothing to go on from: checkpoint.pt is " in err and "checkpoint.previous.pt is" in err


@pytest.mark.reliability("silent", "one bit flipped in each part of a checkpoint's archive")
def test_a_flipped_bit_in_any_tensor_is_seen(runs, tmp_path):
    from meal_fast.training.checkpoint import read_checkpoint

    path = runs / "half" / "checkpoint.pt"
    data, whole = path.read_bytes(), read_checkpoint(path)
    with zipfile.ZipFile(path) as archive:
        parts = [i for i in archive.infolist() if i.file_size]
    bad, spoilt = tmp_path / "checkpoint.pt", 0
    assert len(parts) > 40
    for part in parts:
        # Behind the local header: its name and an extra field that aligns the data.
        name, extra = data[part.header_offset + 26], data[part.header_offset + 28 :][:2]
        start = part.header_offset + 30 + name + int.from_bytes(extra, "little")
        assert zipfile.ZipFile(path).read(part) == data[start : start + part.file_size]
        bad.write_bytes(flipped(data, start + part.file_size // 2))
        try:
            state = read_checkpoint(bad)
        except ValueError:
            spoilt += 1
        else:  # a part that nothing is read from: byte order, version
            assert state["digest"] == whole["digest"], part.filename
    assert spoilt >= len(parts) - 6


class Payload:
    def __reduce__(self):
        return os.mkdir, ("reached",)


@pytest.mark.reliability("attack", "a checkpoint whose pickle runs code")
def test_a_checkpoint_that_runs_code_is_refused(runs, tmp_path, capfd, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(runs / "half", run)
    monkeypatch.chdir(tmp_path)
    torch.save({"step": 1, "outer": Payload()}, run / "checkpoint.pt")
    code, err = resumed(run, capfd)
    assert code == 0 and "checkpoint.pt is damaged, cut short, or no checkpoint" in err
    assert not (tmp_path / "reached").exists()


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
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    with torch.no_grad():
        trainer.policy.trainable[0].view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="not finite; the checkpoint before it is kept"):
        trainer.save_checkpoint()
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_without_links_the_checkpoint_before_is_a_copy(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refused)
    config = from_dict(SMALL | {"warmup": {"steps": 0}}, preset("tiny"))
    assert Trainer(config, tmp_path / "run").train()
    steps = [
        torch.load(tmp_path / "run" / name, weights_only=True)["step"]
        for name in ("checkpoint.pt", "checkpoint.previous.pt")
    ]
    assert steps == [4, 3]


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

    names = [n for n in files_of(runs / "whole") if not n.startswith(("checkpoint", "completions"))]
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
    size = (run / "checkpoint.pt").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 2 * size))
    code, err = resumed(run, capfd)
    assert code == 0, err
