"""Connections that ask for nothing are closed: uvicorn waits for a request's head for ever."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD = 10.0  # seconds that a connection may be open, or idle, without a whole head of a request
CONNECTIONS = 512  # open at a time; beyond them a request is answered with 503


def configured(app: Any, **more: Any) -> uvicorn.Config:
    """Give uvicorn's settings for an application that strangers may reach."""
    return uvicorn.Config(
        app, http=Patient, ws="none", server_header=False, limit_concurrency=CONNECTIONS, **more
    )


class Patient(H11Protocol):
    """HTTP/1.1 whose connections end where no request is under way, or comes in time."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._asked:
            self._stop()
        elif self._late is None:
            self._watch()

    @property
    def _asked(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch(self) -> None:
        self._late = self.loop.call_later(HEAD, self._too_late)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _too_late(self) -> None:
        self._late = None
        if not self._asked and not self.transport.is_closing():
            self.transport.close()
