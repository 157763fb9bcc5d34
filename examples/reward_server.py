"""A reward server for any Python objective: the other end of `NAME=http://HOST:PORT/`.

    PYTHONPATH=. python examples/reward_server.py my_module:brevity --port 8800
    meal-fast train steering --objectives "short=http://127.0.0.1:8800/" ...

It answers POST {"prompts": [...], "responses": [...]} with {"rewards": [number or null, ...]}. With
--token-env VARIABLE it answers to those alone who send what that variable holds as a bearer token.
From the standard library alone; one call of the function at a time.
"""

import argparse
import hmac
import importlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Function = Callable[[Sequence[str], Sequence[str]], Any]
MOST = 64 << 20  # bytes of a request


def loaded(source: str) -> Function:
    """Import `module:function`."""
    module, _, name = source.partition(":")
    function: Function = getattr(importlib.import_module(module), name)
    return function


def rewards(function: Function, asked: Any) -> list[float | None]:
    """Score what a request asks. Raises ValueError for anything else than two lists of texts."""
    if not isinstance(asked, dict):
        raise ValueError("give a JSON object with prompts and responses")
    prompts, responses = asked.get("prompts"), asked.get("responses")
    for texts in (prompts, responses):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError("prompts and responses must be lists of texts")
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts, but {len(responses)} responses")
    return [None if x is None else float(x) for x in function(prompts, responses)]


def serve(function: Function, host: str, port: int, token: str = "") -> ThreadingHTTPServer:
    """Give a server that listens; `serve_forever` answers."""
    one_at_a_time = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        timeout = 60

        def do_POST(self) -> None:
            given = self.headers.get("Authorization", "")
            if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                return self.answer(401, {"error": "a bearer token is needed"})
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > MOST:
                return self.answer(413, {"error": f"give a Content-Length of at most {MOST}"})
            try:
                asked = json.loads(self.rfile.read(int(length)))
                with one_at_a_time:
                    self.answer(200, {"rewards": rewards(function, asked)})
            except (ValueError, TypeError, RecursionError) as error:
                self.answer(400, {"error": str(error)})

        def answer(self, status: int, said: dict[str, Any]) -> None:
            body = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return ThreadingHTTPServer((host, port), Handler)


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="module:function")
    parser.add_argument("--host", default="127.0.0.1", help="where it listens")
    parser.add_argument("--port", type=int, default=8800, help="0 takes a free one")
    parser.add_argument("--token-env", default="", help="the variable that holds the token")
    args = parser.parse_args()
    token = os.environ[args.token_env] if args.token_env else ""
    server = serve(loaded(args.source), args.host, args.port, token)
    print(f"http://{args.host}:{server.server_port}/", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
