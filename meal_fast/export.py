"""A run's policy as others load it: a folder for a hub, a LoRA adapter, or one GGUF file.

    python -m meal_fast.export RUN [--to hub|adapter|gguf]

Each has a model card: objectives, what was measured, how to say a preference, limits, licences.
`hub` is the whole model in safetensors, `adapter` the LoRA factors alone in PEFT's format, `gguf` a
file for llama.cpp, which is read back and compared with the policy before it is kept. Of
rewarded-soups and morlhf, which have a model for each preference, --w says which. Nothing is sent
anywhere.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from meal_fast.common import require, say, tell
from meal_fast.config.cli import OneLineParser, one_line_errors, parse_weights, require_packages
from meal_fast.config.config import Config
from meal_fast.config.recipes import spec_of
from meal_fast.config.run_dir import policy_folder, read_config
from meal_fast.config.sealed import check_policy, read_written_anew, warned_unfinished

KINDS = ("hub", "adapter", "gguf")
TYPES = ("f32", "f16", "bf16", "q8_0")


def parser() -> OneLineParser:
    p = OneLineParser(prog="python -m meal_fast.export", description=__doc__)
    p.add_argument("run", metavar="RUN", type=Path, help="the folder that meal_fast.train wrote")
    p.add_argument("--to", default="hub", choices=KINDS, help="what to write (default: hub)")
    p.add_argument("--out", metavar="DIR", type=Path, help="a new folder (default: in RUN/export)")
    p.add_argument(
        "--type", choices=TYPES, help="number format of a GGUF file's matrices (default: f16)"
    )
    p.add_argument(
        "--base", metavar="OWNER/NAME", help="the base model's name on a hub (default: as trained)"
    )
    p.add_argument("--w", help="NAME=VALUE,…: of rewarded-soups and morlhf, the one to export")
    return p


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    config = read_config(args.run)
    name = args.run.resolve().name
    out = args.out or args.run / "export" / (name if args.to == "hub" else f"{name}-{args.to}")
    _check(args, config, out)
    w = None if args.w is None else parse_weights(args.w, config.names)
    from meal_fast.evaluation.model_card import base_name, model_card
    from meal_fast.evaluation.stored import whole
    from meal_fast.models.export import copy_adapter, copy_model

    check_policy(args.run)
    read_written_anew(args.run, "policy/preference.json")
    stopped = warned_unfinished(args.run, tell)
    held = whole(str(args.run / "policy"), "finish the run again")
    with held, _whole(out) as folder, _saved(args.run, config, w, folder) as policy:
        title = out.name
        if args.to == "hub":
            copy_model(policy, folder)
        elif args.to == "adapter":
            copy_adapter(policy, folder, args.base or base_name(config))
        else:
            kind = args.type or "f16"
            title = f"{name}-{kind}.gguf"
            _convert(policy, folder / title, kind, name, config)
        card = model_card(
            args.run,
            config,
            args.to,
            title=title,
            at=w,
            base=args.base or "",
            unfinished=stopped,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        if (args.run / "front.png").is_file():
            shutil.copy2(args.run / "front.png", folder)
    say(out)
    if args.to == "hub":
        tell(f'to publish it: hf upload OWNER/{out.name} "{out}"')


def _check(args: argparse.Namespace, config: Config, out: Path) -> None:
    """Raise ValueError for what cannot be written, before anything is."""
    from meal_fast.evaluation.model_card import is_hub_name
    from meal_fast.models.export import ADAPTER
    from meal_fast.models.gguf_file import check_convertible

    policy, recipe = policy_folder(args.run), config.recipe
    _check_links(args.run)
    remedy = "decodes with base and guide together, which no single model holds; serve the run"
    require(not spec_of(config).guide, "recipe", recipe, remedy)
    several = bool(config.model_points)
    remedy = f"recipe {recipe!r} has a model for each preference: say whose, --w NAME=VALUE,…"
    require(not several or args.w is not None, "--w", args.w, remedy)
    remedy = f"recipe {recipe!r} has one model for all preferences; leave it out"
    require(several or args.w is None, "--w", args.w, remedy)
    lora = config.policy.tuning == "lora" and (several or (policy / ADAPTER).is_dir())
    remedy = f"policy.tuning={config.policy.tuning!r}: no adapter in policy/; use --to hub"
    require(args.to != "adapter" or lora, "--to", args.to, remedy)
    remedy = "is no hub name, OWNER/NAME; leave it out, or give one"
    require(args.base is None or is_hub_name(args.base), "--base", args.base, remedy)
    remedy = "is for --to gguf; leave it out"
    require(args.type is None or args.to == "gguf", "--type", args.type, remedy)
    there = os.path.exists(out)  # false where the name cannot be, which is said when it is made
    require(not there, "--out", str(out), "exists; name another folder, or remove it")
    apart = policy.resolve() not in out.resolve().parents
    require(apart, "--out", str(out), "lies in the policy itself; name another folder")
    if args.to == "gguf":
        require_packages("--to gguf", "gguf", then="meal-fast export again")
        if not several:
            check_convertible(policy)


def _check_links(run: Path) -> None:
    """Raise ValueError where what is copied leads out of the run: it would be published with it."""
    own = run.resolve()
    for path in (run / "front.png", run / "policy", *(run / "policy").rglob("*")):
        if path.is_symlink() and own not in path.resolve().parents:
            raise ValueError(
                f"RUN={str(run)!r}: {str(path.relative_to(run))!r} is a link that leads out of the "
                "run; replace it by what it leads to"
            )


@contextmanager
def _whole(out: Path) -> Iterator[Path]:
    """Give a folder that becomes `out` when all is well, and is gone when not."""
    made = [p for p in out.parents if not os.path.exists(p)]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f"{out.name}.", suffix=".tmp", dir=out.parent))
    except OSError as error:
        raise ValueError(f"--out={str(out)!r}: cannot be made ({error.strerror})") from None
    try:
        yield folder
        folder.chmod(0o755)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            if not any(parent.iterdir()):
                parent.rmdir()


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
    copy_model(policy, whole, linked=True)
    write_gguf(whole, file, kind, {"name": name, "finetune": config.recipe})
    kl = difference(whole, file)
    shutil.rmtree(whole)
    tell(f"read back: KL(policy || file) {kl:.1g} nats a token")
    remedy = f"read back it differs from the policy by {kl:.2g} nats a token; take another --type"
    require(kl <= LARGEST_KL[kind], "--type", kind, remedy)


if __name__ == "__main__":
    main()
