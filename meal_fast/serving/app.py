"""The web application: the playground's files, OpenAI's paths, and who may ask."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect

from meal_fast.common import parse_json, require_text

from .openai_format import BASE, Asked, Completion, Refused, StopCut, parse
from .run import ServedRun
from .worker import Asked as Part
from .worker import Piece, QueueFull, Worker

TEMPLATES = Path(__file__).with_name("templates")
FILES = {"/": "playground.html", "/playground.js": "playground.js", "/style.css": "style.css"}
MOST_BYTES = 1 << 20  # of a request
SLOWEST = 20.0  # seconds that its body may take to come
MOST_SCORED = 32  # requests for rewards that may wait
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
SAFE = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def application(
    run: ServedRun,
    worker: Worker,
    *,
    hosts: frozenset[str] | None,  # as a Host header may name it; None: any, there is a token
    token: str | None = None,
    max_new_tokens: int = 256,
) -> FastAPI:
    """Make the application. It closes the worker when it is shut down."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        worker.close()
        run.rewards.close()

    app = FastAPI(title="meal-fast", docs_url=None, redoc_url=None, openapi_url=None,
                  lifespan=lifespan)  # fmt: skip
    started = int(time.time())

    @app.middleware("http")
    async def guard(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        try:
            _check_origin(request, hosts)
            if request.url.path not in FILES:
                _check_token(request, token)
            response = await answer(request)
        except Refused as refused:
            response = _error(refused)
        response.headers.update(SAFE)
        return response

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return _error(error)

    for path, file in FILES.items():
        app.add_api_route(path, _file(file), methods=["GET"])

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        about = {
            "objectives": list(run.names),
            "auto": run.net is not None,
            "unfinished": run.unfinished,
            "turns": "trained on single turns: earlier ones are shown to it, untrained",
            "rewards": run.rewards.ranges,
            "temperature": run.config.rollout.temperature,
            "max_tokens": max_new_tokens,
        }
        common = {"object": "model", "created": started, "owned_by": "meal-fast"}
        return {
            "object": "list",
            "data": [{"id": run.name} | common | {"meal_fast": about}, {"id": BASE} | common],
        }

    @app.post("/v1/chat/completions")
    async def completions(request: Request) -> Response:
        body = await _json(request)
        asked = parse(body, run, max_new_tokens=max_new_tokens, most=worker.most)
        answer = Answer(asked, run, worker)
        await answer.begin(request.is_disconnected)
        if asked.stream:
            return Events(answer)
        return JSONResponse(await answer.whole(request))

    @app.post("/v1/rewards")
    async def rewards(request: Request) -> Response:
        body = await _json(request)
        known: dict[str, Any] = body if isinstance(body, dict) else {}
        prompt, answers = known.get("prompt"), known.get("answers")
        good = isinstance(answers, list) and all(isinstance(a, str) for a in answers)
        if not (isinstance(prompt, str) and good and isinstance(answers, list)) or not (
            1 <= len(answers) <= 64
        ):
            raise Refused(400, "give a prompt and a list of 1 to 64 answers, all texts")
        try:
            for text in (prompt, *answers):
                require_text(text, "prompt and answers")
        except ValueError as error:
            raise Refused(400, str(error)) from None
        if run.rewards.waiting >= MOST_SCORED:
            raise Refused(429, f"{MOST_SCORED} requests for rewards are waiting; ask again later")
        try:
            scores = await asyncio.wrap_future(run.rewards.score(prompt, answers))
        except ValueError as error:
            raise Refused(503, str(error)) from None
        rows = [dict(zip(run.names, row, strict=True)) for row in scores]
        return JSONResponse({"rewards": rows})

    return app


class Answer:
    """One request on its way through the worker, as its pieces come back."""

    def __init__(self, asked: Asked, run: ServedRun, worker: Worker) -> None:
        self.asked, self.worker = asked, worker
        self.said = Completion(asked, run.names)
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(piece: Piece) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        n = asked.samples
        self._parts = [
            Part(request, asked.sampling, asked.base, w is None and not asked.base, i * n, tell)
            for i, (request, w) in enumerate(zip(asked.requests(), asked.preferences, strict=True))
        ]
        self._left = n * len(self._parts)
        self._cut = [StopCut(asked.sampling.stop) for _ in range(self._left)]
        self._prompt_tokens, self._tokens = 0, [0] * self._left
        self._first: Piece

    async def begin(self, gone: Callable[[], Awaitable[bool]]) -> None:
        """Wait until it is taken up, so that what is wrong with it has a status of its own.

        `gone`: whether the client is, which then loses its place in the line.
        """
        try:
            self.worker.submit(self._parts)
        except QueueFull as full:
            raise Refused(429, f"{full}; ask again later") from None
        try:
            self._first = await self._next(gone)
        except BaseException:
            self.cancel()
            raise

    async def _next(self, gone: Callable[[], Awaitable[bool]] | None) -> Piece:
        """Give the next piece. Raises Refused for an error, and where the client is gone."""
        while True:
            try:
                piece = await asyncio.wait_for(self._pieces.get(), 1.0 if gone else None)
                break
            except TimeoutError:
                if gone and await gone():
                    raise Refused(499, "the client has gone") from None
        if piece.error:
            raise Refused(500 if piece.fault else 400, piece.error)
        return piece

    def cancel(self) -> None:
        """Give back its slots."""
        self.worker.cancel(self._parts)

    async def pieces(
        self, gone: Callable[[], Awaitable[bool]] | None = None
    ) -> AsyncIterator[Piece]:
        """Give its pieces to the end, texts cut at the stop; its slots are free afterwards."""
        piece = self._first
        try:
            while True:
                self._prompt_tokens += piece.prompt_tokens
                self._tokens[piece.choice] = max(self._tokens[piece.choice], piece.tokens)
                text = self._cut[piece.choice].more(piece.text, bool(piece.finish))
                self._left -= bool(piece.finish)
                yield Piece(piece.choice, text, piece.finish, prompt_tokens=piece.prompt_tokens,
                            w=piece.w)  # fmt: skip
                if not self._left:
                    return
                piece = await self._next(gone)
        finally:
            self.cancel()

    async def events(self) -> AsyncIterator[str]:
        """Give the events of a stream."""
        try:
            async for piece in self.pieces():
                if piece.prompt_tokens:
                    more = {"preference": self.said.preference(piece.w)}
                    role = {"role": "assistant", "content": ""}
                    yield _event(self.said.chunk(piece.choice, role, more=more))
                if piece.text:
                    yield _event(self.said.chunk(piece.choice, {"content": piece.text}))
                if piece.finish:
                    yield _event(self.said.chunk(piece.choice, {}, piece.finish))
        except Refused as refused:  # it has begun: the status is sent
            yield _event(refused.body())
            return
        if self.asked.usage_at_end:
            yield _event(self.said.usage_chunk(self.usage))
        yield "data: [DONE]\n\n"

    async def whole(self, request: Request) -> dict[str, Any]:
        """Wait for all of it; a client that goes meanwhile is waited for no longer."""
        texts, ends = [""] * self._left, [""] * self._left
        preferences: list[Any] = [None] * self._left
        async for piece in self.pieces(request.is_disconnected):
            texts[piece.choice] += piece.text
            ends[piece.choice] = piece.finish
            if piece.prompt_tokens:
                preferences[piece.choice] = self.said.preference(piece.w)
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": end,
                "preference": preference,
            }
            for i, (text, end, preference) in enumerate(zip(texts, ends, preferences, strict=True))
        ]
        return self.said.whole(choices, self.usage)

    @property
    def usage(self) -> dict[str, int]:
        """Tokens; a prompt counts once for each preference, as its samples share it."""
        prompt = self._prompt_tokens // self.asked.samples
        sampled = sum(self._tokens)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": sampled,
            "total_tokens": prompt + sampled,
        }


class Events(StreamingResponse):
    """An answer as it is written; a client that goes, at whatever point, frees its slots."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.events(), media_type="text/event-stream")
        self._answer = answer

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()


def _check_origin(request: Request, hosts: frozenset[str] | None) -> None:
    """Refuse what another site's page asks for: under a name of its own, or from its origin."""
    host = request.headers.get("host", "").lower()
    if hosts is not None and host not in hosts:
        raise Refused(403, f"Host {host!r}: this server answers to {', '.join(sorted(hosts))}")
    origin = request.headers.get("origin")
    if origin is not None and _site(origin) != host:
        raise Refused(403, f"Origin {origin!r}: pages of other sites may not ask")


def _site(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _check_token(request: Request, token: str | None) -> None:
    if token is None:
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), token.encode()):
        raise Refused(401, "the token is missing or wrong; send it as `Authorization: Bearer …`")


async def _json(request: Request) -> Any:
    parts, length = [], 0
    try:
        async with asyncio.timeout(SLOWEST):
            async for part in request.stream():
                length += len(part)
                if length > MOST_BYTES:
                    raise Refused(413, f"the body is longer than {MOST_BYTES} bytes")
                parts.append(part)
    except TimeoutError:
        raise Refused(408, f"the body took longer than {SLOWEST:g} s") from None
    except ClientDisconnect:
        raise Refused(499, "the client has gone") from None
    try:
        return parse_json(b"".join(parts))
    except ValueError as error:
        raise Refused(400, f"the body is not JSON ({error})") from None


def _error(refused: Refused) -> JSONResponse:
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}
    return JSONResponse(refused.body(), refused.status, headers.get(refused.status))


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"


def _file(name: str) -> Callable[[], Awaitable[Response]]:
    async def file() -> Response:
        return FileResponse(TEMPLATES / name)

    return file
