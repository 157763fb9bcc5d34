"""Tokens through the model for each response kept, with the caches and without.

    python -m bench.redraws

8 prompts of 200 tokens; 4 responses of 64 tokens are kept of each, drawn 4 at a time. The reward is
a hash of the text, so that a response is kept with exactly the probability given, whatever it says.
Without caches every row computes its prompt again; nothing else differs. Rows go to
bench/results/cpu.jsonl.
"""

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import rows
from bench.sampler_side import Ours, texts
from meal_fast.config.config import RejectionConfig
from meal_fast.data_types import Prompt
from meal_fast.rollout import Request, Sampling, engine, rejection_sample

PROMPTS, TOKENS, KEEP, NEW = 8, 200, 4, 64


def score(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
    digests = [hashlib.blake2b(text.encode(), digest_size=4).digest() for text in responses]
    return torch.tensor([[int.from_bytes(d, "big") / 2**32] * 2 for d in digests])


def judge(reward: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, None]:
    return reward[:, 0], None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a transformers folder (default: the packaged model)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).resolve().parent / "results" / "cpu.jsonl"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.model is None:
        from meal_fast.data.assets import asset

        args.model = str(asset("smollm2-135m"))
    side = Ours(args.model)
    prompts = [Prompt(p, p) for p in texts(side.tokenizer, TOKENS, PROMPTS)]
    requests = [Request(p, None, KEEP) for p in prompts]
    found = []
    for acceptance in (0.5, 0.25, 0.1):
        config = RejectionConfig(
            rule="threshold", threshold=1 - acceptance, keep=KEEP, rounds=40, fallback="none"
        )
        sampling = Sampling(NEW, 1.0, seed=0, rng_key=(str(acceptance),))
        with engine(side.policy) as sampler:
            log = rejection_sample(sampler, requests, sampling, config, score, judge).log
        kept = log["kept"]
        without = (log["tokens_per_kept"] * kept + log["reused_tokens"]) / kept
        row = {
            "bench": "redraws",
            "date": rows.now(),
            "commit": rows.commit(),
            "command": "python -m bench.redraws",
            "machine": rows.machine(),
            "acceptance": acceptance,
            "tokens_per_kept": round(log["tokens_per_kept"], 1),
            "tokens_per_kept_without_caches": round(without, 1),
            "log": {name: round(value, 4) for name, value in log.items()},
        }
        found.append(row)
        print(
            f"acceptance {acceptance}: {row['tokens_per_kept']} tokens a kept response, "
            f"{row['tokens_per_kept_without_caches']} without caches; {int(log['drawn'])} drawn, "
            f"{int(log['cancelled'])} of them stopped, {int(log['rounds'])} rounds, "
            f"{int(kept)} kept",
            flush=True,
        )
    rows.append(args.results, found)


if __name__ == "__main__":
    main()
