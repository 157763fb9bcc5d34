"""meal-fast's side: rollout, score and update on the workload of workload.py, one JSON line a step.

python -m bench.meal_step --model FOLDER --steps 3
"""

import hashlib
import itertools
import time

import torch
import transformers

import meal_fast
from bench import workload
from bench.endless import endless
from meal_fast import ops
from meal_fast.config.config import GRPOConfig, PolicyConfig
from meal_fast.data_types import Prompt, Scored
from meal_fast.models.policy import load_policy
from meal_fast.rollout import Request, rollout
from meal_fast.training.losses.grpo import grpo


def main() -> None:
    parser = workload.arguments(__doc__)
    parser.add_argument("--micro-tokens", type=int, default=640)
    parser.add_argument(
        "--recompute", choices=("on", "off"), default="on", help="on: as TRL's default"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    policy = load_policy(PolicyConfig(path=args.model, tuning="full", device="cpu"), ("a", "b"))
    endless(policy)  # what min_new_tokens does on the other side
    config = GRPOConfig(
        lr=workload.LR,
        beta=workload.BETA,
        reduce="grpo",
        max_grad_norm=workload.MAX_GRAD_NORM,
        micro_tokens=args.micro_tokens,
        recompute=args.recompute == "on",
    )
    optimizer = torch.optim.AdamW(policy.trainable, lr=config.lr, weight_decay=0.0, fused=True)
    requests = [
        Request(Prompt(hashlib.sha256(text.encode()).hexdigest(), text), None, workload.SAMPLES)
        for text in workload.PROMPTS
    ]
    for step in range(1, args.steps + 1):
        begin = time.perf_counter()
        rolled = rollout(
            policy,
            requests,
            max_new_tokens=workload.NEW_TOKENS,
            temperature=workload.TEMPERATURE,
            seed=0,
            rng_key=("bench", step),
        )
        marks = [time.perf_counter()]
        reward_RK = torch.tensor([workload.reward(rolled.texts)]).T
        score, advantage = ops.group_advantages(
            reward_RK,
            torch.ones(1),
            rolled.group_R,
            utopia=torch.zeros(1),
            scalarization="linear",
        )
        scored = Scored(reward_RK, score, advantage)
        marks.append(time.perf_counter())
        optimizer.zero_grad(set_to_none=True)
        grpo(policy, rolled, scored, config, workload.TEMPERATURE)
        marks.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(policy.trainable, config.max_grad_norm)
        optimizer.step()
        marks.append(time.perf_counter())
        seconds = marks[-1] - begin
        names = ("rollout", "reward", "loss", "update")
        spent = [b - a for a, b in itertools.pairwise([begin, *marks])]
        tokens = int(rolled.mask_RT.sum())
        if tokens != len(workload.PROMPTS) * workload.SAMPLES * workload.NEW_TOKENS:
            raise RuntimeError(f"{tokens} tokens sampled")
        parts = dict(zip(names, spent, strict=True))
        workload.report_step("meal-fast", step, seconds, tokens, parts)
    workload.report_end(
        "meal-fast",
        torch=torch.__version__,
        transformers=transformers.__version__,
        meal_fast=meal_fast.__version__,
        micro_tokens=str(args.micro_tokens),
        recompute=args.recompute,
    )


if __name__ == "__main__":
    main()
