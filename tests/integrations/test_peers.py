"""Our functions against those that they replace in verl and OpenRLHF, at pinned versions.

Neither can be imported where these tests run: verl brings Ray, OpenRLHF DeepSpeed. So the functions
are taken out of the source in the wheels that `make test-trl` fetches, and run by themselves.
PEERS names the folder with the wheels.
"""

import __future__

import ast
import os
import zipfile
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import numpy as np
import pytest
import torch

from meal_fast.integrations import openrlhf, verl

pytestmark = pytest.mark.trl

VERL, OPENRLHF = "verl-0.9.1", "openrlhf-0.11.2"
SHAPE = (6, 9)


def taken(wheel: str, module: str, *names: str, **known: Any) -> list[Any]:
    """Functions and classes from a module's source in a wheel, without its imports."""
    (path,) = Path(os.environ["PEERS"]).glob(f"{wheel}-*.whl")
    with zipfile.ZipFile(path) as archive:
        (member,) = (n for n in archive.namelist() if n.endswith(module))
        tree = ast.parse(archive.read(member))
    kinds = (ast.FunctionDef, ast.ClassDef)
    wanted = [node for node in tree.body if isinstance(node, kinds) and node.name in names]
    for node in wanted:
        node.decorator_list = []  # they only register
    flags = __future__.annotations.compiler_flag  # types are names that nobody looks up
    scope = {"torch": torch, "Optional": Optional, **known}
    exec(compile(ast.Module(wanted, []), member, "exec", flags, dont_inherit=True), scope)
    return [scope[name] for name in names]


class Config(dict):
    """As verl's configs are read: by attribute, and by `get`."""

    __getattr__ = dict.__getitem__


def policy_loss_of_verl() -> Any:
    total, mean = taken(VERL, "verl/utils/torch_functional.py", "masked_sum", "masked_mean")
    loss, _ = taken(
        VERL,
        "verl/trainer/ppo/core_algos.py",
        "compute_policy_loss_vanilla",
        "agg_loss",
        verl_F=SimpleNamespace(masked_sum=total, masked_mean=mean),
        AlgoConfig=type(None),  # a check that the config is not one
    )
    return loss


def lengths(generator: torch.Generator) -> torch.Tensor:
    length = torch.randint(1, SHAPE[1] + 1, (SHAPE[0], 1), generator=generator)
    return (torch.arange(SHAPE[1]) < length).long()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"dp_size": 2, "batch_num_tokens": 70}])
@pytest.mark.parametrize(
    "mode",
    [
        "token-mean",
        "token-sum",
        "seq-mean-token-sum",
        "seq-mean-token-sum-norm",
        "seq-mean-token-mean",
    ],
)
def test_policy_loss_is_verls_vanilla_one(mode, sizes, weighted):
    theirs = policy_loss_of_verl()
    sizes = sizes and sizes | {"global_batch_size": 12, "loss_scale_factor": 16}
    seen = 0.0
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        old, logp, advantage = torch.randn(3, *SHAPE, generator=generator) * 1.2
        weights = torch.rand(SHAPE, generator=generator) * 2 if weighted else None
        config = Config(
            clip_ratio=0.2,
            clip_ratio_low=0.1,
            clip_ratio_high=None,
            clip_ratio_c=2.5,
            global_batch_info=dict(sizes),
        )
        answers = []
        for function in (theirs, verl.policy_loss):
            x = logp.clone().requires_grad_()
            loss, metrics = function(
                old,
                x,
                advantage,
                lengths(generator.manual_seed(seed)),
                loss_agg_mode=mode,
                config=config,
                rollout_is_weights=weights,
            )
            answers.append((loss.detach(), *torch.autograd.grad(loss, x), metrics))
        (a, da, ma), (b, db, mb) = answers
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(db, da, rtol=1e-5, atol=1e-6)
        assert mb == pytest.approx(ma, rel=1e-5)
        seen += ma["actor/pg_clipfrac_lower"]
    assert seen > 0  # the dual clip was met


@pytest.mark.parametrize("by_std", [True, False])
def test_advantages_of_scores_are_verls_grpo_ones(by_std):
    (theirs,) = taken(
        VERL,
        "verl/trainer/ppo/core_algos.py",
        "compute_grpo_outcome_advantage",
        np=np,
        defaultdict=defaultdict,
    )
    generator = torch.Generator().manual_seed(5)
    mask = lengths(generator)
    rewards = torch.randn(SHAPE, generator=generator) * mask
    uid = np.array(["p", "q", "p", "p", "q", "p"], dtype=object)
    expected, _ = theirs(rewards.clone(), mask, uid, norm_adv_by_std_in_grpo=by_std)
    estimate = verl.advantage_estimator(epsilon=1e-6)
    made, returns = estimate(rewards, mask, uid, norm_adv_by_std_in_grpo=by_std)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(returns, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_head_is_verls_torch_one(temperature):
    """The Triton function that ours replaces needs a GPU; this is verl's other one for the CPU."""
    *_, theirs = taken(
        VERL,
        "verl/utils/experimental/torch_functional.py",
        "_fused_linear_for_ppo_fwd",
        "_fused_linear_for_ppo_bwd",
        "FusedLinearForPPOFunction",
        _FLASH_ATTN_CROSS_ENTROPY_AVAILABLE=False,
    )
    generator = torch.Generator().manual_seed(6)
    hidden = torch.randn(1, 20, 16, generator=generator)
    weight = torch.randn(41, 16, generator=generator)
    labels = torch.randint(0, 41, (1, 20), generator=generator)
    upstream = torch.randn(2, 20, generator=generator)
    answers = []
    for function, rest in ((theirs.apply, (8,)), (verl.linear_cross_entropy, ("none",))):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logp, entropy = function(h, w, labels, temperature, *rest)
        both = torch.stack([logp.flatten(), entropy.flatten()])
        answers.append((both.detach(), *torch.autograd.grad((both * upstream).sum(), (h, w))))
    for a, b in zip(*answers, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_from_logits_are_openrlhfs(dtype, tolerance, temperature):
    theirs, _ = taken(
        OPENRLHF,
        "openrlhf/models/utils.py",
        "log_probs_from_logits",
        "_logsumexp_by_chunk",
        F=torch.nn.functional,
    )
    generator = torch.Generator().manual_seed(7)
    logits = (torch.randn(3, 8, 41, generator=generator) * 3).to(dtype)
    labels = torch.randint(0, 41, (3, 8), generator=generator)
    upstream = torch.randn(3, 8, generator=generator)
    answers = []
    for function in (theirs, openrlhf.log_probs_from_logits):
        x = logits.clone().requires_grad_()
        logp = function(x * 1, labels, temperature)  # theirs divides its argument in place
        answers.append((logp.float().detach(), *torch.autograd.grad((logp * upstream).sum(), x)))
    for a, b in zip(*answers, strict=True):
        torch.testing.assert_close(b, a, rtol=10 * tolerance, atol=10 * tolerance)
