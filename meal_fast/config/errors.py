"""What a user did wrong, in one line on stderr and exit code 2. Imports no torch."""

from __future__ import annotations

import difflib
import errno
import functools
import importlib.util
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from meal_fast.common import printable

# What a module's package is called, where it is not the module's name.
PACKAGES = {"yaml": "PyYAML"}
_PACKAGE = str(Path(__file__).parents[1]) + os.sep
LONGEST = 4000  # characters of an error's line


class ProcessLost(RuntimeError):
    """Another process of the run has ended, or did not answer in time."""


class GivenUp(RuntimeError):
    """A stop was asked for, and the meta-step would not have ended in time."""


def fail(message: object) -> NoReturn:
    """Print one line, `meal-fast: error: message`, on stderr and leave with exit code 2.

    What a message repeats of a file may be anything: no control character of it is printed, and of
    a very long one the beginning and the end.
    """
    line = printable(" ".join(str(message).split()))
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} […] {line[-LONGEST // 2 :]}"
    print("meal-fast: error:", line, file=sys.stderr)
    raise SystemExit(2)


def said_elsewhere() -> NoReturn:
    """Leave with exit code 2, and let the main process say first what it has as well.

    A launcher ends all processes as soon as one has left so.
    """
    time.sleep(1.0)
    raise SystemExit(2)


class _Record(logging.LogRecord):
    """A record whose message, and traceback, is harmless to a terminal."""

    def getMessage(self) -> str:
        return printable(super().getMessage())


def _record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record = _Record(*args, **kwargs)
    if record.exc_info:
        record.exc_text = printable(logging.Formatter().formatException(record.exc_info))
    return record


@contextmanager
def _harmless_logs() -> Iterator[None]:
    records, written = logging.getLogRecordFactory(), warnings.formatwarning

    def plain(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        """Write a warning of ours in one line, without the place that it comes from."""
        if category is UserWarning and filename.startswith(_PACKAGE):
            return f"meal-fast: {printable(' '.join(str(message).split()))}\n"
        return printable(written(message, category, filename, lineno, line))

    logging.setLogRecordFactory(_record)
    warnings.formatwarning = plain
    try:
        yield
    finally:
        logging.setLogRecordFactory(records)
        if warnings.formatwarning is plain:
            warnings.formatwarning = written


def one_line_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a `main` so that its ValueError, which the user caused, is one line and exit code 2.

    So are a package that is not installed, and a file that cannot be read or written. Ctrl-C is
    one line and exit code 130. What is logged and warned of meanwhile, which repeats names of files
    and of what is in them, has no control characters. With MEAL_FAST_TRACEBACK set in the
    environment the traceback is kept.
    """

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            with _harmless_logs():
                main(*args, **kwargs)
        except ValueError as error:
            if os.environ.get("MEAL_FAST_TRACEBACK"):
                raise
            if getattr(error, "agreed", False) and os.environ.get("RANK", "0") != "0":
                said_elsewhere()
            fail(error)
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package in ("", "meal_fast") or os.environ.get("MEAL_FAST_TRACEBACK"):
                raise
            fail(f"{package} is not installed: pip install {PACKAGES.get(package, package)}")
        except KeyboardInterrupt:
            if os.environ.get("MEAL_FAST_TRACEBACK"):
                raise
            print("meal-fast: stopped", file=sys.stderr)
            raise SystemExit(130) from None
        except OSError as error:
            if os.environ.get("MEAL_FAST_TRACEBACK"):
                raise
            fail(of_file(error))

    return wrapped


def of_file(error: OSError) -> str:
    """Say what could not be done with which file."""
    what = error.strerror or str(error) or type(error).__name__
    if error.errno == errno.ENOSPC:
        what += "; make room, then go on"
    return what if error.filename is None else f"{str(error.filename)!r}: {what}"


def require_packages(what: str, *names: str, then: str) -> None:
    """Raise ValueError where a package that `what` needs is not installed.

    Called before anything is computed that would be lost. `then`: the command that goes on.
    """
    for name in names:
        try:
            there = importlib.util.find_spec(name) is not None
        except ValueError:  # what was imported as something without a specification
            there = False
        if not there:
            package = PACKAGES.get(name, name)
            raise ValueError(
                f"{name} is not installed, and {what} needs it: pip install {package}, then {then}"
            )


def known(what: str, name: str, names: Iterable[str], more: str = "") -> None:
    """Raise ValueError, with the nearest of `names`, where `name` is none of them."""
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{what}={name!r}: unknown{hint} ({what}s: {', '.join(names)}{more})")


def nearest(name: str, known: Sequence[str]) -> str:
    """Give the end of a message: which of `known` was meant, or where to look."""
    # People leave the section out more often than they misspell: --steps is --meta.steps.
    last = name.lstrip("-").rpartition(".")[2].replace("-", "_")
    same = [k for k in known if k.lstrip("-").rpartition(".")[2] == last]
    near = same or difflib.get_close_matches(name.replace("-", "_"), known, n=1, cutoff=0.6)
    near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {' or '.join(near)}?" if near else "; see --help"
