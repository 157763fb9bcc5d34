"""Train a steerable policy, evaluate it, and write its report.

    python -m meal_fast.train                       the quickstart preset, into runs/quickstart
    python -m meal_fast.train hh-qwen2 --out runs/hh --recipe grid-grpo --grpo.beta 0.6
    python -m meal_fast.train --resume --out runs/hh

Ctrl-C finishes the meta-step, saves and leaves (exit code 130); a second one leaves at once, and
the last checkpoint stays good.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from types import FrameType

from meal_fast.config.cli import fail, one_line_errors, parse_train


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    config, args = parse_train(argv)  # answers --help and wrong options before torch is imported

    from meal_fast.config.config import to_dict
    from meal_fast.training.console import Display, Loggers, check_logger, clock, note_cost
    from meal_fast.training.trainer import Clock, Trainer

    wall = Clock()
    check_logger(config.logger)
    try:
        trainer = Trainer(config, args.out, resume=args.resume)
    except OSError as error:
        fail(f"out={str(args.out)!r}: {error}; name a folder that can be written")
    loggers = Loggers(config.logger, args.out, to_dict(trainer.config))
    with Display(trainer.updates, trainer.done, trainer.progress(trainer.done)) as display:

        def show(metrics: dict) -> None:
            display.update(metrics)
            loggers.update(metrics)

        def stop(number: int, frame: FrameType | None) -> None:
            signal.signal(number, signal.SIG_DFL)  # the next one ends the process
            trainer.stop_requested = True
            print("meal-fast: finishing this meta-step, then saving", file=sys.stderr)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stop)
        trainer.on_update = show
        try:
            trainer.train()
        except OSError as error:
            fail(
                f"out={str(args.out)!r}: {error.strerror or error}; the last checkpoint is good: "
                "make room, then add --resume"
            )
    loggers.close()
    if trainer.stop_requested:
        print(
            f"meal-fast: stopped after meta-step {trainer.step} "
            f"({trainer.progress(trainer.done):.0%}); go on with "
            f"python -m meal_fast.train --resume --out {args.out}",
            file=sys.stderr,
        )
        sys.exit(130)
    note_cost(args.out, trainer.policy.device)
    print(f"meal-fast: trained in {clock(wall.lap())}; policy in {args.out / 'policy'}")
    if args.evaluate:
        from meal_fast.evaluate import main as evaluate

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        del trainer  # its memory; the evaluation loads what was saved, as a user's would
        evaluate([str(args.out), *([] if args.report else ["--no-report"])])
        print(f"meal-fast: {clock(wall.lap())} for evaluation and report")


if __name__ == "__main__":
    main()
