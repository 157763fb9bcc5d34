"""An objective behind an address: a reward server that is asked by POST, with JSON both ways.

    NAME=http(s)://HOST:PORT/PATH?key=value&key=value

    {"prompts": [...], "responses": [...], "query": [...]}  ->  {"rewards": [number or null, ...]}

`query` are prompt and response in one text, for servers that OpenRLHF asks. The keys are

    token_env  the environment variable that holds a bearer token; the token itself is never written
    batch      rows of a request (64)
    retries    further tries after a connection that failed, or an answer 408, 429 or 5xx (3)
    timeout    seconds that a request may take (60)

Certificates are checked. A redirect is not followed, as it could take texts and token elsewhere.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import math
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from meal_fast.common import printable

from .objective_calls import ObjectiveError
from .reward_specs import query_options

_ANSWER, _ROW = 1 << 20, 1 << 10  # bytes that an answer may have, and for each row beyond
_AGAIN = (408, 429, 500, 502, 503, 504)
_PAUSE, _LONGEST = 0.5, 30.0  # seconds before the second try, doubled each time; at most


@dataclass(frozen=True)
class Server:
    """What a source says of a reward server."""

    url: str
    token_env: str = ""
    batch: int = 64
    retries: int = 3
    timeout: float = 60.0


def parse_server(name: str, source: str, query: str) -> Server:
    """Read a source and its keys. Raises ValueError for a broken address or key."""
    who = f"objective {name!r}"
    try:
        parts = urlsplit(source)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"{who}: {source!r} is no address ({error})") from error
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            f"{who}: an address must hold no password, as it is saved with the run; name the "
            "environment variable of a token: ?token_env=VARIABLE"
        )
    clean = source.isascii() and source.isprintable() and " " not in source
    if not host or not clean or parts.fragment:
        raise ValueError(f"{who}: {source!r} is no address; use http://HOST:PORT/PATH")
    kinds: dict[str, Any] = {"token_env": str, "batch": int, "retries": int, "timeout": float}
    server = replace(Server(source), **query_options(name, query, kinds))
    for key, least in (("batch", 1), ("retries", 0)):
        if not least <= getattr(server, key) <= 10_000:
            raise ValueError(f"{who}: {key}={getattr(server, key)} must be {least} to 10000")
    if not 0 < server.timeout < math.inf:
        raise ValueError(f"{who}: timeout={server.timeout:g} must be positive")
    return server


class HttpObjective:
    """A reward server as an objective. It is asked for one row at once, to see that it is there.

    Raises ValueError for a token's variable that is not set, and ObjectiveError, in one line, for a
    server that cannot be reached, refuses, or answers with anything but its rewards.
    """

    def __init__(self, name: str, server: Server) -> None:
        self.name, self.server = name, server
        self._headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "User-Agent": "meal-fast",
        }
        self._token = ""
        if server.token_env:
            self._token = os.environ.get(server.token_env, "").strip()
            if not self._token or not self._token.isascii() or not self._token.isprintable():
                raise ValueError(
                    f"objective {name!r}: token_env={server.token_env}: the environment has no "
                    f"token there; export {server.token_env}=..., in one line"
                )
            self._headers["Authorization"] = f"Bearer {self._token}"
        local = _is_loopback(urlsplit(server.url).hostname or "")
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({} if local else None),
            urllib.request.HTTPSHandler(context=ssl.create_default_context()),
            _NoRedirect(),
        )
        self(["How are you?"], ["Fine, thank you."])

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float | None]:
        """R rewards, None where the server says null; asked for `batch` rows at a time."""
        rewards: list[float | None] = []
        for first in range(0, len(responses), self.server.batch):
            rows = slice(first, first + self.server.batch)
            rewards += self._asked(prompts[rows], responses[rows])
        return rewards

    def _asked(self, prompts: Sequence[str], responses: Sequence[str]) -> list[float | None]:
        query = [p + r for p, r in zip(prompts, responses, strict=True)]
        asked = {"prompts": list(prompts), "responses": list(responses), "query": query}
        # What a model says may hold half of a pair of surrogates: JSON writes it as an escape.
        body = json.dumps(asked).encode()
        most = _ANSWER + _ROW * len(responses)
        for left in range(self.server.retries, -1, -1):
            try:
                answer = self._post(body, most)
            except _Again as failed:
                if not left:
                    tries = self.server.retries + 1
                    raise self._error(f"{failed} (tried {tries} times)") from failed
                pause = _PAUSE * 2 ** (self.server.retries - left)
                time.sleep(min(max(pause, failed.wait), _LONGEST))
            else:
                return self._rewards(answer, len(responses))
        raise AssertionError("unreachable")

    def _post(self, body: bytes, most: int) -> bytes:
        """One try. Raises _Again for what may be otherwise the next time."""
        request = urllib.request.Request(self.server.url, body, self._headers, method="POST")
        try:
            with self._opener.open(request, timeout=self.server.timeout) as answer:
                return self._whole(answer, most)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from error
        except TimeoutError as error:
            raise _Again(f"does not answer within {self.server.timeout:g} seconds") from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                said = error.reason.verify_message
                raise self._error(f"has a certificate that is not trusted ({said})") from error
            if isinstance(error.reason, TimeoutError):
                said = f"does not answer within {self.server.timeout:g} seconds"
                raise _Again(said) from error
            raise _Again(f"cannot be reached ({error.reason})") from error
        except (OSError, http.client.HTTPException) as error:
            raise _Again(f"broke off ({type(error).__name__}: {error})") from error

    def _whole(self, answer: Any, most: int) -> bytes:
        """Read an answer to its end: of so many bytes at most, in the time of a request."""
        end, found = time.monotonic() + self.server.timeout, b""
        while part := answer.read1(1 << 16):
            found += part
            if len(found) > most:
                raise self._error(f"answers with more than {most} bytes; numbers alone are wanted")
            if time.monotonic() > end:
                raise TimeoutError
        return found

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        code = error.code
        if 300 <= code < 400:
            where = urlsplit(error.headers.get("Location", "")).netloc or "another path"
            return self._error(
                f"answers with a redirect ({code}) to {self._shown(where)}, which is not followed; "
                "name that address"
            )
        if code in (401, 403):
            have = f"the token in {self.server.token_env}" if self._token else "no token"
            return self._error(
                f"refuses {have} ({code}); name the variable that holds the right one with "
                "?token_env="
            )
        try:
            said = self._shown(error.read(500).decode("utf-8", "replace"))
        except (OSError, http.client.HTTPException):
            said = ""
        reason = f"answers with status {code}" + (f": {said}" if said else "")
        if code in _AGAIN:
            after = error.headers.get("Retry-After", "")
            return _Again(reason, float(after) if after.isdecimal() else 0.0)
        return self._error(reason)

    def _rewards(self, answer: bytes, rows: int) -> list[float | None]:
        try:
            found = json.loads(answer, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            said = self._shown(answer[:200].decode("utf-8", "replace"))
            raise self._error(f"answers with what is no JSON ({error}): {said}") from error
        rewards = found.get("rewards") if isinstance(found, dict) else None
        if not isinstance(rewards, list):
            raise self._error('answers without a list "rewards"')
        if len(rewards) != rows:
            raise self._error(f"answers with {len(rewards)} rewards for {rows} responses")
        for row, value in enumerate(rewards):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not number:
                said = self._shown(str(value))
                raise self._error(
                    f"gives {said} for row {row}; a number is needed, or null where the objective "
                    "does not apply"
                )
        return rewards

    def _error(self, what: str) -> ObjectiveError:
        return ObjectiveError(f"objective {self.name!r}: {self.server.url} {what}")

    def _shown(self, text: str) -> str:
        """What a server says, in a line for a terminal; it may have said the token."""
        if self._token:
            text = text.replace(self._token, "***")
        return repr(" ".join(printable(text).split())[:100])


class _Again(Exception):
    """A try that failed, and may be made again after some seconds."""

    def __init__(self, said: str, wait: float = 0.0) -> None:
        super().__init__(said)
        self.wait = wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """Follow none."""
        return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")
