"""What every room needs, from the standard library alone: checks, whole files, the cache, quiet."""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
import sys
import textwrap
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def require(ok: bool, name: str, value: object, remedy: str) -> None:
    """Raise the one-line ValueError of this package unless `ok`."""
    if not ok:
        raise ValueError(f"{name}={value!r}: {remedy}")


def off_simplex(w: Sequence[float], names: Sequence[str]) -> str | None:
    """Say why `w` is no preference over the objectives `names`; None where it is one.

    One is K finite numbers, none negative, whose sum is 1 to 1e-6.
    """
    if len(w) != len(names):
        return f"{len(w)} numbers for {len(names)} objectives"
    for name, value in zip(names, w, strict=True):
        if not math.isfinite(value):
            return f"{name} is {value}"
        if value < 0:
            return f"{name} is negative"
    total = math.fsum(w)
    return f"sums to {total:g}" if abs(total - 1) > 1e-6 else None


def require_simplex(w: Sequence[float], names: Sequence[str]) -> None:
    """Raise ValueError unless `w` is a preference over the objectives `names`."""
    reason = off_simplex(w, names)
    remedy = f"must be {len(names)} numbers, none negative, summing to 1; {reason}"
    require(reason is None, "w", tuple(w), remedy)


# What writes from right to left, or turns that off: it can make a line read as another one.
_BIDIRECTIONAL = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
)
_UNSEEN = "\ufffd"


def printable(text: str) -> str:
    """Make a text that a model wrote harmless to a terminal: newlines and tabs stay as they are.

    Any other control character is shown as U+FFFD, so that no escape sequence is one any more.
    """
    return "".join(
        c
        if c in "\n\t" or not (unicodedata.category(c) in ("Cc", "Cs") or c in _BIDIRECTIONAL)
        else _UNSEEN
        for c in text.replace("\r\n", "\n")
    )


def tell(*lines: object) -> None:
    """Print lines on stderr, at once, with no control character of what they repeat."""
    print(*(printable(str(line)) for line in lines), sep="\n", file=sys.stderr, flush=True)


def say(*lines: object) -> None:
    """Print lines on standard output; to a terminal with no control character in them.

    Elsewhere as they are: what reads a path from there must get that path.
    """
    clean = printable if sys.stdout.isatty() else str
    print(*(clean(str(line)) for line in lines), sep="\n", flush=True)


def folded(sentence: str) -> str:
    """Break a sentence between its words where a terminal's line ends; elsewhere it is one line."""
    if not sys.stdout.isatty():
        return sentence
    return textwrap.fill(
        sentence,
        max(shutil.get_terminal_size().columns, 20),
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def parse_json(text: str | bytes, *, strict: bool = True) -> Any:
    """Read JSON that anyone may have written. Raises ValueError, in a line, for what is none.

    UTF-8, to any depth that Python can follow; strict: no key twice, no NaN, no number too large
    for a float, which other readers would see otherwise or not at all.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {twice[:80]!r} is there twice")
        return table

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            raise ValueError(f"{number[:80]} is no finite number")
        return value

    kinds: dict[str, Any] = {}
    if strict:
        kinds = {"object_pairs_hook": once, "parse_float": finite, "parse_constant": finite}
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text, **kinds)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text: {error.reason} at byte {error.start}") from None


@contextmanager
def opening(what: str, remedy: str = "") -> Iterator[None]:
    """Make one ValueError, `what` and `remedy` in it, of whatever a library says of a file.

    For what others may have made: its reader may raise anything, and not all of it is documented.
    """
    try:
        yield
    except Exception as error:  # any reader's own kinds; tokenizers raises Exception itself
        said = " ".join(str(error).split()) or "no reason given"
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        more = f"; {remedy}" if remedy else ""
        raise ValueError(f"{what} cannot be read ({kind}{said[:300]}){more}") from error


def require_text(text: str, name: str) -> None:
    """Raise ValueError for half characters: what was no UTF-8 in a file, a line or a request."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: is not UTF-8 text (character {error.start})") from None


def first_line(error: BaseException, most: int = 200) -> str:
    """Give an error's class and the first line of what it says, for a message of one line."""
    said = next((x.strip() for x in str(error).splitlines() if x.strip()), "")
    line = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return line if len(line) <= most else line[: most - 1] + "…"


@contextmanager
def replacing(path: Path) -> Iterator[Any]:
    """Open a file that takes `path`'s place when it is whole and on the disk, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # of a killed process; or a link, which would lead elsewhere
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:  # of a failure: on a full disk its remains are in the way
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file that is whole or not there; text in UTF-8."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def cache_folder() -> Path:
    """Give `$MEAL_FAST_CACHE`, or meal-fast in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    if given := os.environ.get("MEAL_FAST_CACHE"):
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "meal-fast"


def as_umask_says(folder: Path, without: int = 0) -> int:
    """Give all files below a new folder the mode that a new file has, and give that mode.

    Some libraries write files that only their owner reads, whatever the umask says. without: bits
    that no file has.
    """
    probe = folder / ".mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode) & ~without
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_dir():
            path.chmod(mode | (mode & 0o444) >> 2)
        elif not path.is_symlink():
            path.chmod(mode)
    return mode


def own_folder(folder: Path) -> Path:
    """Make a folder that is nobody else's, where there is none, and hold it to that: see `own`."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"MEAL_FAST_CACHE: {str(folder)!r} cannot be made ({error.strerror}); name a folder "
            "that can be written"
        ) from None
    own(folder)
    return folder


def own(path: Path) -> None:
    """Raise ValueError where another user could have written `path`, or could put another there.

    It and all above it must be this user's, or root's, and writable by nobody else; of those above
    it one with a sticky bit, as /tmp has, may be: what is in it is safe from others.
    """
    if os.name != "posix":
        return
    real = path.resolve()
    for place in (real, *real.parents):
        found = place.stat()
        shared = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if shared and place != real and found.st_mode & stat.S_ISVTX:
            shared = 0
        if found.st_uid not in (0, os.getuid()) or shared:
            whose = "may be written by others" if shared else f"is of user {found.st_uid}"
            raise ValueError(
                f"{str(path)!r} is not trusted: {str(place)!r} {whose}; "
                + (f"chmod -R go-w {str(place)!r}, or " if shared else "")
                + "name a folder of your own, MEAL_FAST_CACHE=FOLDER"
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Run without bars for weights read and written; downloads, which take long, keep theirs.

    Nor the deprecation that peft meets in transformers: nobody here can act on it.
    """
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if shown:
        logging.disable_progress_bar()
        enable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
