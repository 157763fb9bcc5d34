"""Processes that were started by hand: what their variables lack is told in one line."""

import time

import pytest

from meal_fast.config.errors import one_line_errors
from meal_fast.config.mesh import check_meeting
from tests.helpers.processes import refused

PLACE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR"),
        ({"MASTER_PORT": ""}, "MASTER_PORT"),
        ({"MASTER_PORT": "zz"}, "MASTER_PORT='zz'"),
    ],
)
def test_where_processes_meet_must_be_said(tmp_path, capfd, monkeypatch, changes, name):
    for variable, value in (PLACE | MEETING | changes).items():
        monkeypatch.setenv(variable, value)
    refused(capfd, ["tiny", "--out", str(tmp_path / "run")], name, "start with torchrun")
    assert not (tmp_path / "run").exists()


def test_what_launchers_say_is_taken():
    check_meeting(PLACE | MEETING)


def test_who_waited_in_vain_is_not_sent_to_a_run_that_is_not_there(tmp_path):
    from meal_fast.train import left

    said = left(tmp_path / "run", "see to it")
    assert said == "there is no run yet: see to it, then start again"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_what_all_have_the_main_process_says_before_another_leaves(capsys, monkeypatch, rank):
    """A launcher ends the main process when another has left: it has had time to say it."""

    @one_line_errors
    def main() -> None:
        error = ValueError("grpo.lr=9: lower it")
        error.agreed = True
        raise error

    monkeypatch.setenv("RANK", rank)
    started = time.monotonic()
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    said = capsys.readouterr().err
    if rank == "0":
        assert said == "meal-fast: error: grpo.lr=9: lower it\n"
    else:
        assert said == "" and time.monotonic() - started >= 0.5
