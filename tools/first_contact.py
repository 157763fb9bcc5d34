"""Put everything to a GPU that has never seen one, in ten minutes: `make gpu-check`.

    python3 -m tools.first_contact [--part NAME] [--seconds 600] [--rehearse] [--list]

Needs a checkout, a torch that sees the card, triton and transformers; no network, no git, no build
step. The parts run one after the other, each in a process of its own within its share of the time,
so that one which hangs or crashes costs itself alone. Every measurement is a JSON line, appended
at once to DEVICE.jsonl in $OUT, or else in bench/results; what failed, with the end of what it
said, goes to DEVICE.txt; a table comes last. `make bench-table` makes docs/gpu-measured.md of the
rows.

Exit status: 0 when all went well, 1 when something failed or was not reached, 2 without a card.
With --rehearse the same code runs on the CPU at tiny sizes, Triton interpreted, and every row says
that it is a rehearsal.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from bench import rows  # noqa: E402
from tools.contact import summary  # noqa: E402
from tools.interpreter import interpreter_obstacle  # noqa: E402

MODULES = ("torch", "triton", "transformers", "peft", "numpy", "tokenizers", "safetensors")
PACKAGES = (*MODULES, "liger-kernel", "cut-cross-entropy", "pytest", "pytest-xdist")
SECONDS = 600.0
LAST = 4.0  # seconds kept for the summary
CASE, CASE_SHARE = 20.0, 0.5  # a case may take so many seconds, or that share of what is left
TAIL = 60  # lines of standard error that are kept of a failure
RESTARTS = 6  # of a part, behind cases that failed


@dataclass(frozen=True)
class Part:
    module: str  # of tools/contact
    share: float  # seconds of ten minutes
    about: str


PARTS = {
    "ceilings": Part("ceilings", 30, "versions, and what the card does at most"),
    "tests": Part("suite", 150, "pytest -m gpu"),
    "sanitizer": Part("sanitizer", 60, "compute-sanitizer on csrc and on kernels in Triton"),
    "recipes": Part("recipes", 60, "a meta-step of the preset tiny with every recipe"),
    "sampler": Part("sampler", 70, "graphs, eager and generate; its log-probabilities"),
    "profile": Part("profile", 90, "decode step and learner at the shapes of real models"),
    "ops": Part("ops", 90, "the ops beside what they replace"),
    "ncu": Part("counters", 45, "what ncu counts in four kernels"),
}

PROBE = """
import json, torch
cuda = torch.cuda.is_available()
name = torch.cuda.get_device_name() if cuda else "cpu"
print(json.dumps({"cuda": cuda, "device": name, "toolkit": torch.version.cuda}))
"""


def environment(rehearse: bool) -> dict[str, str]:
    """What the parts' processes run under."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    set_up = {**os.environ, **quiet, "PYTHONPATH": path.rstrip(os.pathsep)}
    set_up.pop("TRITON_INTERPRET", None)
    if rehearse:
        set_up["CUDA_VISIBLE_DEVICES"] = ""
        if interpreter_obstacle("1") is None:
            set_up["TRITON_INTERPRET"] = "1"
    return set_up


def probe(rehearse: bool) -> dict[str, Any]:
    """What torch says of this machine. Raises ValueError where there is nothing to check."""
    command = [sys.executable, "-c", PROBE]
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env=environment(rehearse)
        )
    except subprocess.TimeoutExpired:
        raise ValueError("torch did not answer within 120 s; is the card in use?") from None
    if ran.returncode:
        said = (ran.stderr.strip() or "nothing").splitlines()[-1]
        raise ValueError(f"{sys.executable} cannot import torch ({said})")
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    if not (found["cuda"] or rehearse):
        raise ValueError("no CUDA device here; --rehearse runs the parts on the CPU")
    return found


@dataclass
class Check:
    """One run of the check: its files, and what became of each part."""

    found: dict[str, Any]
    out: Path
    rehearse: bool
    scratch: Path
    ceilings: dict[str, float] = field(default_factory=dict)
    measured: list[dict[str, Any]] = field(default_factory=list)
    failures: list[tuple[str, str, str]] = field(default_factory=list)  # part, case, what
    passed: dict[str, int] = field(default_factory=dict)  # cases that ran to their end
    unreached: dict[str, list[str]] = field(default_factory=dict)
    took: dict[str, float] = field(default_factory=dict)
    known: dict[str, list[str]] = field(default_factory=dict)  # a part's cases
    child: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        name = "rehearsal" if self.rehearse else rows.slug(self.found["device"])
        self.path, self.log = self.out / f"{name}.jsonl", self.out / f"{name}.txt"
        self.common = {
            "device": self.found["device"],
            "commit": rows.commit(),
            "versions": rows.versions(*PACKAGES) | {"cuda": self.found["toolkit"]},
            "machine": rows.machine(),
        }
        if self.rehearse:
            self.common["rehearsal"] = True

    def record(self, part: str, row: dict[str, Any]) -> None:
        row = {"part": part, **row, "date": rows.now(), **self.common}
        self.measured.append(row)
        rows.append(self.path, [row])
        if row.get("ok") is False:
            what = f"{row['what']}: {row['figure']} {row['unit']}".strip()
            self.fail(part, row["case"], what)

    def fail(self, part: str, case: str, what: str, text: str = "") -> None:
        """One failure: counted, and told in full in the text file."""
        self.failures.append((part, case, what))
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"== {rows.now()} {part}, {case}: {what}\n{text.rstrip()}\n".rstrip() + "\n")

    def run(self, part: str, seconds: float) -> None:
        """A part, with a new process behind every case that does not end well."""
        begin = time.monotonic()
        end, skip, failed = begin + seconds, 0, 0
        self.passed[part] = 0
        while (done := self.process(part, skip, end - time.monotonic())) is not None:
            skip, failed = done + 1, failed + 1
            rest = self.known[part][skip:]
            if not rest:
                break
            if failed == RESTARTS or end - time.monotonic() < 5:
                self.unreached.setdefault(part, []).extend(rest)
                break
        self.took[part] = time.monotonic() - begin

    def process(self, part: str, skip: int, seconds: float) -> int | None:
        """One process of a part. Returns the case that it failed in, for another to go on behind
        it; None where there is nothing to go on with."""
        command = [sys.executable, "-m", "tools.contact", PARTS[part].module]
        command += ["--seconds", f"{seconds - 2:.1f}", "--folder", str(self.scratch)]
        command += ["--ceilings", json.dumps(self.ceilings), "--skip", str(skip)]
        command += ["--rehearse"] if self.rehearse else []
        with tempfile.TemporaryFile() as said:
            self.child = subprocess.Popen(
                command, cwd=ROOT, env=environment(self.rehearse), stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=said, start_new_session=True,
            )  # fmt: skip
            try:
                case, number, late = self.listen(part, self.child, seconds)
                if not late:  # it has closed its lines, and ends by itself
                    late = self.ends()
            finally:
                self.stop()
            status = self.child.wait()
            self.child = None
            if status == 0 and not late:
                return None
            said.seek(0)
            text = said.read().decode(errors="replace")
        tail = "\n".join(text.splitlines()[-TAIL:])
        last = tail.splitlines()[-1].strip() if tail else "it said nothing"
        why = f"exit status {status}: {last}"
        if status < 0:
            why = f"killed by {signal.Signals(-status).name}"
        why = late or why
        self.fail(part, case or "before its first case", why, tail)
        return None if case is None else number

    def listen(
        self, part: str, child: subprocess.Popen[bytes], seconds: float
    ) -> tuple[str | None, int, str]:
        """Take the lines of a process until it ends or its time is over: the case that it was in
        (None: in none), that case's number, and, where it was stopped, why."""
        assert child.stdout is not None
        begin, case, number = time.monotonic(), None, -1
        case_end = limit = begin + seconds
        held = b""
        with selectors.DefaultSelector() as selector:
            selector.register(child.stdout, selectors.EVENT_READ)
            while True:
                now = time.monotonic()
                if now > limit:
                    return case, number, f"stopped after {seconds:.0f} s, the part's limit"
                if case is not None and now > case_end:
                    return case, number, "stopped: it took too long"
                if not selector.select(timeout=0.2):
                    continue
                more = os.read(child.stdout.fileno(), 1 << 16)
                if not more:
                    return case, number, ""
                *lines, held = (held + more).split(b"\n")
                for line in lines:
                    told = json.loads(line)
                    if "cases" in told:
                        self.known[part] = told["cases"]
                    elif "begin" in told:
                        case, number, now = told["begin"], told["number"], time.monotonic()
                        # A case that hangs leaves time for the others, if there are any.
                        allowed = max((limit - now) * CASE_SHARE, CASE)
                        case_end = limit if told["last"] else now + allowed
                    elif "end" in told:
                        case = None
                        self.passed[part] += 1
                    elif "row" in told:
                        self.record(part, told["row"])
                    elif "fail" in told:
                        self.fail(part, case or "", told["fail"].splitlines()[0], told["fail"])
                    elif "skipped" in told:
                        self.unreached.setdefault(part, []).extend(told["skipped"])
                    elif "ceilings" in told:
                        self.ceilings = told["ceilings"]

    def ends(self) -> str:
        assert self.child is not None
        try:
            self.child.wait(timeout=15)
        except subprocess.TimeoutExpired:
            return "stopped: its process did not end"
        return ""

    def stop(self) -> None:
        """End the part's process and all that it started."""
        if self.child is not None:
            try:
                os.killpg(self.child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self.child.wait()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tools.first_contact", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--part", action="append", choices=tuple(PARTS), help="only this one")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="in all")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at tiny sizes")
    parser.add_argument("--list", action="store_true", help="the parts, and no more")
    args = parser.parse_args(argv)
    if not 0 < args.seconds < float("inf"):
        print(f"first contact: --seconds {args.seconds}: must be positive", file=sys.stderr)
        return 2
    if args.list:
        for name, part in PARTS.items():
            print(f"{name:<10} {part.share:>4.0f} s  {part.about}")
        return 0
    begin = time.monotonic()
    try:
        found = probe(args.rehearse)
    except ValueError as error:
        print(f"first contact: {error}", file=sys.stderr)
        return 2
    if args.rehearse:
        found["device"] = "cpu"
    with tempfile.TemporaryDirectory(prefix="first-contact-") as scratch:
        default = Path(tempfile.mkdtemp(prefix="rehearsal-")) if args.rehearse else rows.RESULTS
        out = Path(os.environ.get("OUT") or default)
        try:
            check = Check(found, out, args.rehearse, Path(scratch))
        except OSError as error:
            why = f"{error.strerror}; name a folder that can be written"
            print(f"first contact: OUT={str(out)!r}: {why}", file=sys.stderr)
            return 2
        names = list(dict.fromkeys(args.part or PARTS))
        stopped = go(check, names, begin + args.seconds - LAST)
        print(summary.text(check, names, stopped))
    return 1 if check.failures or check.unreached or stopped else 0


def go(check: Check, names: list[str], deadline: float) -> str:
    """The parts; what a part leaves of its time is the later ones'. Returns why it was stopped."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = {s: signal.signal(s, interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        for i, name in enumerate(names):
            shares = [PARTS[later].share for later in names[i:]]
            seconds = (deadline - time.monotonic()) * shares[0] / sum(shares)
            print(f"first contact: {name}, at most {max(seconds, 0):.0f} s", flush=True)
            if seconds < 5:
                check.unreached[name] = ["all of it"]
                continue
            check.run(name, seconds)
        return ""
    except KeyboardInterrupt as stop:
        check.stop()
        for name in names:
            if name not in check.took:
                check.unreached.setdefault(name, ["the rest"])
        return str(stop) or "SIGINT"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
