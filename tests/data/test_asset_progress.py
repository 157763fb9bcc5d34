"""What the build of the assets shows: on a pipe, on a terminal of 80 columns, from any thread."""

import io
import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from meal_fast.data.assets import build
from meal_fast.data.assets.progress import Display


@pytest.mark.reliability("hour", "minutes of silence while assets are built")
def test_a_pipe_gets_a_plain_line_now_and_then() -> None:
    out = io.StringIO()
    with Display(out, interval=0.05) as display:
        display.begin("model", "training, about 4 min")
        time.sleep(0.08)
        display.step("model", 30, 120)
        time.sleep(0.3)
        display.end("model", "good")
        display.step("model", 120, 120)  # said too late: no matter
        time.sleep(0.1)
    lines = out.getvalue().splitlines()
    assert lines[0].endswith("s] model: training, about 4 min")
    assert lines[1].endswith("model: 0 s so far")
    assert any("model: step 30 of 120, 0 s so far, about 1 s left" in line for line in lines)
    assert lines[-1].endswith("model: good") and "\x1b" not in out.getvalue()
    assert all(len(line) <= 80 for line in lines)


def test_a_terminal_gets_a_bar() -> None:
    code = (
        "import time; from meal_fast.data.assets.progress import Display\n"
        "with Display() as display:\n"
        "    display.begin('harmless', 'training')\n"
        "    display.step('harmless', 30, 120)\n"
        "    time.sleep(0.6)\n"
        "    display.end('harmless', 'good [0.1, 0.2]')\n"
    )
    main, side = pty.openpty()
    env = {**os.environ, "COLUMNS": "80", "TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=side, env=env) as process:
        os.close(side)
        said = b""
        while True:
            try:
                said += os.read(main, 4096)
            except OSError:  # the other side is closed
                break
    os.close(main)
    assert process.returncode == 0
    text = said.decode()
    assert "30/120" in text and "━" in text and "harmless: good [0.1, 0.2]" in text


REPORT = {
    "held_out": {
        "spearman": 0.7, "spearman_interval": [0.6, 0.8], "auc": 0.83, "auc_interval": [0.8, 0.9],
    },
    "held_out_rows": 12,
    "held_out_hacks": {
        "bare no": {"pairs": 10, "below_half": 0.9, "hack": 0.2, "honest": 0.97},
        "gibberish": {"pairs": 10, "below_half": 0.5, "hack": 0.5, "honest": 0.97},
    },
}  # fmt: skip


def test_the_report_marks_what_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEAL_FAST_CACHE", str(tmp_path))
    assert build.main(["--report"]) == 2
    assert "asset 'complied': not in" in capsys.readouterr().err
    for name in ("complied", "harmless"):
        (tmp_path / name).mkdir()
        old = {key: value for key, value in REPORT.items() if key != "held_out_hacks"}
        (tmp_path / name / "quality.json").write_text(json.dumps(old))
    assert build.main(["--report"]) == 2
    assert "another version of meal-fast; run `make assets`" in capsys.readouterr().err
    for name in ("complied", "harmless"):
        (tmp_path / name / "quality.json").write_text(json.dumps(REPORT))
    assert build.main(["--report"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("complied: held-out Spearman 0.70") and len(lines) == 8
    assert lines[2].split() == ["bare", "no", "10", "90%", "0.20", "0.97"]
    assert lines[3].endswith("open") and all(len(line) <= 80 for line in lines[1:4])


def test_one_line_counts_the_hacks_that_are_paid_for():
    shares = {"bare no": 0.95, "repetition": 0.4, "gibberish": 0.89}
    report = {"held_out_hacks": {kind: {"below_half": share} for kind, share in shares.items()}}
    assert build.hacks_in_a_line(report).startswith("pays for 2 of 3 kinds of hacks")
