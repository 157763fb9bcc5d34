"""Requests of clients that mean harm, or are broken: each answered in a line, and in seconds."""

import json
import socket
import time

import pytest

from tests.serving.conftest import serving, until
from tests.serving.test_api import ASK, ask, httpx

pytest.importorskip("fastapi")
from meal_fast.serving import app as application
from meal_fast.serving import patience

CHAT = "/v1/chat/completions"


def raw(server, data, wait=15.0):
    """What the server says to these bytes until it closes, or has answered."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait) as there:
        there.sendall(data)
        said = b""
        try:
            while b"\r\n\r\n" not in said and (part := there.recv(1 << 16)):
                said += part
        except TimeoutError:
            return "no answer"
    return said.decode(errors="replace")


def head(server, method="POST", path=CHAT, *more, host=None):
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host or f'127.0.0.1:{server.port}'}", *more]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def still_answers(server):
    assert ask(server, max_tokens=2).status_code == 200


DEEP = "[" * 100_000
BODIES = {
    "nested 100,000 deep": ('{"messages": ' + DEEP, "nested too deeply"),
    "a key twice": ('{"model": "base", "model": "base"}', "is there twice"),
    "a number beyond floats": ('{"temperature": 1e999}', "no finite number"),
    "NaN": ('{"temperature": NaN}', "NaN is no finite number"),
    "a whole number of 5,000 digits": ('{"seed": 1' + "0" * 5000 + "}", "not JSON"),
    "a whole number of 400 digits": ('{"temperature": 1' + "0" * 400 + "}", "too large"),
    "a preference of 400 digits": (
        '{"preference": {"first": 1' + "0" * 400 + ', "second": 0}}',
        "between 0 and 1",
    ),
    "half a character": ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "not UTF-8"),
    "a key that is a script": ('{"<script>' + "x" * 9000 + '": 1}', "unknown"),
}


@pytest.mark.reliability("attack", "bodies of requests that are nested, double, beyond any number")
@pytest.mark.parametrize("what", BODIES)
def test_hostile_bodies_are_400_in_a_short_line(server, what):
    body, said = BODIES[what]
    if "messages" not in body:
        body = body[:-1] + ', "messages": ' + json.dumps(ASK) + "}"
    begun = time.monotonic()
    answer = httpx.post(server.url + CHAT, content=body, timeout=30)
    assert answer.status_code == 400 and time.monotonic() - begun < 5
    reason = answer.json()["error"]["message"]
    assert said in reason and "\n" not in reason and len(reason) < 600


@pytest.mark.reliability("attack", "bytes that are not UTF-8 as a request")
def test_bytes_that_are_no_text_are_400(server):
    answer = httpx.post(server.url + CHAT, content=b'{"messages": "\xff\xfe"}')
    assert answer.status_code == 400 and "not UTF-8" in answer.json()["error"]["message"]


@pytest.mark.reliability("attack", "a prompt of 3 MB, and one of just under the limit")
def test_a_long_prompt_is_refused_in_seconds(server):
    begun = time.monotonic()
    long = [{"role": "user", "content": "word " * 600_000}]
    assert ask(server, messages=long).status_code == 413
    fits = [{"role": "user", "content": "word " * 200_000}]
    answer = ask(server, messages=fits)
    assert answer.status_code == 400 and len(answer.text) < 600
    many = [{"role": "user", "content": "a"}] * 20_001
    assert ask(server, messages=many).status_code == 400
    assert time.monotonic() - begun < 30
    still_answers(server)


@pytest.mark.reliability("attack", "another site's page: its Host, its Origin, and none")
@pytest.mark.parametrize(
    "more",
    [
        {"host": "evil.example"},
        {"host": "evil.example:8000"},
        {"host": "127.0.0.1.evil.example"},
        {"host": ""},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://["},
        {"origin": "http://127.0.0.1:1"},
        {"origin": "http://127.0.0.1:{port}@evil.example"},
    ],
    ids=str,
)
@pytest.mark.parametrize("path", ["/", CHAT, "/v1/models", "/v1/rewards"])
def test_pages_of_other_sites_get_nothing(server, more, path):
    origin = more.get("origin", "").format(port=server.port)
    lines = [f"Origin: {origin}"] if origin else []
    method = "GET" if path in ("/", "/v1/models") else "POST"
    host = more.get("host", f"127.0.0.1:{server.port}")
    bare = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n"
    said = raw(server, (bare + "".join(f"{line}\r\n" for line in lines) + "\r\n").encode())
    assert said.startswith(("HTTP/1.1 403", "HTTP/1.1 400")), said


@pytest.mark.reliability("attack", "a body that comes slowly, or never")
def test_a_body_that_does_not_come_is_408(server, monkeypatch):
    monkeypatch.setattr(application, "SLOWEST", 0.5)
    said = raw(server, head(server, "POST", CHAT, "Content-Length: 900") + b'{"mess')
    assert said.startswith("HTTP/1.1 408")
    still_answers(server)


@pytest.mark.reliability("attack", "400 connections that send half a request, or nothing")
def test_connections_that_ask_nothing_are_closed(run, monkeypatch):
    monkeypatch.setattr(patience, "HEAD", 1.0)
    with serving(run.folder) as server:
        open_ = []
        for i in range(400):
            one = socket.create_connection(("127.0.0.1", server.port), timeout=20)
            one.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHo"[: i % 40])
            open_.append(one)
        still_answers(server)

        def closed(one):
            one.setblocking(False)
            try:
                return one.recv(1) == b""
            except BlockingIOError:
                return False
            except ConnectionResetError:
                return True

        until(lambda: all(map(closed, open_)), 20)
        for one in open_:
            one.close()
        still_answers(server)


@pytest.mark.reliability("attack", "requests with wrong lengths, huge headers, other methods")
@pytest.mark.parametrize(
    ("lines", "body", "status"),
    [
        (["Content-Length: -1"], b"", (400,)),
        (["Content-Length: x"], b"", (400,)),
        (["Content-Length: 5", "Content-Length: 6"], b"hello!", (400,)),
        (["Content-Length: 2", "Transfer-Encoding: chunked"], b"0\r\n\r\n", (400,)),
        (["Transfer-Encoding: chunked"], b"zz\r\n", (400,)),
        (["X: " + "x" * 200_000], b"", (400, 431)),
        ([f"X{i}: y" for i in range(20_000)], b"", (400, 431)),
        (["Content-Length: 99999999999999999999"], b"{}", (408, 413, 400)),
    ],
    ids=lambda x: x[0][:24] if isinstance(x, list) else None,
)
def test_broken_heads_are_refused(server, lines, body, status, monkeypatch):
    monkeypatch.setattr(application, "SLOWEST", 0.5)
    said = raw(server, head(server, "POST", CHAT, *lines) + body)
    assert any(said.startswith(f"HTTP/1.1 {s}") for s in status), said[:200]
    still_answers(server)


@pytest.mark.reliability("attack", "paths that lead out of the page's folder")
@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/playground.js/../../run.py",
        "/style.css%00.html",
        "/run.py",
        "/.",
        "/\\..\\..\\x",
    ],
)
def test_no_other_file_is_served(server, path):
    said = raw(server, head(server, "GET", path))
    assert said.startswith(("HTTP/1.1 404", "HTTP/1.1 400", "HTTP/1.1 307")), said[:200]


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "X"])
def test_other_methods_are_refused(server, method):
    assert raw(server, head(server, method, CHAT)).startswith(("HTTP/1.1 405", "HTTP/1.1 404"))


@pytest.mark.reliability("attack", "more requests for rewards than a thread can answer")
def test_rewards_have_a_line_with_an_end(server, monkeypatch):
    body = {"prompt": "Write a word.", "answers": ["a"]}
    url = f"{server.url}/v1/rewards"
    assert httpx.post(url, json=body, timeout=30).status_code == 200
    monkeypatch.setattr(application, "MOST_SCORED", 0)
    assert httpx.post(url, json=body).status_code == 429
    assert server.served.rewards.waiting == 0
    half = '{"prompt": "\\ud800", "answers": ["a"]}'
    assert httpx.post(url, content=half).status_code == 400
