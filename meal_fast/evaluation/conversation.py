"""A conversation with a run, line by line: what a person types, and what stands on the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from io import TextIOWrapper
from typing import TextIO

from meal_fast.common import printable, tell

from .session import Answer, Asked, Session, Turn, shown

HELP = """\
/w NAME=VALUE,…   changes the preference; /w alone says what it is
/new              forgets the conversation
/help             says this
/quit, Ctrl-D     ends; Ctrl-C ends an answer
The policy was trained on single turns: what it says after the first is less sure to follow w."""


def talk(session: Session, lines: Iterator[str], w: Asked) -> None:
    """Answer each line on standard output, as it is generated; say why one cannot be answered.

    What was said before is part of what is asked, until `/new`.
    """
    turns: list[Turn] = []
    for number, line in enumerate(lines):
        text = line.strip()
        if not text:
            continue
        try:
            if text == "/quit":
                return
            command, _, rest = text.partition(" ")
            if command == "/w":
                w = session.parse(rest.strip()) if rest.strip() else w
                now = "now " if rest.strip() else ""
                session.say(f"w is {now}{shown(w, session.config.names)}")
            elif text == "/new":
                turns = []
                session.say("the conversation is forgotten")
            elif text == "/help":
                session.say(HELP)
            elif text.startswith("/"):
                raise ValueError(f"{command!r}: unknown; there are /w, /new, /help and /quit")
            else:
                answer = spoken(session, text, w, number, turns)
                if answer.finish == "cancelled" and not sys.stdin.isatty():
                    sys.exit(130)
                turns.append((text, answer.text))
        except ValueError as error:
            session.say(f"meal-fast: {error}")


def spoken(
    session: Session, text: str, w: Asked, number: int, turns: Sequence[Turn] = ()
) -> Answer:
    """Write one answer to standard output as it is generated, and say where it was cut."""
    write = writer(sys.stdout)
    answer = session.answer(text, w, number, turns, heard=write)
    write("\n")
    if answer.finish == "length":
        session.say(
            f"[…] cut at {answer.tokens} tokens; "
            + ("the model's context is full" if answer.full else "--max-new-tokens takes more")
        )
    elif answer.finish == "cancelled":
        session.say("[…] stopped")
    return answer


def writer(out: TextIO) -> Callable[[str], None]:
    """Write pieces of an answer at once; to a terminal no control character of them."""
    clean = printable if out.isatty() else str

    def write(piece: str) -> None:
        out.write(clean(piece))
        out.flush()

    return write


def prompted_lines(w: Asked, names: Sequence[str]) -> Iterator[str]:
    """Give lines of standard input; a person at a terminal gets a prompt sign and line editing."""
    if isinstance(sys.stdin, TextIOWrapper):  # a line that is not UTF-8 is told, and the next read
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401  (gives input() history and editing)

    tell(f"w is {shown(w, names)}; /w changes it, /help says more")
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
