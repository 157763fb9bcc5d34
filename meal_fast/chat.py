"""Answers at any preference, from the policy of a finished run.

    python -m meal_fast.chat RUN --w helpful=0.8,harmless=0.2 [--prompt TEXT]

Without --prompt every line of standard input is a prompt; `/w helpful=0.2,harmless=0.8` changes
the preference. `--w auto` (and `/w auto`) takes each prompt's from the preference-weight-net of a
run of the recipe `meal`, and shows it. Each prompt stands alone: training saw single turns.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from meal_fast.config.cli import OneLineParser, one_line_errors, parse_weights
from meal_fast.config.run_dir import policy_folder, read_config
from meal_fast.models.threads import use_threads

Asked = tuple[float, ...] | None  # a preference; None: the net's, for every prompt
Answer = Callable[[str, Asked, int], str]


def talk(
    lines: Iterator[str],
    answer: Answer,
    w: Asked,
    parse: Callable[[str], Asked],
    names: Sequence[str],
) -> None:
    """Answers each line on standard output; a command or prompt that cannot be used is told why."""
    for turn, line in enumerate(lines):
        text = line.strip()
        if not text:
            continue
        try:
            if text == "/quit":
                return
            if text.startswith("/w ") or text == "/w":
                w = parse(text[2:].strip())
                print(f"w is now {shown(w, names)}", file=sys.stderr, flush=True)
            elif text.startswith("/"):
                raise ValueError(f"{text.split()[0]!r}: unknown; there are /w and /quit")
            else:
                print(answer(text, w, turn), flush=True)
        except ValueError as error:
            print(f"meal-fast: {error}", file=sys.stderr, flush=True)


def shown(w: Asked, names: Sequence[str]) -> str:
    if w is None:
        return "auto"
    return ",".join(f"{name}={value:g}" for name, value in zip(names, w, strict=True))


def prompted_lines(w: Asked, names: Sequence[str]) -> Iterator[str]:
    """Lines of standard input; a person at a terminal gets a prompt sign and line editing."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401  (gives input() history and editing)

    print(f"w is {shown(w, names)}; /w changes it, /quit or Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def parser() -> OneLineParser:
    p = OneLineParser(prog="python -m meal_fast.chat", description=__doc__)
    p.add_argument("run", metavar="RUN", type=Path, help="the folder that meal_fast.train wrote")
    p.add_argument(
        "--w", metavar="W", help="NAME=VALUE,… summing to 1, or auto (default: all equal)"
    )
    p.add_argument("--prompt", metavar="TEXT", help="answer this and end")
    p.add_argument("--temperature", type=float, help="0: greedy (default: the run's own)")
    p.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus sampling")
    p.add_argument("--top-k", type=int, default=0, metavar="K", help="0: all")
    p.add_argument("--min-p", type=float, default=0.0, metavar="P", help="share of the likeliest's")
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends an answer")
    p.add_argument("--max-new-tokens", type=int, metavar="N", help="(default: the run's own)")
    p.add_argument("--seed", type=int, default=0, help="of the sampling")
    p.add_argument("--device", help="cpu, cuda, … (default: the run's own)")
    return p


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    config = read_config(args.run)
    names = config.names
    net_file = args.run / "preference_net.safetensors"

    def parse(text: str) -> Asked:
        if text != "auto":
            return parse_weights(text, names)
        if not net_file.is_file():
            raise ValueError(
                f"w='auto': {str(args.run)!r} holds no preference-weight-net; a run of recipe meal "
                "with meal.rho below 1 trains one"
            )
        return None

    w = (1.0 / len(names),) * len(names) if args.w is None else parse(args.w)
    temperature = config.rollout.temperature if args.temperature is None else args.temperature
    length = config.rollout.max_new_tokens if args.max_new_tokens is None else args.max_new_tokens
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"--temperature={temperature}: must be 0 (greedy) or positive")
    if length < 1:
        raise ValueError(f"--max-new-tokens={length}: must be at least 1")
    if args.top_k < 0 or not 0 < args.top_p <= 1 or not 0 <= args.min_p <= 1:
        raise ValueError(
            f"--top-k={args.top_k}, --top-p={args.top_p}, --min-p={args.min_p}: top-k must be 0 or "
            "positive, top-p in (0, 1], min-p in [0, 1]"
        )
    if "" in args.stop:
        raise ValueError("--stop='': would end every answer; give a text")
    if args.prompt is not None and not args.prompt.strip():
        raise ValueError("--prompt='': is empty; give a text, or leave it out to read lines")
    policy_folder(args.run)  # a clear error, before torch is imported

    from meal_fast.data.preferences import snapped
    from meal_fast.data_types import Prompt
    from meal_fast.models.model_soup import load_served
    from meal_fast.rollout import Backend, Request, Sampling, capable, open_backend
    from meal_fast.training.preference_net import PreferenceNet, features

    if args.device is not None:
        there = dataclasses.replace(config.policy, device=args.device)
        config = dataclasses.replace(config, policy=there)
    use_threads(config.threads)
    policy, family = load_served(args.run, config)

    net = PreferenceNet.load(net_file, names) if net_file.is_file() else None
    grid = config.preference.grid

    backend = capable(
        config.rollout.backend,
        ("any-network",) if policy.adapter else (),
        lambda line: print(f"meal-fast: {line}", file=sys.stderr, flush=True),
    )

    with ExitStack() as held:
        serving: dict[Asked, Backend] = {}  # what is open now, by its preference; None: any

        def release() -> None:
            held.close()
            serving.clear()

        def sampler_at(w: tuple[float, ...]) -> Backend:
            """The engine on what serves w: a new one only where w has parameters of its own."""
            serves = None if family is None else w
            if serves not in serving:
                release()
                if family is not None:
                    held.enter_context(family.at(policy, w))
                serving[serves] = held.enter_context(open_backend(backend, policy))
            return serving[serves]

        def answer(text: str, w: Asked, turn: int) -> str:
            prompt = Prompt(id="chat", text=text)
            if w is None:
                assert net is not None
                release()  # the net reads the base model, which an open engine has merged with LoRA
                (w,) = snapped(net(features(policy, [prompt]).cpu()).tolist(), grid)
                print(f"w is {shown(w, names)}", file=sys.stderr, flush=True)
            sampling = Sampling(
                max_new_tokens=length,
                temperature=temperature,
                seed=args.seed,
                rng_key=("chat", turn),
                top_k=args.top_k,
                top_p=args.top_p,
                min_p=args.min_p,
                stop=tuple(args.stop),
            )
            sampler = sampler_at(w)
            sampler.forget()  # the last prompt: it hardly comes again
            return sampler.generate([Request(prompt, w)], sampling).texts[0].strip()

        if args.prompt is not None:
            print(answer(args.prompt.strip(), w, 0))
        else:
            talk(prompted_lines(w, names), answer, w, parse, names)


if __name__ == "__main__":
    main()
