"""One call of an objective: on copies, for a limited time, and what it returns as a column.

An objective is somebody's code: it may write into the lists that it is given, hang, raise anything
and return anything.
"""

from __future__ import annotations

import contextlib
import contextvars
import inspect
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

Scorer = Callable[[Sequence[str], Sequence[str]], Any]

ROWS = 256  # that a call may take its seconds for; more rows, more seconds
GRACE = 5.0  # seconds that a call may still take once the run has been told to stop
_LOOK = 0.1  # seconds between looks at whether it has
_LEAVE = 1.0  # seconds that a call given up may still take when the process ends


class ObjectiveError(ValueError):
    """An objective failed while scoring; the message names it, and the row where there is one."""


class Late(ObjectiveError):
    """An objective has not come back in time."""


def never() -> bool:
    """Say that nobody asks for a stop."""
    return False


def column(
    name: str,
    scorer: Scorer,
    prompts: Sequence[str],
    responses: Sequence[str],
    seconds: float = 0.0,
    stopping: Callable[[], bool] = never,
) -> tuple[Tensor, Tensor | None]:
    """Call an objective; give its rewards (R,), float32, and where it gives none (R,), bool.

    None stands for: it gives one to every row. `seconds`: that it may take for each `ROWS` rows,
    in a thread of its own; 0 calls it in this thread, for ever. `stopping`: whether the run is to
    end; a call that is not back `GRACE` seconds later is given up by a KeyboardInterrupt.

    Raises ObjectiveError when the objective raises, returns what are not R numbers or None, or is
    late.
    """

    def rewards() -> tuple[Tensor, Tensor | None]:
        return _as_column(name, scorer(list(prompts), list(responses)), responses)

    try:
        if not seconds:
            return rewards()
        limit = seconds * math.ceil(max(len(responses), 1) / ROWS)
        return _in_time(name, rewards, limit, len(responses), stopping)
    except ObjectiveError:
        raise
    except (Exception, SystemExit) as error:  # a user's function, so anything
        row = _first_failing(name, scorer, prompts, responses, seconds, stopping)
        raise ObjectiveError(
            f"objective {name!r} raised {type(error).__name__}: {error} ({row})"
        ) from error


def short(text: str) -> str:
    """Quote a text, no longer than a message can hold."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _in_time(
    name: str,
    work: Callable[[], tuple[Tensor, Tensor | None]],
    limit: float,
    rows: int,
    stopping: Callable[[], bool],
) -> tuple[Tensor, Tensor | None]:
    """Do `work` in a thread that nobody waits for when the process ends."""
    done = threading.Event()
    made: list[tuple[Tensor, Tensor | None]] = []
    raised: list[BaseException] = []
    gradients, context = torch.is_grad_enabled(), contextvars.copy_context()

    def run() -> None:
        try:
            with torch.set_grad_enabled(gradients):  # each thread has its own switch
                made.append(context.run(work))
        except BaseException as error:  # handed to whoever waits
            raised.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=run, name=f"meal-fast-objective-{name}", daemon=True)
    thread.start()
    end = time.monotonic() + limit
    stop: float | None = None  # when the run was seen to end
    while not done.wait(min(_LOOK, max(end - time.monotonic(), 0.0))):
        now = time.monotonic()
        if stop is None and stopping():
            stop = now
        if stop is not None and now - stop > GRACE:
            _let_go(thread, 130)
            raise KeyboardInterrupt(f"objective {name!r} did not come back within {GRACE:g} s")
        if now >= end:
            _let_go(thread, 2)
            raise Late(
                f"objective {name!r} has not come back within {limit:g} seconds for {rows} "
                "responses; raise objectives_timeout (--objectives_timeout SECONDS; 0: no limit), "
                "or see why it hangs"
            )
    if raised:
        raise raised[0]
    return made[0]


def _let_go(stuck: threading.Thread, code: int) -> None:
    """See to it that the process can end although a call never does.

    The call's own thread is a daemon, but it may have started others that Python waits for at exit,
    such as those of a ThreadPoolExecutor: where it is still there then, the process leaves at once,
    with `code`.
    """

    def leave() -> None:
        stuck.join(_LEAVE)
        if stuck.is_alive():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    # Called before the threads of executors are waited for, which atexit's functions are not.
    with contextlib.suppress(AttributeError, RuntimeError):
        threading._register_atexit(leave)  # type: ignore[attr-defined]


def _first_failing(
    name: str,
    scorer: Scorer,
    prompts: Sequence[str],
    responses: Sequence[str],
    seconds: float,
    stopping: Callable[[], bool],
) -> str:
    """Which row alone makes the objective raise; only called when it has raised."""
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):

        def alone(prompt: str = prompt, response: str = response) -> tuple[Tensor, None]:
            scorer([prompt], [response])
            return torch.zeros(0), None

        try:
            _in_time(name, alone, seconds, 1, stopping) if seconds else alone()
        except Late:
            return f"row {row} alone is late"
        except (Exception, SystemExit):
            return f"row {row}, the response {short(response)}"
    return f"a batch of {len(responses)}, though no row of it alone"


def _as_column(name: str, given: Any, responses: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """What an objective returned, as R rewards and, where it gives none, True."""
    rows = len(responses)
    if isinstance(given, Tensor):
        return _of_shape(name, given.detach().to(torch.float32), rows), None
    if inspect.isawaitable(given):
        if inspect.iscoroutine(given):
            given.close()
        raise ObjectiveError(
            f"objective {name!r} is an async function; give a plain one, which may call "
            "asyncio.run itself"
        )
    if hasattr(given, "__array__"):  # numpy's, and what is like it
        given = given.tolist()
        given = given if isinstance(given, list) else [given] * (rows == 1)
    # Of a set the order is nobody's.
    if isinstance(given, str | bytes | Mapping | Set) or not hasattr(given, "__iter__"):
        raise ObjectiveError(
            f"objective {name!r} returned a {type(given).__name__}; a list of {rows} numbers is "
            "needed, one for each response"
        )
    items = list(given)  # of a generator too
    if items and all(isinstance(item, Sequence) and not isinstance(item, str) for item in items):
        shape = (len(items), len(items[0]))
        raise _shape(name, shape, rows)
    if len(items) != rows:
        raise _shape(name, (len(items),), rows)
    values, none = [], []
    for row, item in enumerate(items):
        none.append(item is None)
        number = isinstance(item, bool | int | float) or (
            hasattr(item, "__float__") and getattr(item, "ndim", 0) == 0
        )
        if not number and item is not None:
            raise ObjectiveError(
                f"objective {name!r} returned {short(str(item))} (a {type(item).__name__}) for row "
                f"{row}, the response {short(responses[row])}; a number is needed, or None where "
                "the objective does not apply"
            )
        values.append(0.0 if item is None else _float(item))
    column = torch.tensor(values, dtype=torch.float64).to(torch.float32)
    return column, torch.tensor(none) if any(none) else None


def _float(number: Any) -> float:
    if isinstance(number, Tensor):
        number = number.detach()
    try:
        return float(number)
    except OverflowError:  # a whole number that no float holds
        return math.inf


def _of_shape(name: str, values: Tensor, rows: int) -> Tensor:
    if values.shape != (rows,):
        raise _shape(name, tuple(values.shape), rows)
    return values


def _shape(name: str, shape: tuple[int, ...], rows: int) -> ObjectiveError:
    return ObjectiveError(
        f"objective {name!r} returned shape {shape} for {rows} responses: one number for each is "
        "needed"
    )
