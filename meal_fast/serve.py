"""A playground in the browser and an API for OpenAI's clients, from a run's policy.

    python -m meal_fast.serve RUN [--port 8000]

The page is at http://127.0.0.1:8000/. The API is at /v1: chat/completions and models, with
`preference` ({"helpful": 0.8, "harmless": 0.2} or "auto") as a field of its own. It needs the
extra `serve`: fastapi and uvicorn. Anyone who reaches the address can ask: another --host than
this machine's own needs a --token. The policy was trained on single turns; earlier ones of a
conversation are shown to it by the chat template.
"""

from collections.abc import Sequence
from pathlib import Path

from meal_fast.common import require, tell
from meal_fast.config.cli import (
    OneLineParser,
    add_trust,
    check_trust,
    one_line_errors,
    require_packages,
)
from meal_fast.config.run_dir import read_config
from meal_fast.serving.server import serve


def parser() -> OneLineParser:
    p = OneLineParser(prog="python -m meal_fast.serve", description=__doc__)
    p.add_argument("run", metavar="RUN", type=Path, help="the folder that meal_fast.train wrote")
    p.add_argument("--host", default="127.0.0.1", help="where to listen (default: %(default)s)")
    p.add_argument("--port", type=int, default=8000, help="0: any (default: %(default)s)")
    p.add_argument("--token", help="what a client must send as its API key")
    p.add_argument("--open", action="store_true", help="open the page in the browser")
    p.add_argument("--slots", type=int, default=16, metavar="N", help="answers written at a time")
    p.add_argument("--queue", type=int, default=64, metavar="N", help="answers that may wait")
    p.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N",
        help="of an answer whose request does not say (default: %(default)s)",
    )  # fmt: skip
    add_trust(p)
    return p


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    for name, least in (("slots", 1), ("queue", 0), ("max_new_tokens", 1), ("port", 0)):
        value = getattr(args, name)
        require(value >= least, f"--{name.replace('_', '-')}", value, f"must be at least {least}")
    require(args.port < 1 << 16, "--port", args.port, "must be below 65536")
    config = read_config(args.run)
    check_trust(args.run, config, trusted=args.trust_run, objectives=args.objectives)
    require_packages("serve", "fastapi", "uvicorn", then="meal-fast serve again")
    serve(args.run, config, tell, host=args.host,
          port=args.port, token=args.token, browse=args.open, slots=args.slots, waiting=args.queue,
          max_new_tokens=args.max_new_tokens)  # fmt: skip


if __name__ == "__main__":
    main()
