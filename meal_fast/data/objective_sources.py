"""A Python objective by its name, `module:function`, and what is meant by a name that is none."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any


def imported(name: str, source: str) -> Any:
    """Import `module:function`, or `module:Class.method`.

    Raises ValueError, in one line, for a module that cannot be imported, whatever it raises, and
    for what cannot be called as (prompts, responses).
    """
    module_name, _, attribute = source.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        top = module_name.partition(".")[0]
        if error.name not in (module_name, top):  # the module is there, and imports what is not
            raise ValueError(
                f"objective {name!r}: {source!r} cannot be imported ({error}); install what it "
                "needs"
            ) from error
        raise ValueError(
            f"objective {name!r}: {source!r} cannot be imported ({error}); put its folder on the "
            "path, as in PYTHONPATH=. meal-fast"
        ) from error
    except (Exception, SystemExit) as error:  # a user's module, so anything
        raise ValueError(
            f"objective {name!r}: {source!r} cannot be imported: {_said(error)}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = [n for n in dir(found) if n.lower() == part.lower()]
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"objective {name!r}: {source!r} cannot be imported ({module_name} has no "
                f"{attribute}{hint})"
            )
        found = getattr(found, part)
    what = "an objective is called with (prompts, responses), and returns their rewards"
    if isinstance(found, type):
        raise ValueError(
            f"objective {name!r}: {source!r} is a class; name a method that needs no instance, as "
            f"in {source}.METHOD; {what}"
        )
    if not callable(found):
        raise ValueError(
            f"objective {name!r}: {source!r} is not a function but a {type(found).__name__}; {what}"
        )
    if inspect.iscoroutinefunction(found):
        raise ValueError(
            f"objective {name!r}: {source!r} is an async function; give a plain one, which may "
            "call asyncio.run itself"
        )
    try:
        inspect.signature(found).bind([], [])
    except TypeError as error:
        raise ValueError(
            f"objective {name!r}: {source!r} takes {inspect.signature(found)}; {what}"
        ) from error
    except ValueError:  # of a function in C, which does not say
        pass
    return found


def check_no_function(name: str, source: str) -> None:
    """Raise ValueError for a source that was meant as a Python function; models are no such."""
    path, colon, function = source.rpartition(":")
    if colon and path.endswith(".py") and "://" not in source:
        file = Path(path)
        at = f"PYTHONPATH={file.parent} meal-fast ... {name}={file.stem}:{function}"
        raise ValueError(f"objective {name!r}: {source!r} names a file; name its module: {at}")
    if source.endswith(".py"):
        raise ValueError(
            f"objective {name!r}: {source!r} names a file; name a module and a function, as in "
            f"PYTHONPATH={Path(source).parent} meal-fast ... {name}={Path(source).stem}:FUNCTION"
        )
    if colon and "://" not in source and not Path(source).exists():
        raise ValueError(
            f"objective {name!r}: {source!r} is no source; a Python function is module:function"
        )
    module, dot, attribute = source.rpartition(".")
    dotted = re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", source)
    if dot and dotted and not Path(source).exists() and _there(module.partition(".")[0]):
        raise ValueError(
            f"objective {name!r}: {source!r} is no source; did you mean {module}:{attribute}?"
        )


def _there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _said(error: BaseException) -> str:
    """Name an error and, of one in the module's text, its line."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg}, {error.filename}, line {error.lineno}"
    frames = inspect.getinnerframes(error.__traceback__) if error.__traceback__ else []
    at = f", {frames[-1].filename}, line {frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{at}"
