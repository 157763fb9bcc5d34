"""A finished run folder, small and real: the tiny world's policy with random LoRA factors."""

import json
from pathlib import Path
from typing import Any

import torch

from meal_fast.config.config import Config, from_dict, to_dict
from meal_fast.data.objectives import load_objectives
from meal_fast.data.prompts import load_prompts
from meal_fast.data.reward_statistics import Normalizer
from meal_fast.data.toy import world_prompts
from meal_fast.evaluation.evaluator import evaluate
from meal_fast.models.policy import Policy, load_policy

NAMES = ("first", "second")


def tiny_config(**changes: Any) -> Config:
    values = {
        "objectives": [f"{name}=world:{name}" for name in NAMES],
        "policy": {
            "path": "world:tiny",
            "lora_rank": 4,
            "preference_text": "numbers",
            "device": "cpu",
        },
        "rollout": {"max_new_tokens": 6, "prompts": 2, "samples": 2},
        "evaluation": {"prompts": 5, "samples": 2, "grid": 5},
        "preference": {"grid": 3},
    }
    return from_dict(changes, from_dict(values))


def tiny_policy(config: Config, *, scale: float = 0.1) -> Policy:
    """The policy of the tiny world; its LoRA factors all drawn (scale 0: it is the base model)."""
    policy = load_policy(config.policy, config.names, seed=config.seed)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable:
            parameter.normal_(0.0, scale or 1.0, generator=generator).mul_(float(scale > 0))
    return policy


def build_run(run: Path, config: Config, *, scale: float = 0.1) -> Policy:
    """Writes what meal_fast.train leaves behind, as far as evaluation, report and chat read it."""
    run.mkdir()
    held_out = run / "prompts.txt"
    held_out.write_text("\n".join(world_prompts("tiny", "evaluation")) + "\n")
    config = from_dict({"prompts": {"evaluation": str(held_out)}}, config)
    policy = tiny_policy(config, scale=scale)
    policy.save(run / "policy")
    (run / "config.json").write_text(json.dumps(to_dict(config)))
    statistics = {
        "names": config.names,
        "normalizer": Normalizer.fit(torch.tensor([[0.5, 0.1], [0.0, 0.4]]), "max").to_dict(),
        "utopia": [2.2, 2.75],
        "mu_evaluation": 0.1,
    }
    (run / "statistics.json").write_text(json.dumps(statistics))
    updates = [
        {
            "update": i,
            "w": [0.5, 0.5],
            "score": -0.8 + i / 100,
            "kl": i / 1000,
            "normalized": {"first": 0.1 * i, "second": 0.2},
            **({"delta_norm": 0.1, "delta_cosine": 0.3} if i % 2 else {}),
        }
        for i in range(6)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(u) + "\n" for u in updates))
    return policy


def evaluated(run: Path, config: Config, policy: Policy, **more: Any) -> dict[str, Any]:
    """Evaluates a built run on its held-out prompts."""
    return evaluate(
        policy,
        load_objectives(config.objectives, torch.device("cpu")),
        Normalizer.fit(torch.eye(2), "max"),
        (1.1, 1.1),
        0.1,
        load_prompts(str(run / "prompts.txt"), "evaluation", whole=True),
        config,
        **more,
    )
