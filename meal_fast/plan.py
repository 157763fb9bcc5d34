"""Say what a run would cost on cards that need not be here: bytes, bytes on the wire, seconds.

    python -m meal_fast.plan                            the quickstart preset, on one h100
    python -m meal_fast.plan --model 7B --cards 64 --meta.tasks 8 --rollout.prompts 64
    python -m meal_fast.plan hh-qwen2 --cards 8 --card a100

It is arithmetic, and nothing is loaded or asked of a device.
"""

from __future__ import annotations

from collections.abc import Sequence

from meal_fast.common import say, tell
from meal_fast.config.cli import one_line_errors
from meal_fast.config.plan_cli import parse_plan


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Print the plan of what the command line says, or the table of docs/scale.md."""
    config, args = parse_plan(argv)
    from meal_fast.config.plan import cost_plan

    if args.table:
        from meal_fast.config.scale_table import table

        say(table())
        return
    text, warned = cost_plan(
        config,
        args.cards.layout(config),
        args.cards.chosen("h100"),
        args.model or config.policy.path,
        args.prompt_tokens,
        args.response_tokens,
    )
    say(text)
    if warned:
        tell(f"meal-fast: {warned}")


if __name__ == "__main__":
    main()
