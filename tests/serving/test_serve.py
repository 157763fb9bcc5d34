"""The command, a run's state, its net and its several models; texts cut at a stop."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meal_fast import serve
from meal_fast.config.run_dir import read_config
from tests.serving.conftest import serving, until
from tests.serving.test_api import ASK, W, ask, httpx

pytest.importorskip("fastapi")
from meal_fast.serving.openai_format import StopCut
from meal_fast.serving.run import ServedRun, unfinished

ROOT = Path(__file__).resolve().parents[2]


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        serve.main(list(map(str, arguments)))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("meal-fast: error: ") and error.count("\n") == 1
    return error


def test_a_port_in_use_and_other_bad_input_is_one_line(run, capsys, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"--port={port}: is in use" in refused(capsys, run.folder, "--port", port)
    assert "give a --token" in refused(capsys, run.folder, "--host", "0.0.0.0")
    assert "at least 8" in refused(capsys, run.folder, "--token", "short")
    assert "--port=70000" in refused(capsys, run.folder, "--port", 70000)
    assert "--slots=0" in refused(capsys, run.folder, "--slots", 0)
    assert "no config.json" in refused(capsys, tmp_path)
    (tmp_path / "config.json").write_text((run.folder / "config.json").read_text())
    assert "no policy/ yet" in refused(capsys, tmp_path)


def test_as_a_program_it_says_where_it_is_and_ends_by_a_signal(run):
    command = [sys.executable, "-m", "meal_fast.serve", str(run.folder), "--port", "0"]
    started = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "HF_HUB_OFFLINE": "1"})  # fmt: skip
    try:
        lines = iter(started.stderr.readline, "")
        url = next(m[1] for line in lines if (m := re.search(r"playground at (\S+)/,", line)))
        body = {"messages": ASK, "preference": W, "max_tokens": 4}
        until(lambda: httpx.get(url).status_code == 200)
        said = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        assert said["choices"][0]["finish_reason"] in ("stop", "length")
        started.send_signal(signal.SIGINT)
        started.communicate(timeout=30)
    finally:
        started.kill()


def test_a_run_that_is_not_finished_says_so(run, monkeypatch):
    from meal_fast.serving import run as module

    assert unfinished(run.folder) == ""
    monkeypatch.setattr(module, "unfinished", lambda *_: "3 of 9 meta-steps")
    with serving(run.folder) as server:
        models = httpx.get(f"{server.url}/v1/models").json()["data"]
    assert models[0]["meal_fast"]["unfinished"] == "3 of 9 meta-steps"


def test_how_far_a_saved_policy_is(tmp_path):
    """As `policy.json` says; of an older version without it, as the last update does."""
    assert unfinished(tmp_path) == ""
    (tmp_path / "metrics.jsonl").write_text('{"update": 0, "progress": 0.125}\n')
    assert unfinished(tmp_path) == "stopped at 12 % of its updates"
    for progress, said in ((1 / 3, "stopped at 33 % of its updates"), (0.999, "99 %"), (1.0, "")):
        seal = {"progress": progress, "files": {}}
        (tmp_path / "policy.json").write_text(json.dumps(seal))
        assert said in unfinished(tmp_path) and bool(said) == bool(unfinished(tmp_path))


def test_auto_is_the_preference_of_the_net(run, tmp_path):
    import shutil

    from meal_fast.training.preference_net import PreferenceNet

    folder = tmp_path / "meal"
    shutil.copytree(run.folder, folder)
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    width = run.policy.network.weight.shape[1]
    config = read_config(folder)
    net = PreferenceNet(config.names, width)
    net.save(folder / "preference_net.safetensors")
    with serving(folder) as server:
        plain = ask(server, preference="auto", max_tokens=4).json()["choices"][0]
        again = ask(server, preference=plain["preference"], max_tokens=4).json()["choices"][0]
        assert plain["message"] == again["message"]
        assert sum(plain["preference"].values()) == pytest.approx(1)
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["meal_fast"]["auto"] is True


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=2),
       st.data())  # fmt: skip
def test_a_text_is_cut_at_the_first_stop_however_it_comes_in_parts(text, stops, data):
    cut, said, at = StopCut(stops), "", 0
    while at < len(text):
        size = data.draw(st.integers(1, len(text) - at))
        said += cut.more(text[at : at + size], at + size == len(text))
        at += size
        ends = [text[:at].find(s) for s in stops if s in text[:at]]
        assert text.startswith(said) and len(said) <= min(ends, default=len(text))
    whole = [text.find(s) for s in stops if s in text]
    # The first that is complete ends it, as the engine ends the row there.
    if not whole:
        assert said == text
    else:
        assert not any(s in said for s in stops)


def test_the_run_is_read_without_a_server(run):
    served = ServedRun(run.folder, read_config(run.folder))
    assert served.preference({"second": 0.75, "first": 0.25}) == (0.25, 0.75)
    assert served.preference(None) == (0.5, 0.5)
    served.rewards.close()
