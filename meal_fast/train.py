"""Train a steerable policy, evaluate it, and write its report.

    python -m meal_fast.train                       the quickstart preset, into runs/quickstart
    python -m meal_fast.train hh-qwen2 --out runs/hh --recipe grid-grpo --grpo.beta 0.6
    python -m meal_fast.train --resume --out runs/hh

Ctrl-C finishes the meta-step, saves and leaves (exit code 130); a second one leaves at once, and
the last checkpoint stays good.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stderr, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from meal_fast.common import say, tell
from meal_fast.config.cli import TrainArgs, fail, one_line_errors, parse_train, require_packages
from meal_fast.config.config import Config, to_dict
from meal_fast.config.errors import GivenUp, ProcessLost, said_elsewhere
from meal_fast.config.mesh import Layout, layout, world_of
from meal_fast.config.plan import run_plan, whole_plan
from meal_fast.config.resume import resume_command
from meal_fast.config.run_dir import as_saved, check_folder, has_checkpoint, read_config

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # the last one of SLURM's, before its limit


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Train, evaluate and report, as the command line says; one process of several, its part."""
    started = time.perf_counter()
    config, args, laid = prepared(argv)  # answers --help and wrong options before torch is imported
    main_process = world_of(os.environ)[0] == 0
    if main_process:
        what = {"resume": args.resume, "evaluate": args.evaluate, "report": args.report}
        if args.plan:
            say(whole_plan(config, args.out, laid, args.cards.card_for(config), **what))
            return
        tell(run_plan(config, args.out, laid, **what))
    if args.plan:
        return
    train(config, args)
    if not main_process:
        return
    from meal_fast.training.console import clock

    trained = time.perf_counter()
    say(f"meal-fast: trained in {clock(trained - started)}; policy in {args.out / 'policy'}")
    if args.evaluate:
        from meal_fast.evaluate import main as evaluate

        # By the objectives that this command was told, or was told to trust: no others.
        repeated = ["--objectives", *config.objectives]
        limit = f"--objectives-timeout={config.objectives_timeout}"
        evaluate([str(args.out), limit, *([] if args.report else ["--no-report"]), *repeated])
        took = clock(time.perf_counter() - trained)
        say(f"meal-fast: {took} for evaluation and report")


def prepared(argv: Sequence[str] | None) -> tuple[Config, TrainArgs, Layout]:
    """Read the command line, and check all that can be before torch is imported.

    Of several processes on a machine one says what is wrong.
    """
    heard = os.environ.get("LOCAL_RANK", "0") == "0"
    with nullcontext() if heard else redirect_stderr(io.StringIO()):
        try:
            config, args = parse_train(argv)
            if args.plan:  # of cards that need not be here
                return config, args, args.cards.layout(config)
            from meal_fast.training.loggers import check_logger

            check_logger(config.logger)
            check_folder(config, args.out, args.resume)
            if args.resume:
                config = as_saved(config, read_config(args.out))
            laid = layout(config, world_of(os.environ)[1])
            if args.evaluate:
                then = "train again, or without it: --no-evaluate"
                require_packages("the evaluation after training", "moocore", then=then)
                if args.report:
                    then = "train again, or add --no-report"
                    require_packages("the report", "matplotlib", then=then)
        except ValueError as error:
            fail(error)
    return config, args, laid


def train(config: Config, args: TrainArgs) -> None:
    """Train to the end, shown on stderr. Leave with exit code 130 where a signal asked for it.

    Its memory is free again on return: the evaluation loads what was saved, as a user's would.
    """
    from meal_fast.training.console import Display

    quiet = world_of(os.environ)[0] > 0
    heard = (lambda line: None) if quiet else tell
    with Display(quiet=quiet) as display:
        try:
            display.stage("loading PyTorch")
            from meal_fast.data.objective_calls import ObjectiveError
            from meal_fast.evaluation.asked import check_ahead
            from meal_fast.training.distributed import start
            from meal_fast.training.loggers import Loggers
            from meal_fast.training.metrics import note_cost
            from meal_fast.training.trainer import Trainer

            mesh = start(config)
            ahead = partial(check_ahead, say=display.note) if args.evaluate else nothing
            trainer = Trainer(
                config, args.out, resume=args.resume, tell=display.stage, ahead=ahead, mesh=mesh
            )
        except OSError as error:
            full = error.errno == errno.ENOSPC
            remedy = "make room" if full else "name a folder that can be read and written"
            fail(f"out={str(args.out)!r}: {error}; {remedy}")
        except KeyboardInterrupt:
            there = (args.out / "config.json").is_file()
            again = f"go on with {resume_command(args.out)}" if there else "start again"
            heard(f"meal-fast: stopped before the first update; {again}")
            sys.exit(130)
        except ProcessLost as error:
            lost(error, args.out)
        loggers = Loggers("none" if quiet else config.logger, args.out, to_dict(trainer.config))
        trainer.on_answers = both(display.answers, loggers.answers)
        trainer.on_update = both(display.update, loggers.update)
        display.begin(trainer.updates, trainer.done, trainer.progress(trainer.done))

        def stop(number: int, frame: FrameType | None) -> None:
            signal.signal(number, signal.SIG_DFL)  # the next one ends the process
            trainer.stop_requested = True
            display.stopping()

        # A launcher may run this in a thread (Ray Train), which takes no signals.
        able = STOPS if threading.current_thread() is threading.main_thread() else ()
        before = {number: signal.signal(number, stop) for number in able}
        try:
            trainer.train()
            loggers.close()
            if trainer.stopped:  # said before the others leave: then a launcher may end this one
                heard(
                    f"meal-fast: stopped after meta-step {trainer.step} "
                    f"({trainer.progress(trainer.done):.0%}); go on with "
                    f"{resume_command(args.out)}"
                )
            mesh.close()
        except OSError as error:
            if quiet and getattr(error, "agreed", False):
                said_elsewhere()
            what = f"out={str(args.out)!r}: {error.strerror or error}"
            fail(f"{what}; {left(args.out, 'make room')}")
        except ObjectiveError as error:
            told = ObjectiveError(f"{error}; {left(args.out, 'mend the objective')}")
            told.__dict__.update(error.__dict__)
            raise told from error
        except GivenUp as error:
            heard(f"meal-fast: stopped: {error}; {left(args.out, 'when you like')}")
            with suppress(ProcessLost):  # it need not wait for those that have left otherwise
                mesh.close()
            sys.exit(130)
        except ProcessLost as error:
            lost(error, args.out)
        except KeyboardInterrupt as stopped:  # of an objective that does not come back
            again = resume_command(args.out)
            said = f"{stopped}; the meta-step is given up, the last checkpoint is good"
            heard(f"meal-fast: {said}: go on with {again}")
            sys.exit(130)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if trainer.stopped:
        sys.exit(130)
    if not quiet:
        note_cost(args.out, trainer.policy.device)


def lost(error: Exception, out: Path) -> NoReturn:
    """Leave, with exit code 1, where another process has; none waits for this one any more."""
    tell(f"meal-fast: error: {error}; {left(out, 'see to it')}")
    sys.stderr.flush()
    os._exit(1)  # what the lost process never answered would keep this one


def left(out: Path, first: str) -> str:
    """Say what a run that broke off has left, and how to go on with it when `first` is done."""
    if not (out / "config.json").is_file():
        return f"there is no run yet: {first}, then start again"
    there = has_checkpoint(out)
    said = "the last checkpoint is good" if there else "there is no checkpoint yet"
    more = "" if there else ", which starts from the first update"
    return f"{said}: {first}, then go on with {resume_command(out)}{more}"


def nothing(*_: object) -> None:
    """Check nothing."""


def both(first: Callable[[Any], None], second: Callable[[Any], None]) -> Callable[[Any], None]:
    """Tell two listeners the same."""

    def tell(what: Any) -> None:
        first(what)
        second(what)

    return tell


if __name__ == "__main__":
    main()
