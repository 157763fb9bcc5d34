"""Reward servers over real sockets: the example's, and ones that fail in every way they can."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from meal_fast.config.config import Config, from_dict, to_dict
from meal_fast.data import http_objective
from meal_fast.data.objectives import ObjectiveError, is_outside, load_objectives
from tests.helpers.processes import ROOT

Answer = Callable[[BaseHTTPRequestHandler, dict], None]


def said(handler: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def lengths(asked: dict) -> bytes:
    return json.dumps({"rewards": [len(r) for r in asked["responses"]]}).encode()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], str]]:
    """Starts a server of one answer on the loopback; gives its address."""
    monkeypatch.setattr(http_objective, "_PAUSE", 0.01)
    servers = []

    def start(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer(self, asked)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/score"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def loaded(url: str, keys: str = "", **options):
    return load_objectives([f"a={url}{keys}", "b=world:first"], **options)


PROMPTS, RESPONSES = ["p", "q", "r"], ["Aa", "B", ""]


def test_rewards_come_in_batches_and_null_is_none(serve) -> None:
    seen = []

    def answer(handler, asked):
        seen.append(asked)
        rewards = [len(r) or None for r in asked["responses"]]
        said(handler, json.dumps({"rewards": rewards, "more": 1}).encode())

    objectives = loaded(serve(answer), "?batch=2")
    assert [len(asked["responses"]) for asked in seen] == [1]  # whether it is there
    got = objectives.rewards(PROMPTS, RESPONSES)
    assert got[:2, 0].tolist() == [2, 1] and got[2, 0].isnan() and objectives.partial
    assert seen[1] == {"prompts": ["p", "q"], "responses": ["Aa", "B"], "query": ["pAa", "qB"]}
    assert seen[2] == {"prompts": ["r"], "responses": [""], "query": ["r"]}
    odd = "half \ud83d of a pair, \x00 and \u2028"
    assert loaded(serve(lambda h, a: said(h, lengths(a)))).rewards(["p"], [odd])[0, 0] == len(odd)


@pytest.mark.reliability("fault", "a reward server that fails twice, and is there again")
@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_a_server_that_comes_back_is_asked_again(serve, status: int) -> None:
    calls = []

    def answer(handler, asked):
        calls.append(1)
        if len(calls) % 3:
            said(handler, b"busy", status, Retry_After="0")
        else:
            said(handler, lengths(asked))

    assert loaded(serve(answer)).rewards(PROMPTS, RESPONSES)[:, 0].tolist() == [2, 1, 0]
    assert len(calls) == 6


def closes(handler, asked) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def hangs(handler, asked) -> None:
    time.sleep(5)


def drips(handler, asked) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    for _ in range(60):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def says(body: bytes, status: int = 200, **headers: str) -> Answer:
    return lambda handler, asked: said(handler, body, status, **headers)


@pytest.mark.reliability("message", "reward servers that answer wrongly, in 20 ways, one line each")
@pytest.mark.parametrize(
    ("answer", "keys", "message"),
    [
        (says(b"{}"), "", 'answers without a list "rewards"'),
        (says(b'{"rewards": 1}'), "", 'answers without a list "rewards"'),
        (says(b"[1]"), "", 'answers without a list "rewards"'),
        (says(b'{"rewards": [1, 2]}'), "", "answers with 2 rewards for 1 responses"),
        (says(b'{"rewards": [NaN]}'), "", "no JSON .NaN is no number of JSON"),
        (says(b'{"rewards": [Infinity]}'), "", "Infinity is no number of JSON"),
        (says(b'{"rewards": [1e999]}'), "", "returned inf for row 0"),
        (says(b'{"rewards": ["0.5"]}'), "", "gives '0.5' for row 0; a number is needed, or null"),
        (says(b'{"rewards": [true]}'), "", "gives 'True' for row 0"),
        (says(b'{"rewards": [[1]]}'), "", r"gives '\[1\]' for row 0"),
        (says(b"<html>\x1b[2Jhello"), "", "no JSON .*<html>.*hello"),
        (says(b"[" * 100_000), "", "no JSON"),
        (says(b" " * 3_000_000), "", "more than 1049600 bytes"),
        (says(b"no such path", 404), "", "status 404: 'no such path'"),
        (says(b"", 401), "", "refuses no token .401.*token_env="),
        (says(b"down", 500), "?retries=1", r"status 500: 'down' \(tried 2 times\)"),
        (says(b"", 302, Location="http://127.0.0.1:1/x"), "", "redirect .302. to '127.0.0.1:1'"),
        (says(b"", 307, Location="/elsewhere"), "", "redirect .307. to 'another path'"),
        (closes, "?retries=0", "broke off|cannot be reached"),
        (hangs, "?retries=0&timeout=0.3", "does not answer within 0.3 seconds"),
        (drips, "?retries=0&timeout=0.3", "does not answer within 0.3 seconds"),
    ],
)
def test_what_a_server_does_wrong_is_one_line(serve, answer, keys: str, message: str) -> None:
    url = serve(answer)
    with pytest.raises(ObjectiveError, match=f"objective 'a'.*({message})") as error:
        loaded(url, keys).rewards(["p"], ["r"])
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)


@pytest.mark.reliability("message", "a reward server that is not there, told before models load")
def test_a_server_that_is_not_there_is_told_before_a_model_is_loaded() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    specs = ["model=/no/such/folder", f"a=http://127.0.0.1:{port}/?retries=0"]
    said = rf"'a': http://127\.0\.0\.1:{port}/ cannot be reached .*refused.*\(tried 1 times\)"
    with pytest.raises(ObjectiveError, match=said):
        load_objectives(specs)


@pytest.mark.reliability("lost", "a reward server that hangs in the middle of a run")
def test_a_hanging_server_is_late_as_any_objective(serve) -> None:
    calls = []

    def answer(handler, asked):
        calls.append(1)
        if len(calls) > 1:
            time.sleep(5)
        said(handler, lengths(asked))

    objectives = loaded(serve(answer), timeout=0.4)
    started = time.monotonic()
    with pytest.raises(ObjectiveError, match=r"'a' has not come back within 0\.4 seconds"):
        objectives.rewards(PROMPTS, RESPONSES)
    assert time.monotonic() - started < 3


@pytest.mark.reliability("attack", "a reward server's token: in no message, file or other host")
def test_a_token_comes_from_the_environment_and_stays_there(serve, monkeypatch) -> None:
    secret = "s3cr3t-token"
    monkeypatch.setenv("REWARD_TOKEN", secret)
    seen = []

    def answer(handler, asked):
        seen.append(handler.headers["Authorization"])
        said(handler, lengths(asked))

    loaded(serve(answer), "?token_env=REWARD_TOKEN").rewards(["p"], ["r"])
    assert seen == [f"Bearer {secret}"] * 2
    config = from_dict({"objectives": ["a=http://h/?token_env=REWARD_TOKEN", "b=world:first"]})
    assert isinstance(config, Config) and secret not in json.dumps(to_dict(config))
    echoes = (
        lambda handler, asked: said(handler, handler.headers["Authorization"].encode(), 400),
        lambda handler, asked: said(handler, handler.headers["Authorization"].encode()),
        lambda handler, asked: said(
            handler, json.dumps({"rewards": [handler.headers["Authorization"]]}).encode()
        ),
        says(b"", 401),
        says(b"", 302, Location=f"http://other/{secret}"),
    )
    for echo in echoes:
        with pytest.raises(ObjectiveError) as error:
            loaded(serve(echo), "?token_env=REWARD_TOKEN")
        assert secret not in str(error.value) and "\n" not in str(error.value)
    assert "refuses the token in REWARD_TOKEN (401)" in _message(serve(echoes[3]))
    other = []

    def elsewhere(handler, asked):
        other.append(handler.headers["Authorization"])
        said(handler, lengths(asked))

    target = serve(elsewhere)
    for status in (301, 302, 303, 307, 308):
        with pytest.raises(ObjectiveError, match="redirect"):
            loaded(serve(says(b"", status, Location=target)), "?token_env=REWARD_TOKEN")
    assert not other


def _message(url: str) -> str:
    with pytest.raises(ObjectiveError) as error:
        loaded(url, "?token_env=REWARD_TOKEN")
    return str(error.value)


def test_a_proxy_of_the_environment_is_not_asked_for_the_loopback(serve, monkeypatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    url = serve(lambda handler, asked: said(handler, lengths(asked)))
    assert loaded(url).rewards(["p"], ["rr"])[0, 0] == 2
    with pytest.raises(ObjectiveError, match="cannot be reached"):
        loaded("http://reward.example/", "?retries=0")


@pytest.mark.reliability("message", "addresses and keys of reward servers that are none")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("http://", "is no address"),
        ("http://host:port/", "is no address"),
        ("http://ho st/", "is no address"),
        ("http://host/#x", "is no address"),
        ("http://user:pw@host/", "must hold no password.*token_env"),
        ("http://host/?token=x", "unknown key 'token'; known: token_env, batch"),
        ("http://host/?batch=0", "batch=0 must be 1 to 10000"),
        ("http://host/?retries=-1", "retries=-1 must be 0 to"),
        ("http://host/?timeout=0", "timeout=0 must be positive"),
        ("http://host/?timeout=nan", "timeout=nan must be positive"),
        ("http://host/?batch=many", "batch='many' is not a number"),
        ("http://host/?token_env=NO_SUCH_VARIABLE_X", "the environment has no token there; export"),
    ],
)
def test_addresses_are_checked(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"objective 'a': .*{message}") as error:
        loaded(source)
    assert "\n" not in str(error.value) and "pw" not in str(error.value)


def test_what_runs_code_or_sends_texts_is_known() -> None:
    outside = ("m:f", "a.b:C.m", "http://h/?token_env=X", "https://h/")
    ours = ("packaged:complied", "world:first", "meal_fast.worlds:first", "./folder", "owner/name")
    assert all(map(is_outside, outside)) and not any(map(is_outside, ours))


def test_the_examples_server_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "served_judge.py").write_text(
        "def brevity(prompts, responses):\n"
        "    if 'raise' in responses: raise ValueError('what a response')\n"
        "    return [None if not r else -len(r.split()) / 50 for r in responses]\n"
    )
    monkeypatch.setenv("REWARD_TOKEN", "abc")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "examples/reward_server.py"), "served_judge:brevity",
         "--port", "0", "--token-env", "REWARD_TOKEN"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        objectives = loaded(url, "?token_env=REWARD_TOKEN")
        got = objectives.rewards(PROMPTS, ["a b", "", "one two three four five"])[:, 0]
        assert got[[0, 2]].tolist() == pytest.approx([-0.04, -0.1]) and got[1].isnan()
        with pytest.raises(ObjectiveError, match=r"status 400: .*what a response"):
            objectives.rewards(["p"], ["raise"])
        with pytest.raises(ObjectiveError, match=r"refuses no token \(401\)"):
            loaded(url)
    finally:
        process.terminate()
        process.wait(10)
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()
