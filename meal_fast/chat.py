"""Answers at any preference, from the policy of a finished run.

    python -m meal_fast.chat RUN --w helpful=0.8,harmless=0.2 [--prompt TEXT]

Without --prompt every line of standard input is a turn of one conversation: `/new` forgets it,
`/w helpful=0.2,harmless=0.8` changes the preference, `/help` says more. `--w auto` (and `/w auto`)
takes each prompt's from the preference-weight-net of a run of the recipe `meal`, and shows it.
Training saw single turns: what is said after the first is less sure to follow the preference.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from meal_fast.common import require, tell
from meal_fast.config.cli import OneLineParser, one_line_errors
from meal_fast.config.run_dir import read_config
from meal_fast.config.sealed import warned_unfinished
from meal_fast.evaluation.conversation import prompted_lines, spoken, talk
from meal_fast.evaluation.session import LENGTH, Session, preference, sampling_of


def parser() -> OneLineParser:
    p = OneLineParser(prog="python -m meal_fast.chat", description=__doc__)
    p.add_argument("run", metavar="RUN", type=Path, help="the folder that meal_fast.train wrote")
    p.add_argument("--w", help="NAME=VALUE,… summing to 1, or auto (default: all equal)")
    p.add_argument("--prompt", metavar="TEXT", help="answer this and end")
    p.add_argument("--temperature", type=float, help="0: greedy (default: the run's own)")
    p.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling")
    p.add_argument("--top-k", type=int, default=0, metavar="K", help="0: all")
    p.add_argument("--min-p", type=float, default=0.0, metavar="P", help="share of the likeliest's")
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends an answer")
    p.add_argument("--max-new-tokens", type=int, metavar="N", help=f"(default: {LENGTH})")
    p.add_argument("--seed", type=int, default=0, help="of the sampling")
    p.add_argument("--device", help="cpu, cuda, … (default: the run's own)")
    return p


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    config = read_config(args.run)
    w = preference(args.w, args.run, config.names)
    sampling = sampling_of(config, vars(args))
    prompt = None if args.prompt is None else args.prompt.strip()
    require(prompt != "", "--prompt", "", "is empty; give a text, or leave it out to read lines")
    warned_unfinished(args.run, tell)
    with Session(args.run, config, tell, device=args.device, **sampling) as session:
        if prompt is None:
            talk(session, prompted_lines(w, config.names), w)
        else:
            answer = spoken(session, prompt, w, 0)
            if answer.finish == "cancelled":
                sys.exit(130)


if __name__ == "__main__":
    main()
