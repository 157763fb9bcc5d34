"""What a person sees of a run: on a terminal of any width, on a pipe, and of hostile answers."""

import io
import re
import time

import pytest
from rich.console import Console

from meal_fast.training.console import Display, Pace, about, extremes

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
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def row(helpful: float, response: str, update: int = 0) -> dict:
    asked = {"helpful": helpful, "harmless": 1 - helpful}
    return {"update": update, "asked": asked, "response": response}


def at(update: int, of: int = 36, seconds: float = 1.0) -> dict:
    progress = (update + 1) / of
    return METRICS | {"update": update, "progress": progress, "seconds": {"rollout": seconds}}


def terminal(width: int = 80) -> tuple[io.StringIO, Console]:
    screen = io.StringIO()
    return screen, Console(file=screen, force_terminal=True, width=width, color_system=None)


def seen(screen: io.StringIO) -> str:
    return ESCAPE.sub("", screen.getvalue()).replace("\r", "\n")


@pytest.mark.reliability("hour", "a narrow terminal: counter, bar, time and estimate stay")
@pytest.mark.parametrize("width", [60, 80, 200])
def test_how_far_a_run_is_stands_on_a_terminal_of_any_width(width):
    screen, console = terminal(width)
    with Display(console) as display:
        display.begin(36, 13, 13 / 36)
        for update in (13, 14, 15, 16):
            display.update(at(update))
    last = seen(screen)
    last = last[last.rindex("update 17/36") :]
    line = last.splitlines()[0]
    assert "━" in line and "0:00:0" in line and "about 20 s left" in line
    assert all(len(part) <= width for part in last.splitlines())
    words = " ".join(last.split())
    for word in ("helpful -1.00", "harmless +1.32", "252 tok/s"):
        assert all(part in words for part in word.split())
    assert "…" not in last


@pytest.mark.reliability("hour", "a blank screen until the first update")
def test_before_the_first_update_the_stages_are_shown():
    screen, console = terminal()
    with Display(console) as display:
        for stage in ("loading the model on cpu", "warm start: step 3/24"):
            display.stage(stage)
            give_up = time.monotonic() + 20  # it is drawn four times a second
            while stage not in seen(screen):
                assert time.monotonic() < give_up, stage
                time.sleep(0.05)
        stages = seen(screen)
        display.begin(36, 0, 0.0)
    assert "starting" in stages and "update" not in stages and "left" not in stages


def test_what_never_came_to_an_update_leaves_nothing_on_the_screen():
    screen, console = terminal()
    with pytest.raises(ValueError), Display(console) as display:
        display.stage("loading")
        raise ValueError("no such model")
    assert screen.getvalue().count("\x1b[2K") >= 2  # both lines are erased at the end


def test_on_a_pipe_each_stage_is_a_line_and_its_steps_are_few(capsys):
    with Display() as display:
        for stage in ("loading the model", *(f"warm start: step {i}/90" for i in range(90))):
            display.stage(stage)
        display.begin(36, 0, 0.0)
        for update in range(4):
            display.answers([row(1.0, "yes", update), row(0.0, "no", update)])
            display.update(at(update))
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and lines[:2] == [
        "meal-fast: loading the model",
        "meal-fast: warm start: step 0/90",
    ]
    assert lines[2].startswith("update 1/36  w 0.10/0.90  helpful -1.00")
    assert lines[3:5] == ["  helpful 1.00 | yes", "  harmless 1.00 | no"]
    assert len(lines) == 8 and not any("left" in line for line in lines[:6])
    assert lines[6].endswith("about 35 s left") and "\x1b" not in err


def test_a_run_by_tokens_is_counted_in_percent(capsys):
    with Display() as display:
        display.begin(None, 0, 0.0)
        display.update(at(0, of=40))
    assert capsys.readouterr().err.startswith("update 2%  ")


HOSTILE = [
    "\x1b[2J\x1b[31mred\x1b]0;title\x07",
    "\x9b2Jc1",
    "one\r\ntwo\rthree\bfour\x00",
    "\u202eright to left",
    "[bold]markup[/bold] [link=http://a]x[/link] :smile:",
]


@pytest.mark.parametrize("response", HOSTILE)
@pytest.mark.parametrize("live", [True, False])
def test_no_answer_reaches_the_terminal_as_anything_but_text(response, live, capsys):
    screen, console = terminal()
    with Display(console if live else None) as display:
        display.begin(36, 0, 0.0)
        clean = len(screen.getvalue())
        display.answers([row(1.0, response)])
        display.update(at(0))
        said = screen.getvalue()[clean:] if live else capsys.readouterr().err
    line = next(part for part in ESCAPE.sub("", said).splitlines() if "helpful 1.00 |" in part)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", line)
    for sequence in ("\x1b[2J", "\x1b[31m", "\x1b]0;", "\x9b", "\u202e"):
        assert sequence not in said
    if "markup" in response:
        assert response in line


@pytest.mark.parametrize("width", [40, 80])
def test_an_answer_is_one_line_cut_to_the_width_however_wide_its_letters_are(width):
    screen, console = terminal(width)
    with Display(console) as display:
        display.begin(36, 0, 0.0)
        display.answers([row(1.0, "宽" * 300), row(0.0, "long " * 100)])
        display.update(at(0))
    lines = [part for part in seen(screen).splitlines() if " | " in part]
    assert len(lines) == 2 and all(part.rstrip().endswith("…") for part in lines)
    assert len(lines[1].rstrip()) <= width
    assert sum(2 if c == "宽" else 1 for c in lines[0].rstrip()) <= width


def test_answers_at_the_ends_are_those_that_were_asked_for_most_and_last():
    rows = [row(0.5, "a"), row(0.9, "b"), row(0.9, "c"), row(0.2, "d"), row(0.9, "e", update=1)]
    chosen = extremes(rows)
    assert {name: found["response"] for name, found in chosen.items()} == {
        "helpful": "e",
        "harmless": "d",
    }
    assert extremes([row(0.9, "b"), row(0.9, "c")])["helpful"]["response"] == "b"  # not the best


@pytest.mark.reliability("hour", "no sampled answer is seen while it trains")
@pytest.mark.parametrize(("seconds", "shown"), [(0.0, [0, 4, 9, 14]), (1e9, [0])])
def test_answers_are_shown_every_few_updates_and_not_too_often(capsys, monkeypatch, seconds, shown):
    monkeypatch.setattr("meal_fast.training.console.ANSWERS_SECONDS", seconds)
    with Display() as display:
        display.begin(36, 0, 0.0)
        for update in range(16):
            display.answers([row(1.0, f"of {update}", update)])
            display.update(at(update))
    err = capsys.readouterr().err
    assert [int(n) for n in re.findall(r"helpful 1\.00 \| of (\d+)", err)] == shown


def test_one_preference_in_all_updates_is_one_answer(capsys):
    with Display() as display:
        display.begin(36, 0, 0.0)
        display.answers([row(0.6, "only")])
        display.update(at(0))
    assert capsys.readouterr().err.count("only") == 1


def test_a_warning_stands_whole_on_the_screen():
    warning = (
        "the reward harmless rose from -0.10 to +3.60 where it is asked for, but " + "so " * 40
    )
    screen, console = terminal()
    with Display(console) as display:
        display.begin(36, 0, 0.0)
        display.update(at(3) | {"hacked": {"harmless": warning}})
    assert " ".join(warning.split()) in " ".join(seen(screen).split())


@pytest.mark.reliability("hour", "a first estimate that is hours off")
def test_the_time_left_leaves_the_first_update_out_and_is_not_said_before_it_is_sensible():
    pace = Pace()
    assert pace.left(at(0, of=101, seconds=600.0)) == ""  # warming up: ten minutes
    assert pace.left(at(1, of=101, seconds=6.0)) == ""
    assert pace.left(at(2, of=101, seconds=6.0)) == "about 10 min left"  # 98 of 6 s
    assert pace.left(at(100, of=101, seconds=6.0)) == ""
    resumed = Pace(0.5)
    left = [resumed.left(at(update, of=100, seconds=1.0)) for update in (50, 51, 52)]
    assert left == ["", "", "about 45 s left"]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (1, "about 5 s"),
        (44, "about 45 s"),
        (89, "about 90 s"),
        (91, "about 2 min"),
        (3600, "about 60 min"),
        (2 * 3600 + 8 * 60, "about 2 h 10 min"),
        (3 * 3600, "about 3 h"),
        (1.99 * 3600, "about 2 h"),
    ],
)
def test_an_estimate_is_said_no_more_exactly_than_it_is_known(seconds, words):
    assert about(seconds) == words


def test_of_several_processes_one_shows_warnings(capsys):
    with Display(quiet=True) as display:
        display.note("no response was kept")
    assert capsys.readouterr() == ("", "")
