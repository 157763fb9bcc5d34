"""One part of tools/first_contact.py in a process of its own: `python -m tools.contact PART`.

Its JSON lines go to standard output; whatever else is printed goes to standard error.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import json
import os
import sys
import time
from pathlib import Path

from tools.contact.here import Here


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.contact", description=__doc__)
    parser.add_argument("part", help="a module of this folder")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--folder", type=Path, required=True, help="scratch space")
    parser.add_argument("--ceilings", type=json.loads, default={}, help="as JSON")
    parser.add_argument("--skip", type=int, default=0, help="cases that were tried before")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    # Libraries print; the lines must stay readable.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    faulthandler.enable()
    device = "cpu" if args.rehearse else "cuda"
    here = Here(device, args.rehearse, deadline, args.folder, out, args.ceilings)
    if not here.ceilings and args.part != "ceilings":
        importlib.import_module("tools.contact.ceilings").measure(here)
    cases = importlib.import_module(f"tools.contact.{args.part}").cases(here)
    here.tell(cases=list(cases))
    for number, (name, run) in enumerate(cases.items()):
        if number < args.skip:
            continue
        if here.left() <= 0:
            here.tell(skipped=list(cases)[number:])
            break
        here.case = name
        here.tell(begin=name, number=number, last=number == len(cases) - 1)
        run()
        here.tell(end=name)
    sys.stderr.flush()
    # Not sys.exit: what was left half torn down by a library must not count as a failed part.
    out.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
