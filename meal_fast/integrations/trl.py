"""TRL: fused log-probabilities for its GRPO trainer, and a GRPO trainer that takes preferences.

    from meal_fast.integrations.trl import PreferenceGRPOTrainer, use_linear_logprob

    rows = [
        {"prompt": f"{question}\n[helpful={w[0]:.2f} harmless={w[1]:.2f}]", "preference": w}
        for question, w in zip(questions, preferences)    # w on the simplex, e.g. [0.8, 0.2]
    ]
    trainer = PreferenceGRPOTrainer(
        model="Qwen/Qwen2-0.5B-Instruct",
        reward_funcs=[helpful, harmless],                 # K of them, in the order of w, utopia
        args=GRPOConfig(beta=0.04, temperature=0.9),
        train_dataset=Dataset.from_list(rows),
        utopia=[1.1, 1.1],
    )
    use_linear_logprob(trainer).train()

The two are independent: `use_linear_logprob` takes any GRPOTrainer of TRL, PreferenceGRPOTrainer
trains without it. Tested against TRL 1.16.0, on one process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from meal_fast.ops import group_advantages, linear_logprob

from . import framework

# TRL 1.16 made the fused head a part of the model's forward; before, trainers read its logits.
_REQUIREMENT = "trl>=1.16"
# Factors that some configurations multiply or divide their logits by.
_LOGIT_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def use_linear_logprob(trainer: Any, *, impl: str | None = None) -> Any:
    """Put `ops.linear_logprob` in place of the fused head of a TRL GRPOTrainer; give `trainer`.

    TRL calls ``model(..., labels=labels, fused_lm_head=True)`` and reads ``log_probs`` and
    ``entropy``. That call, of the policy and of the reference model, is answered here: the hidden
    states of the labelled tokens alone go through the head, at the trainer's temperature, with the
    configuration's softcap, and never as (N, V) logits. Every other call of the model is as before.

    Args:
        trainer: a `GRPOTrainer`, before `train()`. The model may be full or a PEFT adapter that
            leaves the head alone.
        impl: of `ops.linear_logprob`.

    Raises:
        ValueError: TRL is missing or too old; the head is not a plain, whole `nn.Linear` (adapted,
            quantised, or sharded by FSDP2 or ZeRO-3); the model scales its logits, or trains a
            router by its auxiliary loss.
    """
    output = framework("trl.trainer.utils", _REQUIREMENT)
    if not hasattr(output, "FusedCausalLMOutput"):
        raise ValueError(f"trl: has no fused head to replace; this entry needs {_REQUIREMENT}")
    if trainer.aux_loss_enabled:
        raise ValueError("router_aux_loss_coef: not 0, but router losses are not made here; set 0")
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            model = trainer.accelerator.unwrap_model(model)
            model = model.get_base_model() if hasattr(model, "get_base_model") else model
            wide = bool(trainer.args.cast_lm_head_to_fp32)
            _answer(model, trainer.temperature, wide, output.FusedCausalLMOutput, impl)
    return trainer


def _answer(
    model: Any, temperature: float, wide: bool, output: Callable[..., Any], impl: str | None
) -> None:
    config = model.config.get_text_config()
    for name in _LOGIT_SCALES:
        if getattr(config, name, None) not in (None, 1):
            raise ValueError(f"{name}={getattr(config, name)}: models with one are not supported")
    softcap = getattr(config, "final_logit_softcapping", None)
    _head(model)
    before = model.forward

    @functools.wraps(type(model).forward)  # `generate` looks for its arguments in the signature
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            return before(*args, **kwargs, **({} if labels is None else {"labels": labels}))
        if labels is None:
            raise ValueError("labels=None: the fused head needs the labels, unshifted")
        hidden = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state[:, :-1]
        live = labels[:, 1:] != -100
        head = _head(self)  # again: PEFT may have replaced it since
        weight, bias = head.weight, head.bias
        device = hidden.device.type
        if torch.is_autocast_enabled(device) and not wide:
            # What autocast does to a linear layer; to the inside of an op it would do more.
            dtype = torch.get_autocast_dtype(device)
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        with torch.autocast(device, enabled=False):
            logp, entropy = linear_logprob(
                hidden[live],
                weight,
                labels[:, 1:][live],
                temperature=temperature,
                bias=bias,
                softcap=softcap,
                impl=impl,
            )

        def padded(values: Tensor) -> Tensor:
            return values.new_zeros(live.shape).masked_scatter(live, values)

        return output(log_probs=padded(logp), entropy=padded(entropy), label_mask=live)

    model.forward = MethodType(forward, model)


def _head(model: Any) -> nn.Linear:
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:  # a subclass has a product of its own
        kind = f"{type(head).__module__}.{type(head).__name__}"
        raise ValueError(f"model: its head is a {kind}, not a plain torch.nn.Linear")
    if hasattr(head.weight, "full_tensor") or hasattr(head.weight, "ds_id"):
        raise ValueError("model: its head is sharded; keep the head whole on every process")
    return head


@functools.cache
def _preference_grpo_trainer() -> type:
    grpo_trainer: Any = framework("trl", _REQUIREMENT).GRPOTrainer

    class PreferenceGRPOTrainer(grpo_trainer):
        """TRL's GRPOTrainer with advantages from K rewards and one preference a row.

        Rewards (R, K) of the K `reward_funcs` and the dataset's column of preferences w (R, K)
        become the score S = -μ log Σ_k exp(w_k (z*_k - r_k) / μ) and its advantage in the group
        [P], by `ops.group_advantages`, in place of TRL's weighted sum. TRL has no seam between
        rewards and advantages, so two of its methods are extended, by their results alone:
        `_calculate_rewards` is where rewards and rows are at hand, and the batch that
        `_generate_and_score_completions` returns is where advantages are put.

        A response that any reward function returns None (or NaN) for is dropped from its group and
        has advantage 0. The metric ``score`` is the mean of S, ``advantage_zero`` the share of
        responses without a signal. TRL's own metrics of rewards are as ever; its ``reward``,
        ``reward_std`` and ``frac_reward_zero_std`` speak of the sum by `reward_weights`, which
        nothing is trained on here.

        The policy must be told w: write it into the prompt, as in this module's example.

        Args: as GRPOTrainer, and by name
            utopia: (K,), z*, above every reachable reward; None only for ``linear``.
            preference: the dataset's column, K non-negative numbers a row that sum to 1.
            mu, scalarization, offset, divisor: of `ops.group_advantages`.

        Raises:
            ValueError: TRL is missing or too old; a row's preference is missing, of the wrong
                length or off the simplex; `scale_rewards="batch"` or normalize_then_sum, for which
                the score has no meaning.
        """

        def __init__(
            self,
            *args: Any,
            utopia: Sequence[float] | None,
            preference: str = "preference",
            mu: float = 0.1,
            scalarization: str = "smooth-tchebycheff",
            offset: Sequence[float] | None = None,
            divisor: Sequence[float] | None = None,
            **kwargs: Any,
        ) -> None:
            super().__init__(*args, **kwargs)
            self.preference_column = preference
            self.preference_options: dict[str, Any] = {
                "utopia": utopia,
                "mu": mu,
                "scalarization": scalarization,
                "offset": offset,
                "divisor": divisor,
                "scale": {"group": "std", "none": "none"}.get(self.scale_rewards),
            }
            if self.preference_options["scale"] is None:
                raise ValueError(f"scale_rewards={self.scale_rewards!r}: choose 'group' or 'none'")
            if self.multi_objective_aggregation != "sum_then_normalize":
                raise ValueError(
                    f"multi_objective_aggregation={self.multi_objective_aggregation!r}: the score "
                    "is of raw rewards; leave it at 'sum_then_normalize'"
                )
            if self.args.remove_unused_columns:
                raise ValueError("remove_unused_columns=True: removes the preferences; set False")

        def _calculate_rewards(self, inputs: list[dict[str, Any]], *args: Any) -> Tensor:
            rewards: Tensor = super()._calculate_rewards(inputs, *args)  # of every process: (R, K)
            weights = _preferences(inputs, self.preference_column, rewards.shape[1])
            weights = self.accelerator.gather(weights.to(rewards.device))
            samples = self.num_generations if self.model.training else self.num_generations_eval
            score, self.preference_advantage = group_advantages(
                rewards,
                weights,
                torch.arange(len(rewards), device=rewards.device) // samples,
                keep=rewards.isfinite().all(1),
                check=True,  # TRL waits for the device here anyway
                **self.preference_options,
            )
            self._log_metric("score", float(score.nanmean()))
            zero = self.preference_advantage == 0
            self._log_metric("advantage_zero", float(zero.float().mean()))
            return rewards

        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            output: dict[str, Any] = super()._generate_and_score_completions(inputs)
            advantage = self.preference_advantage
            start = self.accelerator.process_index * len(inputs)
            output["advantages"] = advantage[start : start + len(inputs)]
            logged = self._logs["advantages"]  # a deque: TRL's own, of this batch, are its last
            for _ in range(min(len(advantage), len(logged))):
                logged.pop()
            logged.extend(advantage.tolist())
            return output

    return PreferenceGRPOTrainer


def _preferences(rows: list[dict[str, Any]], column: str, k: int) -> Tensor:
    """(R, K) float32 from a column of the dataset's rows."""
    for number, row in enumerate(rows):
        w = row.get(column)
        if w is None or len(w) != k:
            raise ValueError(
                f"{column}: row {number} has {w!r}; every row needs {k} numbers, one a reward"
            )
    return torch.tensor([list(map(float, row[column])) for row in rows])


def __getattr__(name: str) -> Any:
    # A subclass needs its base: it is made when it is first asked for, as `import` does too.
    if name == "PreferenceGRPOTrainer":
        return _preference_grpo_trainer()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
