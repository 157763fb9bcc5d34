"""A run's policy as others load it: a folder for a hub, a LoRA adapter, or one GGUF file.

    python -m meal_fast.export RUN [--to hub|adapter|gguf]

Each has a model card: objectives, what was measured, how to say a preference, limits, licences.
`hub` is the whole model in safetensors, `adapter` the LoRA factors alone in PEFT's format, `gguf` a
file for llama.cpp, which is read back and compared with the policy before it is kept. Of the
recipes that serve a w by its own parameters, --w says which. Nothing is sent anywhere.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from meal_fast.common import require
from meal_fast.config.cli import OneLineParser, one_line_errors, parse_weights, require_packages
from meal_fast.config.config import Config
from meal_fast.config.recipes import spec_of
from meal_fast.config.run_dir import policy_folder, read_config

KINDS = ("hub", "adapter", "gguf")
TYPES = ("f32", "f16", "bf16", "q8_0")


def parser() -> OneLineParser:
    p = OneLineParser(prog="python -m meal_fast.export", description=__doc__)
    p.add_argument("run", metavar="RUN", type=Path, help="the folder that meal_fast.train wrote")
    p.add_argument("--to", default="hub", choices=KINDS, help="what to write (default: hub)")
    p.add_argument("--out", metavar="DIR", type=Path, help="a new folder (default: in RUN/export)")
    p.add_argument(
        "--type", choices=TYPES, default="f16", help="of a GGUF's matrices (default: %(default)s)"
    )
    p.add_argument("--base", metavar="NAME", help="the base model's name, for an adapter to load")
    p.add_argument("--w", help="NAME=VALUE,…: of a recipe that has a model for each preference")
    return p


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    config = read_config(args.run)
    policy_folder(args.run)
    name = args.run.resolve().name
    out = args.out or args.run / "export" / (name if args.to == "hub" else f"{name}-{args.to}")
    _check(args.run, config, args.to, args.w, args.base)
    require(not out.exists(), "--out", str(out), "exists; name another folder, or remove it")
    if args.to == "gguf":
        require_packages("--to gguf", "gguf", then="meal-fast export again")
    w = None if args.w is None else parse_weights(args.w, config.names)
    from meal_fast.evaluation.model_card import base_name, model_card
    from meal_fast.models.export import copy_adapter, copy_model
    from meal_fast.serving.run import unfinished

    with _whole(out) as folder, _saved(args.run, config, w, folder) as policy:
        title = out.name
        if args.to == "hub":
            copy_model(policy, folder)
        elif args.to == "adapter":
            copy_adapter(policy, folder, args.base or base_name(config))
        else:
            title = f"{name}-{args.type}.gguf"
            _convert(policy, folder / title, args.type, name, config)
        card = model_card(
            args.run,
            config,
            args.to,
            title=title,
            at=w,
            base=args.base or "",
            unfinished=unfinished(args.run, config),
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        if (args.run / "front.png").is_file():
            shutil.copy2(args.run / "front.png", folder)
    print(out)
    if args.to == "hub":
        print(f"to publish it: hf upload OWNER/{out.name} {out}", file=sys.stderr)


def _check(run: Path, config: Config, to: str, w: str | None, base: str | None) -> None:
    spec = spec_of(config)
    remedy = "decodes with base and guide together, which no single model holds; serve the run"
    require(not spec.guide, "recipe", config.recipe, remedy)
    several = bool(config.model_points)
    remedy = (
        f"recipe {config.recipe!r} has a model for each preference: say whose, --w NAME=VALUE,…"
    )
    require(not several or w is not None, "--w", w, remedy)
    remedy = f"recipe {config.recipe!r} has one model for all preferences; leave it out"
    require(several or w is None, "--w", w, remedy)
    tuning, lora = config.policy.tuning, config.policy.tuning == "lora"
    remedy = f"policy.tuning={tuning!r} trained no adapter; use --to hub"
    require(to != "adapter" or lora, "--to", to, remedy)
    require(base is None or to == "adapter", "--base", base, "is for --to adapter; leave it out")
    if to == "gguf" and not several:
        from meal_fast.models.gguf_file import check_convertible

        check_convertible(policy_folder(run))


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Give a folder that becomes `out` when all is well, and is gone when not."""
    folder = out.with_name(out.name + ".tmp")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _saved(run: Path, config: Config, w: tuple[float, ...] | None, folder: Path) -> Iterator[Path]:
    """Give the saved policy: the run's own, or what its family makes of w, within the context."""
    if w is None:
        yield policy_folder(run)
        return
    from meal_fast.models.model_soup import Family, load_served

    policy, family = load_served(run, config)
    assert isinstance(family, Family)
    saved = folder / "saved"
    with family.at(policy, w):
        policy.save(saved)
    yield saved
    shutil.rmtree(saved)


def _convert(policy: Path, file: Path, kind: str, name: str, config: Config) -> None:
    """Write the file, and raise ValueError where it does not read back as the policy."""
    from meal_fast.models.export import copy_model
    from meal_fast.models.gguf_file import LARGEST_KL, difference, write_gguf

    whole = file.parent / "whole"
    copy_model(policy, whole)
    write_gguf(whole, file, kind, {"name": name, "finetune": config.recipe})
    kl = difference(whole, file)
    shutil.rmtree(whole)
    print(f"read back: KL(policy || file) {kl:.1g} nats a token", file=sys.stderr)
    remedy = f"read back it differs from the policy by {kl:.2g} nats a token; take another --type"
    require(kl <= LARGEST_KL[kind], "--type", kind, remedy)


if __name__ == "__main__":
    main()
