"""What a run folder holds, read and checked: written by training, whole or not there. No torch."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from meal_fast.common import parse_json

from .config import Config, from_dict, to_dict
from .model_files import check_model_files
from .resume import how_to_finish
from .run_lock import FILE as LOCK
from .run_lock import check_free
from .shapes import NUMBER, TEXT, hold

# Options that leave their value to the machine, by what says so. A run is saved with what it was.
AUTOMATIC = {
    "threads": 0, "policy.dtype": "auto", "grpo.micro_tokens": 0, "mesh.virtual": 0,
}  # fmt: skip

CHECKPOINTS, LATEST = "ckpt", "LATEST"  # a folder of checkpoints, and the name of the last in it
OLD_CHECKPOINTS = ("checkpoint.pt", "checkpoint.previous.pt")  # files, of earlier versions

PREFERENCE_NET = "preference_net.safetensors"  # of a run of recipe `meal`, if it trained one

_SCALE = {"mode": TEXT, "offset": [NUMBER], "divisor": [NUMBER]}
_STATISTICS = {
    "names": [TEXT],
    "normalizer": _SCALE,
    "utopia": [NUMBER],
    "mu_evaluation": NUMBER,
    "standard?": _SCALE,
    "reference_point?": [NUMBER],
    "calibration?": {f"{name}?": [NUMBER] for name in ("mean", "std", "min", "max")},
}

# What a resumed run may change: nothing that enters the mathematics of the steps.
FREE_ON_RESUME = (
    *("checkpoint_every", "completions", "logger", "objectives_timeout"),
    *("evaluation.", "grpo.skip_limit"),
    *("mesh.groups", "mesh.data", "mesh.shard", "mesh.timeout"),
)

_RESTORE = "restore it from a copy"


def read_config(run: Path) -> Config:
    """Read the configuration of a run folder. Raises ValueError where `run` is not one."""
    values = read_json(run, "config.json")
    values.setdefault("mesh", {"virtual": 1})  # of a version that knew one process alone
    objectives = values.get("objectives")
    if isinstance(objectives, list):  # toy objectives by the name that they had
        values["objectives"] = [
            o.replace("=meal_fast.worlds:", "=world:") if isinstance(o, str) else o
            for o in objectives
        ]
    try:
        return from_dict(values)
    except ValueError as error:
        raise ValueError(f"RUN={str(run)!r}: config.json: {error}") from None


def has_checkpoint(run: Path) -> bool:
    """Say whether a run has been saved at least once."""
    return any((run / name).exists() for name in (f"{CHECKPOINTS}/{LATEST}", *OLD_CHECKPOINTS))


def as_saved(config: Config, saved: Config) -> Config:
    """Give `config` with what it leaves to the machine as the run that is there has it."""
    asked, held = flat(to_dict(config)), flat(to_dict(saved))
    values: dict[str, Any] = {}
    for name, automatic in AUTOMATIC.items():
        if asked[name] == automatic:
            section, _, option = name.rpartition(".")
            (values.setdefault(section, {}) if section else values)[option] = held[name]
    return from_dict(values, config)


def check_folder(config: Config, out: Path, resume: bool) -> None:
    """Raise ValueError for a folder that `config` cannot be trained in, or gone on with in."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={str(out)!r}: is a file; name a folder")
    check_free(out)
    held = (out / "config.json").exists()
    if not resume:
        # What a process killed before its config was whole leaves: a lock, a .tmp. Links are not.
        there = list(out.iterdir()) if out.exists() else []
        ours = [p for p in there if p.name == LOCK or p.suffix == ".tmp"]
        if held or len(ours) < len(there) or any(p.is_symlink() for p in ours):
            raise ValueError(f"out={str(out)!r}: exists; add --resume, or name another folder")
        return
    if not held:
        raise ValueError(f"out={str(out)!r}: no run to resume; leave --resume out to start one")
    for path in (*out.iterdir(), *(out / CHECKPOINTS).glob("**/*")):
        if path.is_symlink():
            name = str(path.relative_to(out))
            raise ValueError(
                f"out={str(out)!r}: {name!r} is a link; a run that goes on writes into its own "
                "files alone: replace it by what it leads to"
            )
    saved = read_config(out)
    changed = changed_options(to_dict(saved), to_dict(as_saved(config, saved)))
    if changed:
        raise ValueError(
            f"--resume with a changed config: {', '.join(changed)}; leave PRESET and these options "
            "out to go on, or name another --out"
        )


def changed_options(saved: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Name the options, of those that both have, which a resumed run must not change."""
    # As JSON has them: a list for a tuple.
    old, new = (flat(json.loads(json.dumps(values))) for values in (saved, asked))
    return [
        f"{name} ({old[name]!r} -> {new[name]!r})"
        for name in sorted(old.keys() & new.keys())
        if old[name] != new[name]
        and not name.startswith(FREE_ON_RESUME)
        and not (name in AUTOMATIC and old[name] == AUTOMATIC[name])  # older: does not say
    ]


def flat(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Flatten nested tables into one, with dotted names."""
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= flat(value, f"{where}{name}.") if isinstance(value, dict) else {where + name: value}
    return out


def read_json(run: Path, name: str) -> dict[str, Any]:
    """Read one JSON file of a run folder. Raises ValueError where it is missing or broken."""
    try:
        values = parse_json((run / name).read_bytes())
    except OSError as error:
        # A report's own file comes from evaluate, all others from train.
        remedy = (
            f"run `python -m meal_fast.evaluate {shlex.quote(str(run))}` first"
            if name == "evaluation.json" and (run / "config.json").is_file()
            else "give the folder that meal_fast.train wrote"
        )
        raise ValueError(f"RUN={str(run)!r}: no {name} ({error.strerror}); {remedy}") from None
    except ValueError as error:
        raise ValueError(f"RUN={str(run)!r}: {name} is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"RUN={str(run)!r}: {name} holds no table; it is not of a run")
    return values


def read_statistics(path: Path) -> dict[str, Any]:
    """Read a run's statistics.json. Raises ValueError where `path` is none."""
    if not path.is_file():
        raise ValueError(f"statistics={str(path)!r}: no such file; name a run's statistics.json")
    values = read_json(path.parent, path.name)
    hold(values, _STATISTICS, f"statistics={str(path)!r}")
    lengths = {len(values["names"]), len(values["utopia"]), len(values["normalizer"]["offset"])}
    if len(lengths) > 1:
        raise ValueError(
            f"statistics={str(path)!r}: of {min(lengths)} and {max(lengths)} objectives"
        )
    return values


def shared_statistics(config: Config) -> bytes | None:
    """Read what `score.statistics` names, as it will stand in the run's folder; empty: None.

    Raises ValueError where those statistics are of other objectives, another normalisation or
    another z* than the config asks for.
    """
    score = config.score
    if not score.statistics:
        return None
    path = Path(score.statistics)
    values = read_statistics(path)
    for option, asked, found in (
        ("objectives", config.names, tuple(values["names"])),
        ("score.normalization", score.normalization, values["normalizer"].get("mode")),
        ("score.utopia", score.utopia or tuple(values["utopia"]), tuple(values["utopia"])),
    ):
        if asked != found:
            raise ValueError(
                f"score.statistics={str(path)!r}: made with {option} {found!r}, not {asked!r}"
            )
    return path.read_bytes()


def policy_folder(run: Path) -> Path:
    """Find the trained policy of a finished run.

    Raises ValueError where there is none yet, and for one that asks for code, or is a pickle.
    """
    folder = run / "policy"
    if not (folder / "config.json").is_file():
        raise ValueError(f"RUN={str(run)!r}: no policy/ yet; finish it with {how_to_finish(run)}")
    for part in (folder, folder / "adapter"):
        if part.is_dir():
            check_model_files(part, f"RUN={str(run)!r}")
    return folder


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read the updates of metrics.jsonl; no file: none.

    A last line cut short by a kill is left out. Raises ValueError for any other that is not JSON.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        return []
    try:
        lines = path.read_bytes().decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise ValueError(
            f"{str(path)!r}: is damaged: not UTF-8 text ({where}); {_RESTORE}"
        ) from None
    updates = []
    for number, line in enumerate(lines, 1):
        try:
            update = parse_json(line, strict=False)  # a NaN is what a training run may have seen
            if not isinstance(update, dict):
                raise ValueError("no table")
            updates.append(update)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(
                f"{str(path)!r}, line {number}: not JSON ({error}); {_RESTORE}"
            ) from None
    return updates
