"""A row that is drawn after every push of weights, to see that vLLM answers with those weights.

With a_t the log-probability that vLLM gives its t-th token, b_t the policy's for the same tokens as
the learner computes it, and c_t the base model's, a push has arrived where

    max_t |a_t - b_t| ≤ TOLERANCE        and, where max_t |b_t - c_t| is far above rounding,
    Σ_t (a_t - c_t)(b_t - c_t) / Σ_t (b_t - c_t)² ≥ 1/2

the share of the adapter's effect that vLLM shows: 1 with it, 0 without, whatever the tolerance [R].
What changed less than rounding does cannot be told from what did not: the importance weights bear
it (`training.losses.grpo`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from meal_fast import ops
from meal_fast.models import shared_prefix
from meal_fast.models.network import Network
from meal_fast.models.policy import Policy

from ..sequence import Drawn, Tokens

LENGTH = 8  # tokens that are drawn
TEXT = "Say in a few words what the weather is like where you are, and what you will do today. "
# In natural logarithms. Between the learner's and vLLM's, of 4,096 tokens of SmolLM2-135M on a CPU,
# the most was 4.6e-5 in float32 and 0.37 in bfloat16 (there on average 0.043): docs/rollout.md.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.5}
ROUNDING = {torch.float32: 2e-4, torch.bfloat16: 0.25}  # above it the second rule holds


@dataclass(frozen=True)
class Canary:
    """The prefix that is answered, longer than a block of keys and values that are kept."""

    prefix: Tokens

    @classmethod
    def of(cls, policy: Policy, block: int) -> Canary:
        """Make it for a policy: a text of more than two blocks, where the context holds that."""
        for times in range(1, 1 + 2 * block):
            tokens = sum(policy.encode(TEXT * times), ())
            if len(tokens) > 2 * block or len(tokens) + len(TEXT) > policy.context:
                break
        return cls(tokens)

    def check(
        self,
        policy: Policy,
        network: Network | None,  # the reference, where that is what was pushed; None: the policy
        rows: Sequence[Drawn],  # what vLLM drew at temperature 1, of each task
        pushed: str,
    ) -> float:
        """Give max |a - b| over the rows. Raises ValueError where a push has not arrived."""
        dtype = policy.network.weight.dtype
        tolerance, rounding = TOLERANCE.get(dtype, 0.5), ROUNDING.get(dtype, 0.25)
        vllm = [torch.tensor(row.logp, dtype=torch.float64) for row in rows]
        own = self._logp(policy, nullcontext(network or policy.network), rows)
        gap = max(float((a - b).abs().max()) for a, b in zip(vllm, own, strict=True))
        said = ""
        if gap > tolerance:
            said = f"differ from the learner's by up to {gap:.2g} (rounding: {tolerance:g} at most)"
        # A full policy's base is read from its files for this: only to say what is wrong.
        if network is None and (policy.rank or said):
            base = self._logp(policy, policy.reference(), rows)
            for a, b, c in zip(vllm, own, base, strict=True):
                effect = b - c
                share = float((a - c) @ effect / (effect @ effect).clamp(min=1e-30))
                if float(effect.abs().max()) > rounding and share < 0.5:
                    said = f"show {share:.0%} of what sets the policy apart from its base model"
        if said:
            raise ValueError(
                f"rollout.backend='vllm': after {pushed} its log-probabilities of the canary row "
                f"{said}; it answers with other weights than the policy's: go on with --resume, "
                "which opens vLLM anew, or with rollout.backend=engine"
            )
        return gap

    @torch.no_grad()
    def _logp(
        self, policy: Policy, of: AbstractContextManager[Network], rows: Sequence[Drawn]
    ) -> list[Tensor]:
        """Give each row's log-probabilities at temperature 1, float64."""
        tokens_RT, _ = shared_prefix.pad([row.tokens for row in rows], policy.device)
        n = range(len(rows))
        lengths = [len(row.tokens) for row in rows]
        batch = shared_prefix.pack([self.prefix] * len(rows), n, lengths, tokens_RT, task_id=n)
        with of as network:
            logp_M, _ = ops.linear_logprob(
                batch.predicting(shared_prefix.forward(network.body, batch)),
                network.weight,
                tokens_RT.reshape(-1)[batch.sampled_M],
                bias=network.bias,
                softcap=network.softcap,
            )
        return list(logp_M.double().cpu().split(lengths))
