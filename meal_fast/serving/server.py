"""An application on an address of this machine. Importing it needs no torch."""

from __future__ import annotations

import errno
import os
import socket
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path

from meal_fast.config.config import Config
from meal_fast.config.resume import how_to_finish
from meal_fast.config.run_dir import policy_folder

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_reach(host: str, token: str | None) -> None:
    """Raise ValueError where others could ask without a token."""
    if host not in LOOPBACK and token is None:
        raise ValueError(
            f"--host={host!r}: others can reach it; give a --token, or use {LOOPBACK[0]}"
        )
    if token is not None and len(token) < 8:
        raise ValueError("--token: must have at least 8 characters")


def bound(host: str, port: int) -> socket.socket:
    """Take the address. Raises ValueError for one that is in use or is not this machine's."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        taken = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ValueError(f"--host={host!r}: {error}") from None
    try:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        taken.listen(128)
    except (OSError, OverflowError) as error:
        taken.close()
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise ValueError(f"--port={port}: is in use; choose another, or 0 for any") from None
        raise ValueError(f"--host={host!r} --port={port}: {error}") from None
    return taken


def names_of(host: str, port: int) -> frozenset[str] | None:
    """Give what a Host header may say; None: anything, for an address that others reach."""
    if host not in LOOPBACK:
        return None
    names = [f"[{name}]" if ":" in name else name for name in LOOPBACK]
    bare = names if port == 80 else []  # browsers leave that port out
    return frozenset([*(f"{name}:{port}" for name in names), *bare])


def has_screen() -> bool:
    """Tell whether a browser would open a window: one in the terminal would take it over."""
    there = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    return bool(there) or sys.platform in ("darwin", "win32")


def serve(
    run: Path,
    config: Config,
    say: Callable[[str], None],
    *,
    host: str,
    port: int,
    token: str | None,
    slots: int,
    waiting: int,
    max_new_tokens: int,
    browse: bool = False,
) -> None:
    """Answer until it is interrupted. Raises ValueError for an address or a run that is no good.

    browse: open the page in the browser, where there is a screen.
    """
    check_reach(host, token)
    policy_folder(run)  # clear errors, before torch is imported
    taken = bound(host, port)
    with taken:
        port = taken.getsockname()[1]
        say(f"meal-fast: loading {run}")

        import uvicorn

        from .app import application
        from .patience import configured
        from .run import ServedRun
        from .worker import Worker

        served = ServedRun(run, config)
        worker = Worker(served, slots=slots, waiting=waiting)
        hosts = names_of(host, port)
        app = application(served, worker, hosts=hosts, token=token, max_new_tokens=max_new_tokens)
        if served.unfinished:
            more = f"go on with {how_to_finish(run)}"
            say(f"meal-fast: {run} is not finished ({served.unfinished}); {more}")
        shown = f"[{host}]" if ":" in host else host
        say(f"meal-fast: playground at http://{shown}:{port}/, API at http://{shown}:{port}/v1")
        if browse and has_screen():
            webbrowser.open(f"http://{shown}:{port}/")  # the address listens already
        settings = configured(app, log_level="warning", timeout_graceful_shutdown=2)
        uvicorn.Server(settings).run(sockets=[taken])
