"""What a user did wrong, in one line on stderr and exit code 2. Imports no torch."""

from __future__ import annotations

import difflib
import errno
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

# What a module's package is called, where it is not the module's name.
PACKAGES = {"yaml": "PyYAML"}


def fail(message: object) -> NoReturn:
    """Print one line, `meal-fast: error: message`, on stderr and leave with exit code 2."""
    print("meal-fast: error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def one_line_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Wrap a `main` so that its ValueError, which the user caused, is one line and exit code 2.

    So are a package that is not installed, and a file that cannot be read or written. Ctrl-C is
    one line and exit code 130. With MEAL_FAST_TRACEBACK set in the environment the traceback is
    kept.
    """

    @functools.wraps(main)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            main(*args, **kwargs)
        except ValueError as error:
            if os.environ.get("MEAL_FAST_TRACEBACK"):
                raise
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
