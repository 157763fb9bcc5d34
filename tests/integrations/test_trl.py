"""The TRL entries inside TRL's own GRPOTrainer. Needs TRL: `make test-trl`."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from meal_fast.data.toy import tiny_model, world_prompts
from meal_fast.integrations import trl as entries

pytestmark = pytest.mark.trl

STEPS, PROMPTS, SAMPLES, TOKENS = 2, 2, 4, 6
UTOPIA = [1.1, 1.1]
PREFERENCES = ([0.8, 0.2], [0.25, 0.75])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The world's random Llama: two layers, hidden width 32."""
    folder = tmp_path_factory.mktemp("world") / "tiny"
    tiny_model(folder)
    return folder


def share(letter: str):
    def reward(completions: list[str], **_: Any) -> list[float]:
        return [text.count(letter) / max(1, len(text)) for text in completions]

    reward.__name__ = letter
    return reward


def config(folder: Path, **changes: Any):
    from trl import GRPOConfig

    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": PROMPTS * SAMPLES,
        "num_generations": SAMPLES,
        "max_completion_length": TOKENS,
        "temperature": 0.9,
        "beta": 0.1,
        "entropy_coef": 0.01,
        "optim": "sgd",  # Adam would blow up the rounding of gradients near 0
        "learning_rate": 0.1,
        "bf16": False,
        "use_cpu": True,
        "model_init_kwargs": {"dtype": "float32"},
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 3,
    }
    return GRPOConfig(**values | changes)


def recorded(base: type) -> type:
    """A trainer that keeps every loss and every step's gradients."""
    from transformers import TrainerCallback

    class Recorded(base):
        def compute_loss(self, *args: Any, **kwargs: Any):
            loss = super().compute_loss(*args, **kwargs)
            self.losses.append(float(loss.detach()))
            return loss

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **_):
            named = model.named_parameters()
            seen.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    seen: list[dict[str, torch.Tensor]] = []
    Recorded.losses, Recorded.gradients, Recorded.callback = [], seen, Gradients
    return Recorded


def dataset(prompts: int = PROMPTS):
    from datasets import Dataset

    texts = world_prompts("tiny", "train")[:prompts]
    rows = [{"prompt": t, "preference": w} for t, w in zip(texts, PREFERENCES, strict=False)]
    return Dataset.from_list(rows * STEPS)


def train(base: type, model: Path, folder: Path, *, fused: bool, peft: bool, **changes: Any):
    from trl import GRPOTrainer

    adapter = None
    if peft:
        from peft import LoraConfig

        adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
    torch.manual_seed(0)  # LoRA's factors
    cls = recorded(base)
    options = {} if base is GRPOTrainer else {"utopia": UTOPIA}
    trainer = cls(
        model=str(model),
        reward_funcs=[share("a"), share("b")],
        args=config(folder, **changes),
        train_dataset=dataset(),
        callbacks=[cls.callback()],
        peft_config=adapter,
        **options,
    )
    if fused:
        assert entries.use_linear_logprob(trainer) is trainer
    trainer.train()
    return trainer


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"num_iterations": 2, "loss_type": "grpo"}],  # the second's ratios are not 1
    ids=["on-policy", "off-policy"],
)
def test_two_steps_with_and_without_the_op_agree(model, tmp_path, monkeypatch, peft, changes):
    from trl import GRPOTrainer

    theirs = train(GRPOTrainer, model, tmp_path / "theirs", fused=False, peft=peft, **changes)
    rows: list[int] = []

    def counted(hidden, *args, **kwargs):
        rows.append(len(hidden))
        return original(hidden, *args, **kwargs)

    original = entries.linear_logprob
    monkeypatch.setattr(entries, "linear_logprob", counted)
    ours = train(GRPOTrainer, model, tmp_path / "ours", fused=True, peft=peft, **changes)

    # The policy and the reference, and of them the completions' own tokens alone.
    assert len(rows) > len(ours.losses) and max(rows) <= PROMPTS * SAMPLES * TOKENS
    assert len(theirs.gradients) == len(ours.gradients) == STEPS
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-5, atol=1e-6)
    for mine, other in zip(ours.gradients, theirs.gradients, strict=True):
        assert mine.keys() == other.keys() and len(mine) > 0
        largest = max(float(g.abs().max()) for g in other.values())
        assert largest > 1e-5
        for name, gradient in mine.items():
            torch.testing.assert_close(gradient, other[name], rtol=1e-4, atol=1e-5 * largest)
    for name in ("entropy", "kl"):
        mine, other = ([row[name] for row in t.state.log_history[:STEPS]] for t in (ours, theirs))
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-6)
    assert ours.state.log_history[0]["entropy"] > 0


def test_the_model_answers_every_other_call_as_before(model, tmp_path):
    from trl import GRPOTrainer

    trainer = GRPOTrainer(
        model=str(model),
        reward_funcs=share("a"),
        args=config(tmp_path),
        train_dataset=dataset(),
    )
    ids = torch.tensor([[5, 6, 7, 8]])
    before = trainer.model(input_ids=ids, labels=ids)
    entries.use_linear_logprob(trainer)
    after = trainer.model(input_ids=ids, labels=ids)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)
    assert trainer.model.generate(ids, max_new_tokens=2, do_sample=False).shape == (1, 6)
    with pytest.raises(ValueError, match="labels=None"):
        trainer.model(input_ids=ids, fused_lm_head=True)


def by_hand(rewards: list[list[float]], preferences: list[list[float]]) -> list[float]:
    """The smooth Tchebycheff score's advantage in groups of SAMPLES, in Python's own numbers."""
    mu, score = 0.1, []
    for r, w in zip(rewards, preferences, strict=True):
        terms = [math.exp(wk * (z - rk) / mu) for wk, z, rk in zip(w, UTOPIA, r, strict=True)]
        score.append(-mu * math.log(sum(terms)))
    advantage = []
    for start in range(0, len(score), SAMPLES):
        group = score[start : start + SAMPLES]
        mean = sum(group) / SAMPLES
        std = math.sqrt(sum((s - mean) ** 2 for s in group) / (SAMPLES - 1))
        advantage += [(s - mean) / (std + 1e-4) for s in group]
    return advantage


@pytest.mark.parametrize("fused", [False, True], ids=["trl-head", "our-head"])
def test_preferences_decide_the_advantages(model, tmp_path, fused):
    base = entries.PreferenceGRPOTrainer
    batches: list[dict[str, Any]] = []

    class Watched(base):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            logged = {name: list(values) for name, values in self._logs["rewards"].items()}
            batches.append(
                {
                    "rewards": list(zip(logged["a"], logged["b"], strict=True)),
                    "preference": [row["preference"] for row in inputs],
                    "advantages": output["advantages"].tolist(),
                    "logged": list(self._logs["advantages"]),
                }
            )
            return output

    trainer = train(Watched, model, tmp_path, fused=fused, peft=False)
    assert trainer.state.global_step == STEPS == len(batches)
    for batch in batches:
        assert sorted(batch["preference"]) == sorted(list(PREFERENCES) * SAMPLES)
        expected = by_hand(batch["rewards"], batch["preference"])
        assert max(map(abs, expected)) > 0.5
        assert batch["advantages"] == pytest.approx(expected, abs=2e-3)
        assert batch["logged"] == batch["advantages"]
    history = trainer.state.log_history
    assert all({"score", "advantage_zero"} <= row.keys() for row in history[:STEPS])
    assert any(float(g.abs().max()) > 1e-5 for g in trainer.gradients[0].values())


def test_a_response_without_a_reward_is_dropped(model, tmp_path):
    def picky(completions: list[str], **_: Any) -> list[float | None]:
        return [None if i == 1 else float(i) for i in range(len(completions))]

    batches: list[list[float]] = []

    class Watched(entries.PreferenceGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            batches.append(output["advantages"].tolist())
            return output

    Watched(
        model=str(model),
        reward_funcs=[share("a"), picky],
        args=config(tmp_path, max_steps=1),
        train_dataset=dataset(),
        utopia=[1.1, 9.0],
    ).train()
    (advantages,) = batches
    assert advantages[1] == 0 and all(a != 0 for i, a in enumerate(advantages) if i != 1)
    assert sum(advantages[:SAMPLES]) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale_rewards": "batch"}, "scale_rewards"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
    ],
)
def test_options_that_leave_the_score_without_a_meaning_are_refused(
    model, tmp_path, changes, message
):
    with pytest.raises(ValueError, match=message):
        entries.PreferenceGRPOTrainer(
            model=str(model),
            reward_funcs=[share("a"), share("b")],
            args=config(tmp_path, **changes),
            train_dataset=dataset(),
            utopia=UTOPIA,
        )


def test_the_version_is_the_one_that_the_entries_were_written_for():
    import trl

    assert trl.__version__ == "1.16.0"
