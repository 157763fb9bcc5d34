"""What a terminal shows of a run, however narrow it is."""

import io
import re

import pytest
from rich.console import Console

from meal_fast.training.console import Display

METRICS = {
    "update": 16,
    "progress": 17 / 36,
    "w": [0.1, 0.9],
    "rewards": {"helpful": -1.0, "harmless": 1.32},
    "kl": 0.4414,
    "delta_norm": 3.337,
    "acceptance": 0.5,
    "tokens": 252,
    "seconds": {"rollout": 1.0},
}


@pytest.mark.parametrize("width", [60, 80, 200])
def test_how_far_a_run_is_stands_on_a_terminal_of_any_width(width):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None)
    with Display(36, 0, 0.0, console) as display:
        display.update(METRICS)
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).replace("\r", "\n")
    last = said[said.rindex("update 17/36") :]
    line = last.splitlines()[0]
    assert "update 17/36" in line and "0:00:0" in line and "left 0:0" in line
    assert all(len(part) <= width for part in last.splitlines())
    words = " ".join(last.split())
    for word in ("helpful -1.00", "harmless +1.32", "252 tok/s"):
        assert all(part in words for part in word.split())
    assert "…" not in last
