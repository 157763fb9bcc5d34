"""What a user reads of a run that is in use, damaged, or warned of: one line, with a remedy."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from meal_fast import evaluate, export
from meal_fast.config.config import to_dict
from meal_fast.config.resume import resume_command
from meal_fast.config.run_dir import read_metrics
from meal_fast.config.run_lock import this_process
from meal_fast.config.sealed import SEAL, read_seal
from meal_fast.training.metrics import note_cost
from tests.helpers.processes import assert_one_line
from tests.helpers.run_folder import build_run, tiny_config

ROOT = Path(__file__).resolve().parents[2]


def refused(capsys, command, *argv):
    """The one line that a command leaves with."""
    with pytest.raises(SystemExit) as stop:
        command([str(a) for a in argv])
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    build_run(folder, tiny_config())
    return folder


@pytest.mark.reliability("message", "evaluating a run that is being trained")
def test_a_run_in_training_is_in_use(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(to_dict(tiny_config())))
    held = this_process("training") | {"host": "elsewhere"}
    (tmp_path / "run.lock").write_text(json.dumps(held))
    err = refused(capsys, evaluate.main, tmp_path)
    assert_one_line(err, "is in use (training by process", "on elsewhere")


@pytest.mark.reliability("message", "--objectives before RUN, which it swallows")
def test_run_comes_before_the_objectives(tmp_path, capsys):
    said = ["--objectives", "first=world:first", "second=world:second", tmp_path]
    assert_one_line(refused(capsys, evaluate.main, *said), "RUN; it comes before --objectives")


@pytest.mark.reliability("message", "a warning of ours, in any command")
def test_our_warnings_are_one_line(tmp_path):
    gone = this_process("training") | {"pid": 1 << 22, "started": "1"}
    (tmp_path / "run.lock").write_text(json.dumps(gone))
    code = (
        "from pathlib import Path\n"
        "from meal_fast.config.errors import one_line_errors\n"
        "from meal_fast.config.run_lock import lock\n"
        "@one_line_errors\n"
        "def main():\n"
        "    with lock(Path(), 'evaluation'): pass\n"
        "main()"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    said = f"meal-fast: {tmp_path}/run.lock was left by process {1 << 22}, which is gone"
    assert ran.returncode == 0 and ran.stderr == f"{said}: it is taken over\n"


@pytest.mark.reliability("message", "a metrics.jsonl that is not UTF-8")
def test_metrics_that_are_no_text(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"update": 0}\n\xff\xfe\n{"update": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl.*not UTF-8 text.*restore it"):
        read_metrics(tmp_path)


@pytest.mark.reliability("message", "a damaged policy.json")
@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[]", b'{"files": 3}'])
def test_a_damaged_seal_is_written_anew(tmp_path, text):
    (tmp_path / SEAL).write_bytes(text)
    with pytest.raises(ValueError, match=SEAL) as error:
        read_seal(tmp_path)
    assert f"write it anew with `{resume_command(tmp_path)}`" in str(error.value)


@pytest.mark.reliability("message", "a damaged policy/preference.json in export")
@pytest.mark.parametrize("text", [b"{x", b"\xff", b"[]", None])
def test_damaged_preferences_are_named(built, tmp_path, capsys, text):
    path = built / "policy" / "preference.json"
    whole = path.read_bytes()
    path.unlink()
    if text is not None:
        path.write_bytes(text)
    err = refused(capsys, export.main, built, "--out", tmp_path / "out")
    path.write_bytes(whole)
    assert_one_line(err, "policy/preference.json", resume_command(built))
    assert not (tmp_path / "out").exists()


@pytest.mark.reliability("fault", "a damaged cost.json at the end of a resumed run")
@pytest.mark.parametrize(
    "text", ["{}", "", "[]", '{"peak_bytes": "x"}', '{"peak_bytes": null}', '{"peak_bytes": true}']
)
def test_a_damaged_cost_counts_as_none(tmp_path, text):
    (tmp_path / "cost.json").write_text(text)
    note_cost(tmp_path, torch.device("cpu"))
    assert json.loads((tmp_path / "cost.json").read_text())["peak_bytes"] > 1 << 20
