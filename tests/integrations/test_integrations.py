"""The entries for other trainers, as far as they go without those: their mathematics and errors.

Inside TRL: test_integrations_trl.py. Against the functions that they replace in verl and OpenRLHF:
test_peers.py.
"""

import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from meal_fast.data.toy import tiny_model
from meal_fast.integrations import framework, openrlhf, preference_score, trl, verl
from meal_fast.ops import linear_logprob

UTOPIA = [1.1, 1.2]


def logp_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)


def test_importing_the_entries_imports_no_framework():
    code = (
        "import sys\n"
        "from meal_fast.integrations import openrlhf, trl, verl\n"
        "print(*{'trl', 'verl', 'openrlhf', 'transformers', 'peft'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize(
    ("missing", "use"),
    [
        ("trl", lambda: trl.PreferenceGRPOTrainer),
        ("trl.trainer.utils", lambda: trl.use_linear_logprob(None)),
        ("verl.trainer.ppo.core_algos", verl.register),
        ("openrlhf.models.actor", openrlhf.install),
    ],
)
def test_using_an_entry_without_its_framework_is_an_error_of_one_line(monkeypatch, missing, use):
    trl._preference_grpo_trainer.cache_clear()
    package = missing.partition(".")[0]
    monkeypatch.setitem(sys.modules, package, None)  # Python's way to say: cannot be imported
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ValueError, match=rf"^{missing}: .*; this entry needs {package}>=") as error:
        use()
    assert "\n" not in str(error.value)


def test_a_module_that_is_there_is_handed_over():
    assert framework("math", "python") is math


def test_an_unknown_name_is_not_the_trainer():
    with pytest.raises(AttributeError, match="Trainer2"):
        _ = trl.PreferenceGRPOTrainer2


# --- scores ------------------------------------------------------------------------------------


def test_preference_score_is_the_smooth_tchebycheff_score():
    rewards, preference = [[0.5, 0.3], [0.1, 1.0]], [[0.8, 0.2], [0.25, 0.75]]
    mu, expected = 0.1, []
    for r, w in zip(rewards, preference, strict=True):
        terms = [math.exp(wk * (z - rk) / mu) for wk, z, rk in zip(w, UTOPIA, r, strict=True)]
        expected.append(-mu * math.log(sum(terms)))
    score = preference_score(rewards, preference, utopia=UTOPIA)
    assert score.shape == (2,) and score.tolist() == pytest.approx(expected, rel=1e-6)
    one = preference_score([rewards[0]], preference[0], utopia=UTOPIA)  # one w for all
    assert float(one) == pytest.approx(expected[0], rel=1e-6)
    linear = preference_score([[1, 0]], [0.25, 0.75], utopia=None, scalarization="linear")
    assert linear.tolist() == [0.25]


@pytest.mark.parametrize(
    ("rewards", "preference", "message"),
    [
        ([[0.5, 0.3]], [[0.8, 0.3]], "simplex"),
        ([[0.5, 0.3]], [[0.8, 0.1, 0.1]], "weights: shape"),
        ([[0.5, float("nan")]], [[0.8, 0.2]], "not finite"),
        ([0.5, 0.3], [0.8, 0.2], "rewards.shape"),
    ],
)
def test_preference_score_names_what_is_wrong(rewards, preference, message):
    with pytest.raises(ValueError, match=message):
        preference_score(rewards, preference, utopia=UTOPIA)


def test_rows_of_a_dataset_carry_preferences():
    rows = [{"preference": [0.8, 0.2]}, {"preference": (1, 0)}]
    weights = trl._preferences(rows, "preference", 2)
    torch.testing.assert_close(weights, torch.tensor([[0.8, 0.2], [1.0, 0.0]]))
    for bad in ({}, {"preference": None}, {"preference": [1.0]}):
        with pytest.raises(ValueError, match=r"preference: row 1 has .* needs 2 numbers"):
            trl._preferences([rows[0], bad], "preference", 2)


# --- TRL's call of the model, on a model --------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "tiny"
    tiny_model(folder)
    return folder


@pytest.fixture
def trainer(folder, monkeypatch):
    """What `use_linear_logprob` reads of a trainer, and the model's plain logits before it."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(trl, "framework", lambda *_: SimpleNamespace(FusedCausalLMOutput=dict))
    return SimpleNamespace(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        ref_model=None,
        temperature=0.7,
        aux_loss_enabled=False,
        args=SimpleNamespace(cast_lm_head_to_fp32=False),
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
    )


def batch() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0  # padded on the left, as prompts are
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": mask}, labels


def expected_of(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    live = labels[:, 1:] != -100
    z = logits[:, :-1]
    entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)
    logp = logp_of(z, labels[:, 1:].clamp(min=0))
    return torch.where(live, logp, 0), torch.where(live, entropy, 0)


def test_the_fused_call_is_the_models_own_distribution(trainer):
    inputs, labels = batch()
    plain = trainer.model(**inputs).logits
    parameters = list(trainer.model.parameters())
    weights = torch.randn(2, 6, generator=torch.Generator().manual_seed(1))

    def gradients(logp, entropy):
        return torch.autograd.grad((logp * weights + 0.3 * entropy).sum(), parameters)

    logp, entropy = expected_of(plain / 0.7, labels)
    trl.use_linear_logprob(trainer)
    made = trainer.model(**inputs, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(made["log_probs"], logp, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made["entropy"], entropy, rtol=1e-5, atol=1e-6)
    assert made["label_mask"].sum() == (labels != -100).sum()
    mine = gradients(made["log_probs"], made["entropy"])
    for a, b in zip(mine, gradients(logp, entropy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-6)
    torch.testing.assert_close(trainer.model(**inputs).logits, plain, rtol=0, atol=0)
    with pytest.raises(ValueError, match="labels=None"):
        trainer.model(**inputs, fused_lm_head=True)


def test_a_batch_without_labelled_tokens_gives_zeros_with_a_gradient(trainer):
    inputs, labels = batch()
    trl.use_linear_logprob(trainer)
    made = trainer.model(**inputs, labels=torch.full_like(labels, -100), fused_lm_head=True)
    made["log_probs"].sum().backward()
    assert not made["log_probs"].any()
    assert all(not p.grad.any() for p in trainer.model.parameters() if p.grad is not None)


@pytest.mark.parametrize("wide", [False, True])
def test_autocast_reaches_the_head_as_it_reaches_a_linear_layer(trainer, wide):
    inputs, labels = batch()
    trainer.args.cast_lm_head_to_fp32 = wide
    seen: list[torch.dtype] = []

    def watched(hidden, weight, *args, **kwargs):
        seen.extend([hidden.dtype, weight.dtype])
        return linear_logprob(hidden, weight, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        patch.setattr(trl, "linear_logprob", watched)
        plain = trainer.model(**inputs).logits.float()
        trl.use_linear_logprob(trainer)
        made = trainer.model(**inputs, labels=labels, fused_lm_head=True)
    made["log_probs"].sum().backward()  # outside, where trainers have it
    logp, _ = expected_of(plain / 0.7, labels)
    torch.testing.assert_close(made["log_probs"], logp, rtol=0.02, atol=0.02)
    assert made["log_probs"].dtype == torch.float32
    assert seen[1] == (torch.float32 if wide else torch.bfloat16)
    assert trainer.model.lm_head.weight.grad.dtype == torch.float32


def test_the_softcap_of_the_configuration_is_kept(trainer):
    inputs, labels = batch()
    plain = trainer.model(**inputs).logits
    trainer.model.config.final_logit_softcapping = 0.5
    trl.use_linear_logprob(trainer)
    made = trainer.model(**inputs, labels=labels, fused_lm_head=True)
    logp, _ = expected_of((plain / 0.5).tanh() * 0.5 / 0.7, labels)
    torch.testing.assert_close(made["log_probs"], logp, rtol=1e-5, atol=1e-6)


def adapted(trainer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    trainer.model = get_peft_model(trainer.model, LoraConfig(r=2, target_modules=["lm_head"]))


def quantised(trainer: Any) -> None:
    class Quantised(torch.nn.Linear):
        pass

    trainer.model.lm_head.__class__ = Quantised


def sharded(trainer: Any) -> None:
    trainer.model.lm_head.weight.ds_id = 7


def scaled(trainer: Any) -> None:
    trainer.model.config.logits_scaling = 8.0


def routed(trainer: Any) -> None:
    trainer.aux_loss_enabled = True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (adapted, r"model: its head is a peft\.\S+, not"),
        (quantised, r"model: its head is a \S+\.Quantised, not"),
        (sharded, "model: its head is sharded"),
        (scaled, "logits_scaling=8.0"),
        (routed, "router_aux_loss_coef"),
    ],
)
def test_a_model_whose_logits_are_made_otherwise_is_refused(trainer, change, message):
    change(trainer)
    with pytest.raises(ValueError, match=message):
        trl.use_linear_logprob(trainer)


def test_a_trl_without_a_fused_head_is_too_old(trainer, monkeypatch):
    monkeypatch.setattr(trl, "framework", lambda *_: SimpleNamespace())
    with pytest.raises(ValueError, match=r"needs trl>=1\.16"):
        trl.use_linear_logprob(trainer)


# --- verl --------------------------------------------------------------------------------------


class Config(dict):
    """As verl's: attributes, and `get`."""

    __getattr__ = dict.__getitem__


def actor_config(**changes: Any) -> Config:
    values = {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": None}
    return Config(values | {"global_batch_info": {}} | changes)


def test_verl_policy_loss_token_by_token():
    ratio = torch.tensor([[1.1, 1.5, 0.5, 5.0, 0.5, 1.0]])
    advantage = torch.tensor([[2.0, 2.0, -2.0, -2.0, 2.0, 9.0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    logp = ratio.log()
    logp[0, 5] = torch.nan  # masked: may be anything
    logp.requires_grad_()
    config = actor_config(clip_ratio_high=0.3, clip_ratio_c=3.0)
    loss, metrics = verl.policy_loss(
        torch.zeros(1, 6), logp, advantage, mask, "token-sum", config=config
    )
    # clip to 1.3; -2 x max(0.5, 0.8); dual clip at 3 x 2; below the range costs nothing
    assert float(loss.detach()) == pytest.approx(-2.2 - 2.6 + 1.6 + 6.0 - 1.0, rel=1e-6)
    loss.backward()
    assert logp.grad.tolist()[0] == pytest.approx([-2.2, 0, 0, 0, -1.0, 0], abs=1e-6)
    assert metrics == {
        "actor/pg_clipfrac": pytest.approx(2 / 5),
        "actor/ppo_kl": pytest.approx(-float(ratio[0, :5].log().mean()), rel=1e-6),
        "actor/pg_clipfrac_lower": pytest.approx(1 / 5),
    }


MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)


@pytest.mark.parametrize("mode", MODES)
def test_verl_processes_and_micro_batches_add_up_to_the_whole_batch(mode):
    generator = torch.Generator().manual_seed(2)
    old, logp, advantage = torch.randn(3, 4, 5, generator=generator)
    mask = (torch.arange(5) < torch.tensor([5, 2, 3, 1])[:, None]).long()
    whole, _ = verl.policy_loss(old, logp, advantage, mask, mode, config=actor_config())
    sizes = {"dp_size": 2, "batch_num_tokens": int(mask.sum()), "global_batch_size": 4}
    config = actor_config(global_batch_info=sizes)
    parts = [
        verl.policy_loss(old[r], logp[r], advantage[r], mask[r], mode, config=config)[0]
        for r in (slice(0, 1), slice(1, 4))
    ]
    assert float(sum(parts)) / 2 == pytest.approx(float(whole), rel=1e-5)  # gradients are averaged


@pytest.mark.parametrize(
    ("mode", "changes", "message"),
    [
        ("token-mean", None, "config=None"),
        ("mean", {}, "loss_agg_mode='mean'"),
        ("token-mean", {"clip_ratio_c": 1.0}, "clip_ratio_c=1.0"),
        ("token-mean", {"global_batch_info": {"dp_size": 2}}, "batch_num_tokens=None"),
        (MODES[2], {"global_batch_info": {"dp_size": 2}}, "global_batch_size=None"),
    ],
)
def test_verl_policy_loss_names_what_is_wrong(mode, changes, message):
    x = torch.zeros(1, 2)
    config = None if changes is None else actor_config(**changes)
    with pytest.raises(ValueError, match=message):
        verl.policy_loss(x, x, x, x.long() + 1, mode, config=config)


def test_verl_advantages_from_columns_and_from_scores():
    rewards, weights = [[0.9, 0.1], [0.2, 0.8], [0.3, 0.3], [0.5, 0.9]], [[0.8, 0.2], [0.5, 0.5]]
    uid = ["x", "y", "x", "y"]
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]])
    w = [weights["xy".index(u)] for u in uid]
    columns = {
        "helpful": [r[0] for r in rewards],
        "harmless": [r[1] for r in rewards],
        "w_helpful": [v[0] for v in w],
        "w_harmless": [v[1] for v in w],
    }
    nothing = torch.zeros(4, 3)
    estimate = verl.advantage_estimator(["helpful", "harmless"], utopia=UTOPIA)
    advantage, returns = estimate(
        token_level_rewards=nothing,
        response_mask=mask,
        index=uid,
        non_tensor_batch=columns,
        batch={},
        config=Config(),
    )
    score = preference_score(rewards, w, utopia=UTOPIA)
    expected = torch.zeros(4)
    for rows in ([0, 2], [1, 3]):
        expected[rows] = (score[rows] - score[rows].mean()) / (score[rows].std() + 1e-4)
    torch.testing.assert_close(advantage, expected[:, None] * mask)
    assert returns is advantage

    # The same by the other way: the score on the last token, no columns.
    last = torch.zeros(4, 3).scatter(1, mask.sum(1, keepdim=True) - 1, score[:, None])
    scalar, _ = verl.advantage_estimator()(last, mask, uid)
    torch.testing.assert_close(scalar, advantage)
    bare, _ = verl.advantage_estimator()(
        last, mask, uid, config=Config(norm_adv_by_std_in_grpo=False)
    )
    centred = score.clone()
    for rows in ([0, 2], [1, 3]):
        centred[rows] -= score[rows].mean()
    torch.testing.assert_close(bare, centred[:, None] * mask)
    other = verl.advantage_estimator(["helpful"], preference=["w_all"], utopia=[1.0])
    for missing in (None, {"helpful": [1.0] * 4}):
        with pytest.raises(ValueError, match=r"not in the batch, which has .*preference_score"):
            other(nothing, mask, uid, non_tensor_batch=missing)


def test_verl_head():
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(1, 6, 8, generator=generator), torch.randn(11, 8)
    labels = torch.randint(0, 11, (1, 6), generator=generator, dtype=torch.int32)
    logp, entropy = verl.linear_cross_entropy(hidden, weight, labels, 0.5, "none")
    z = hidden[0] @ weight.t() / 0.5
    torch.testing.assert_close(logp, logp_of(z, labels[0].long()), rtol=1e-5, atol=1e-5)
    assert entropy.shape == logp.shape == (6,)
    with pytest.raises(ValueError, match="reduction='mean'"):
        verl.linear_cross_entropy(hidden, weight, labels, 0.5, "mean")
    with pytest.raises(ValueError, match="dist_process_group"):
        verl.linear_cross_entropy(hidden, weight, labels, 0.5, "none", object())


# --- OpenRLHF ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6,), (2, 5), (0,), (2, 3, 4)])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_from_logits(shape, temperature):
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(*shape, 13, generator=generator).requires_grad_()
    labels = torch.randint(0, 13, shape, generator=generator)
    upstream = torch.randn(shape, generator=generator)
    kept = logits.detach().clone()
    made = openrlhf.log_probs_from_logits(logits, labels, temperature)
    (gradient,) = torch.autograd.grad((made * upstream).sum(), logits)
    expected = logp_of(logits / temperature, labels)
    (other,) = torch.autograd.grad((expected * upstream).sum(), logits)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-6)
    assert torch.equal(logits, kept)


def test_log_probs_from_logits_by_finite_differences():
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 4, 2, 2])
    assert torch.autograd.gradcheck(
        lambda x: openrlhf.log_probs_from_logits(x, labels, 0.7), (logits,)
    )


def test_log_probs_of_bfloat16_logits_are_float32_and_the_gradient_is_not():
    logits = torch.randn(3, 7).bfloat16().requires_grad_()
    made = openrlhf.log_probs_from_logits(logits, torch.tensor([1, 2, 3]))
    made.sum().backward()
    assert made.dtype == torch.float32 and logits.grad.dtype == torch.bfloat16


def test_log_probs_from_hidden():
    hidden, weight, bias = torch.randn(2, 5, 8), torch.randn(13, 8), torch.randn(13)
    labels = torch.randint(0, 13, (2, 5))
    made = openrlhf.log_probs_from_hidden(hidden, weight, labels, 0.7, bias=bias)
    expected = openrlhf.log_probs_from_logits(hidden @ weight.t() + bias, labels, 0.7)
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("logits", "labels", "temperature", "message"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 3]), 1.0, r"outside \[0, 3\)"),
        (torch.zeros(2, 3), torch.tensor([0]), 1.0, "labels: shape"),
        (torch.zeros(2, 3).long(), torch.tensor([0, 1]), 1.0, "logits: dtype"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), 0.0, "temperature=0.0"),
    ],
)
def test_log_probs_from_logits_names_what_is_wrong(logits, labels, temperature, message):
    with pytest.raises(ValueError, match=message):
        openrlhf.log_probs_from_logits(logits, labels, temperature)
