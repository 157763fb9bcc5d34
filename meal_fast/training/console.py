"""What a person sees of a run while it goes, the loggers beside metrics.jsonl, what it cost."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from meal_fast.common import write_atomic
from meal_fast.config.run_dir import flat, read_json


class Display:
    """Show a live line on a terminal, one plain line an update elsewhere."""

    def __init__(
        self,
        updates: int | None,
        done: int,
        progress: float,
        console: Console | None = None,  # default: that of stderr
    ) -> None:
        self.updates = updates  # None: a budget of tokens ends the run
        self._started, self._first = time.perf_counter(), progress
        self._live = console is not None or sys.stderr.isatty()
        # A narrow terminal takes lines of the metrics, and nothing of how far the run is.
        self._bar = Progress(
            TextColumn("[bold]update", table_column=Column(no_wrap=True)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            BarColumn(bar_width=12, table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[line]}", table_column=Column(no_wrap=False)),
            console=console or Console(stderr=True),
            disable=not self._live,
        )
        self._task = self._bar.add_task("", total=updates, completed=done, line="starting", left="")

    def __enter__(self) -> Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, metrics: dict[str, Any]) -> None:
        done = metrics["update"] + 1
        progress = metrics["progress"]
        pace = (time.perf_counter() - self._started) / (progress - self._first)
        line, left = describe(metrics), f"left {clock(pace * (1.0 - progress))}"
        if self._live:
            self._bar.update(self._task, completed=done, line=line, left=left)
        else:
            of = f"{progress:.0%}" if self.updates is None else f"{done}/{self.updates}"
            print(f"update {of}  {line}  {left}", file=sys.stderr, flush=True)


def describe(metrics: dict[str, Any]) -> str:
    """Describe an update in one line: preference, rewards, KL, the meta-update, speed."""
    w = "/".join(f"{x:.2f}" for x in metrics["w"])
    rewards = "  ".join(f"{name} {value:+.2f}" for name, value in metrics["rewards"].items())
    delta = f"  |Δ| {metrics['delta_norm']:.3f}" if "delta_norm" in metrics else ""
    kl = f"  KL {metrics['kl']:.4f}" if "kl" in metrics else ""
    kept = f"  kept {metrics['acceptance']:.0%}" if "acceptance" in metrics else ""
    speed = metrics["tokens"] / sum(metrics["seconds"].values())
    return f"w {w}  {rewards}{kl}{kept}{delta}  {speed:.0f} tok/s"


def clock(seconds: float) -> str:
    """Write seconds as h:mm:ss or m:ss."""
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


def check_logger(kind: str) -> None:
    """Raise ValueError where the logger's package, named like it, is missing."""
    if kind != "none" and importlib.util.find_spec(kind) is None:
        raise ValueError(f"logger={kind!r}: pip install {kind}, or use logger none")


class Loggers:
    """Log to TensorBoard or Weights & Biases, when asked to."""

    def __init__(self, kind: str, out: Path, config: dict[str, Any]) -> None:
        self._kind = kind
        self._writer: Any = None
        if kind == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(out / "tensorboard"))
        elif kind == "wandb":
            import wandb

            self._writer = wandb.init(project="meal-fast", dir=str(out), config=config)

    def update(self, metrics: dict[str, Any]) -> None:
        if self._kind == "none":
            return
        numbers = {k: v for k, v in flat(metrics).items() if isinstance(v, int | float)}
        numbers |= {f"w{i}": x for i, x in enumerate(metrics["w"])}
        if self._kind == "wandb":
            self._writer.log(numbers, step=metrics["update"])
        else:
            for name, value in numbers.items():
                self._writer.add_scalar(name, value, metrics["update"])

    def close(self) -> None:
        if self._kind == "tensorboard":
            self._writer.close()
        elif self._kind == "wandb":
            self._writer.finish()


def note_cost(out: Path, device: torch.device) -> None:
    """Write cost.json: the most memory that training held, of the GPU or of the process."""
    status = Path("/proc/self/status")
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    elif status.is_file():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        peak = int(line.split()[1]) * 1024
    else:  # not Linux
        return
    old = read_json(out, "cost.json")["peak_bytes"] if (out / "cost.json").exists() else 0
    cost = {"device": device.type, "peak_bytes": max(old, peak)}
    write_atomic(out / "cost.json", json.dumps(cost))
