"""The command line of `meal_fast.plan`. No torch."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from .cards import Cards, add_cards, take_cards
from .cli import DEFAULT_PRESET, OneLineParser, add_options
from .config import Config, from_dict, load_toml
from .errors import known
from .model_shape import MODELS
from .options import nested
from .presets import PRESETS, preset


@dataclass(frozen=True)
class PlanArgs:
    """What `meal-fast plan` is told beside the configuration."""

    cards: Cards
    model: str | None
    prompt_tokens: float | None
    response_tokens: float | None
    table: bool


def parse_plan(argv: Sequence[str] | None = None) -> tuple[Config, PlanArgs]:
    """Read the plan command line: a configuration as `meal-fast train` reads it, and the rest."""
    argv = list(sys.argv[1:] if argv is None else argv)
    shown = next((a for a in argv if a in PRESETS), DEFAULT_PRESET)
    found = vars(_parser(shown).parse_args(argv))
    named, file = found.pop("PRESET"), found.pop("config")
    if named is not None:
        known("preset", named, PRESETS, "; for a file, --config")
    cards = take_cards(found)
    names = ("model", "prompt_tokens", "response_tokens", "table")
    args = PlanArgs(cards, **{name: found.pop(name) for name in names})
    base = preset(named or DEFAULT_PRESET)
    if file is not None:
        base = load_toml(file, base)
    return from_dict(nested(found), base), args


def _parser(shown: str) -> OneLineParser:
    parser = OneLineParser(
        prog="python -m meal_fast.plan",
        usage="%(prog)s [PRESET] [--config FILE] [--cards N] [--card NAME] [--model NAME] "
        "[--section.option VALUE ...]",
        description="Say who holds what, bytes a card, bytes on the wire and seconds of a "
        "meta-step,\nfor cards that need not be here. It is arithmetic, not a measurement.",
        epilog=f"The defaults shown are those of the preset {shown}.",
        formatter_class=functools.partial(
            argparse.RawDescriptionHelpFormatter, max_help_position=34, width=110
        ),
    )
    parser.add_argument(
        "PRESET", nargs="?", help=f"{', '.join(PRESETS)} (default: {DEFAULT_PRESET})"
    )
    parser.add_argument("--config", metavar="FILE", help="options in TOML")
    sizes = ", ".join(n for n in MODELS if ":" not in n)
    parser.add_argument(
        "--model", metavar="NAME", help=f"sizes of another model than policy.path: {sizes}, …"
    )
    parser.add_argument(
        "--prompt-tokens", type=float, metavar="N", help="of a prompt; half of prompts.max_tokens"
    )
    parser.add_argument(
        "--response-tokens", type=float, metavar="N", help="of an answer; rollout.max_new_tokens"
    )
    parser.add_argument(
        "--table", action="store_true", help="the table of docs/scale.md instead, in Markdown"
    )
    add_cards(parser)
    add_options(parser, preset(shown))
    return parser
