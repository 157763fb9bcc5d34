"""What both sides of the TRL comparison do: the prompts, the reward, the report of a step.

One GRPO step: 2 prompts x 8 samples x exactly 64 new tokens, every parameter trained in float32 by
AdamW, beta = 0.1 against a frozen reference. Imports neither TRL nor meal_fast.
"""

import argparse
import json
import platform
import resource
import sys
from collections.abc import Sequence

PROMPTS = (
    "How do tides work, and why are there usually two of them a day?",
    "My neighbour plays loud music every night. What should I say to him?",
)
SAMPLES = 8
NEW_TOKENS = 64
TEMPERATURE = 0.9
BETA = 0.1
LR = 1e-6
MAX_GRAD_NORM = 1.0


def reward(texts: Sequence[str]) -> list[float]:
    """The share of vowels: costs nothing, and differs between the samples of a prompt."""
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in texts]


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="a transformers folder")
    parser.add_argument("--steps", type=int, default=3, help="the first one warms up")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    return parser


def report_step(
    framework: str, step: int, seconds: float, tokens: int, parts: dict[str, float] | None = None
) -> None:
    """`parts`: seconds of each part of the step, where they are known."""
    row = {"framework": framework, "step": step, "seconds": round(seconds, 3), "tokens": tokens}
    shares = {name: round(value / seconds, 3) for name, value in (parts or {}).items()}
    print(json.dumps(row | ({"shares": shares} if shares else {})), flush=True)


def report_end(framework: str, **versions: str) -> None:
    """Peak resident memory of this process, loading the model included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    scale = 1 if sys.platform == "darwin" else 1024
    row = {
        "framework": framework,
        "peak_rss_bytes": peak * scale,
        "versions": {"python": platform.python_version(), **versions},
    }
    print(json.dumps(row), flush=True)
