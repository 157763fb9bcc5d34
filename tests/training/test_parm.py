"""PARM: the adapter, its loss and guided decoding against what can be computed by hand."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from meal_fast.chat import main as chat
from meal_fast.config.config import Config, from_dict
from meal_fast.config.presets import preset
from meal_fast.config.run_dir import read_config
from meal_fast.data.objectives import load_objectives
from meal_fast.data.reward_statistics import Scales
from meal_fast.data_types import Prompt, Scored
from meal_fast.models.guided import guided
from meal_fast.models.model_soup import load_served
from meal_fast.models.pblora import Adapter, Bilinear
from meal_fast.models.policy import GUIDE, Policy, load_policy
from meal_fast.rollout import Request, Sampling, engine, rollout
from meal_fast.training.collectors.base import BaseSamples
from meal_fast.training.losses.parm import orders, pair_loss, parm
from meal_fast.training.losses.sequences import packed
from meal_fast.training.trainer import Trainer
from tests.helpers.models import small_model
from tests.helpers.processes import assert_same_runs, refused, stopped, train_here, updates
from tests.helpers.recorded import task
from tests.training.test_grpo import gradients

PROMPTS = [Prompt("a", "Write a short word."), Prompt("b", "Say more."), Prompt("c", "Hi")]
EVEN = (0.5, 0.5)
FUNCTIONS = ("first", "second", "first")
OWN = ((0.7, 0.3), (0.0, 1.0), EVEN)


def parm_config(**sections) -> Config:
    return from_dict({"recipe": "parm", **sections}, preset("tiny"))


def guide_policy(seed: int = 1, **policy) -> Policy:
    """A policy whose guide differs from the base, and from w to w."""
    config = parm_config(policy=policy)
    loaded = load_policy(config.policy, config.names, seed=config.seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in loaded.adapter.layers.values():
            for factor in (layer.b1, layer.b2):
                factor.normal_(0, 0.1, generator=generator)
    return loaded


@pytest.fixture(scope="module")
def policy():
    return guide_policy()


# --- the adapter -------------------------------------------------------------------------------


def by_hand() -> Bilinear:
    layer = Bilinear(nn.Linear(2, 2), k=2, rank=2, scale=3.0)
    with torch.no_grad():
        layer.base_layer.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        layer.base_layer.bias.copy_(torch.tensor([0.5, -0.5]))
        layer.a1.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        layer.w1.copy_(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
        layer.b1.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        layer.a2.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
        # reshape(P w) = w_1 [[1, 2], [3, 4]] + w_2 [[0, 0], [8, 0]]
        layer.p.copy_(torch.tensor([[[1.0, 0.0], [2.0, 0.0]], [[3.0, 8.0], [4.0, 0.0]]]))
        layer.b2.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.5]]))
    return layer


# B1 W1 A1 = [[0, 2], [2, 0]]. At w = (1, 0), B2 [[1, 2], [3, 4]] A2 = [[3, -1], [3.5, -0.5]]; at
# w = (1/4, 3/4), reshape(P w) = [[1/4, 1/2], [27/4, 1]] and B2 … A2 = [[3/4, -1/4], [31/8, 23/8]].
DELTAS = {
    (1.0, 0.0): [[9.0, 3.0], [16.5, -1.5]],
    (0.25, 0.75): [[2.25, 5.25], [17.625, 8.625]],
}


@pytest.mark.parametrize("w", DELTAS)
def test_the_delta_is_the_one_computed_by_hand(w):
    layer = by_hand()
    torch.testing.assert_close(layer.delta(torch.tensor(w)), torch.tensor(DELTAS[w]))
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
    expected = x @ torch.tensor(DELTAS[w]).T + x + torch.tensor([0.5, -0.5])
    layer.w = torch.tensor(w)
    torch.testing.assert_close(layer(x), expected)
    layer.merged = layer.base_layer.weight + layer.delta(torch.tensor(w))
    torch.testing.assert_close(layer(x), expected)
    layer.w = None
    torch.testing.assert_close(layer(x), layer.base_layer(x))


def test_every_place_has_its_own_preference():
    layer = by_hand()
    x = torch.tensor([[[1.0, 2.0], [-1.0, 0.5], [1.0, 2.0]]])
    layer.w = torch.tensor([(1.0, 0.0), (0.25, 0.75), (0.25, 0.75)])
    together = layer(x)
    for place, w in enumerate(layer.w.unbind()):
        layer.w = w
        torch.testing.assert_close(together[:, place], layer(x[:, place]))
    assert not torch.allclose(together[0, 0], together[0, 2])


def test_the_guide_starts_as_the_base_and_all_factors_get_a_gradient_soon():
    config = parm_config()
    fresh = load_policy(config.policy, config.names, seed=3)
    ids = torch.tensor([[5, 6, 7]])

    def hidden():
        return fresh.network.body(input_ids=ids, use_cache=False).last_hidden_state

    base = hidden()
    with fresh.adapter.at(torch.tensor([0.3, 0.7])):
        torch.testing.assert_close(hidden(), base, rtol=0, atol=0)
        hidden().square().sum().backward()
        layer = next(iter(fresh.adapter.layers.values()))
        assert layer.b1.grad.any() and layer.b2.grad.any()
        assert not layer.p.grad.any()  # B2 = 0
    assert len(fresh.trainable) == 6 * len(fresh.adapter.layers)
    assert all(p.dtype == torch.float32 for p in fresh.trainable)
    assert "lm_head" not in fresh.adapter.layers
    other = load_policy(config.policy, config.names, seed=4)
    assert not torch.equal(layer.a1, next(iter(other.adapter.layers.values())).a1)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no plain linear layers"):
        Adapter(small_model("gpt2"), 2, 4, 8, seed=0)


# --- the loss ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rolled(policy):
    """Base samples of three prompts, each with a preference of its own, of uneven lengths."""
    with policy.reference() as base:
        out = rollout(
            policy,
            [
                Request(p, w, 4)
                for p, w in zip(PROMPTS, [(0.7, 0.3), (0.0, 1.0), EVEN], strict=True)
            ],
            max_new_tokens=7,
            temperature=0.9,
            seed=0,
            network=base,
        )
    lengths = 2 + torch.arange(12)[:, None] % 5
    return dataclasses.replace(
        out, mask_RT=out.mask_RT & (torch.arange(out.mask_RT.shape[1]) < lengths)
    )


# Objective 1 orders five pairs, objective 2 three; the last pair is ordered by neither.
REWARD = torch.tensor(
    [
        *([0.1, 0.4], [0.3, 0.2], [0.5, 0.5], [0.4, 0.5], [0.0, 0.0], [1.0, 0.0]),
        *([2.0, 1.0], [1.0, 2.0], [0.7, 0.1], [0.6, 0.6], [0.3, 0.3], [0.3, 0.3]),
    ]
)


def scored():
    return Scored(REWARD, REWARD.sum(1), REWARD.sum(1))


def reward_of(policy, rolled, row):
    """log pi_w(y|x) of one row alone, at its w, from full logits."""
    prefix = rolled.prefix[int(rolled.group_R[row])]
    tokens = rolled.tokens_RT[row][rolled.mask_RT[row]]
    ids = torch.tensor([[*prefix, *tokens.tolist()]])
    with policy.adapter.at(rolled.condition_RK[row]):
        hidden = policy.network.body(input_ids=ids, use_cache=False).last_hidden_state[0]
    logp = torch.log_softmax(hidden[-len(tokens) - 1 : -1] @ policy.network.weight.T, -1)
    return logp.gather(1, tokens[:, None]).sum()


@pytest.mark.parametrize(("budget", "recompute"), [(40, False), (4000, False), (40, True)])
def test_loss_and_gradient_equal_the_plain_computation(policy, rolled, budget, recompute):
    beta_r, loss = 0.7, torch.zeros(())
    r = [reward_of(policy, rolled, row) for row in range(12)]
    margins, weights = [], []
    for k in range(2):
        ordered = [p for p in range(6) if REWARD[2 * p, k] != REWARD[2 * p + 1, k]]
        assert len(ordered) == (5, 3)[k]
        for p in ordered:
            best, worst = sorted((2 * p, 2 * p + 1), key=lambda row: -float(REWARD[row, k]))
            margin = beta_r * (r[best] - r[worst])
            weight = float(rolled.condition_RK[2 * p, k]) / len(ordered)
            loss = loss + weight * torch.log(1 + torch.exp(-margin))
            margins.append(float(margin.detach()))
            weights.append(weight)
    loss.backward()
    expected = gradients(policy)
    config = dataclasses.replace(parm_config().grpo, micro_tokens=budget, recompute=recompute)
    metrics = parm(policy, rolled, scored(), config, 0.9, beta_r=beta_r)
    found = gradients(policy)
    assert float(metrics["loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
    mean = sum(m * w for m, w in zip(margins, weights, strict=True)) / sum(weights)
    assert float(metrics["margin"]) == pytest.approx(mean, rel=1e-4)
    right = sum(w for m, w in zip(margins, weights, strict=True) if m > 0) / sum(weights)
    assert float(metrics["accuracy"]) == pytest.approx(right, rel=1e-5)
    assert int(metrics["pairs"]) == 5
    assert expected.keys() == found.keys() and len(found) == len(policy.trainable)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    assert policy.adapter.w is None


def test_one_pair_by_hand():
    """r = -1 and -3, beta_r 0.5, w = (0.75, 0.25), and objectives that order it oppositely."""
    w_RK = torch.tensor([[0.75, 0.25]] * 2)
    sign_PK, share_PK = orders(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), w_RK)
    assert sign_PK.tolist() == [[1.0, -1.0]] and share_PK.tolist() == [[0.75, 0.25]]
    r_P2 = torch.tensor([[-1.0, -3.0]], requires_grad=True)
    loss, margin_PK = pair_loss(r_P2, sign_PK, share_PK, 0.5)
    assert margin_PK.tolist() == [[1.0, -1.0]]
    # 0.75 log(1 + e^-1) + 0.25 log(1 + e)
    assert float(loss.detach()) == pytest.approx(0.75 * 0.3132617 + 0.25 * 1.3132617, abs=1e-6)
    loss.backward()
    slope = 0.5 * (-0.75 * 0.2689414 + 0.25 * 0.7310586)  # sigma(-1), sigma(1)
    assert r_P2.grad.tolist()[0] == pytest.approx([slope, -slope], abs=1e-6)


def test_the_places_of_a_packed_batch_know_their_prefix(rolled):
    rows = [2, 3, 8, 9, 10]
    batch = packed(rolled, rows)
    groups = [0, 2]
    lengths = [len(rolled.prefix[g]) for g in groups]
    expected = [g for g, n in enumerate(lengths) for _ in range(n)]
    for row in rows:
        n = int(rolled.mask_RT[row].sum()) - 1
        expected += [groups.index(int(rolled.group_R[row]))] * n
    assert batch.group_N.tolist() == expected
    one = dataclasses.replace(rolled, mask_RT=rolled.mask_RT & (torch.arange(7) < 1)[None])
    assert len(packed(one, rows).group_N) == sum(lengths)


def test_pairs_without_an_order_give_no_gradient(policy, rolled):
    equal = dataclasses.replace(scored(), reward_RK=torch.ones(12, 2))
    metrics = parm(policy, rolled, equal, parm_config().grpo, 0.9, beta_r=0.1)
    assert gradients(policy) == {}
    assert {name: float(v) for name, v in metrics.items()} == {
        "loss": 0.0,
        "margin": 0.0,
        "accuracy": 0.0,
        "pairs": 0.0,
    }


def test_what_the_learner_refuses(policy, rolled):
    config, rewards = parm_config().grpo, scored()
    with pytest.raises(ValueError, match="even number"):
        odd = dataclasses.replace(rolled, group_R=torch.tensor([0] * 3 + [1] * 9))
        parm(policy, odd, rewards, config, 1.0, beta_r=0.1)
    with pytest.raises(ValueError, match="one preference"):
        mixed = rolled.condition_RK.clone()
        mixed[1] = torch.tensor([0.1, 0.9])
        mixed = dataclasses.replace(rolled, condition_RK=mixed)
        parm(policy, mixed, rewards, config, 1.0, beta_r=0.1)
    with pytest.raises(ValueError, match=r"beta_r=0\.0"):
        parm(policy, rolled, rewards, config, 1.0, beta_r=0.0)
    plain = from_dict({}, preset("tiny"))
    other = load_policy(plain.policy, plain.names)
    with pytest.raises(ValueError, match="no bilinear adapter"):
        parm(other, rolled, rewards, config, 1.0, beta_r=0.1)
    with pytest.raises(ValueError, match="has no guide"), guided(other, EVEN, 1.0):
        pass


# --- guided decoding ---------------------------------------------------------------------------


def plain_guided(w, beta, prefix, tokens, temperature, bias):
    """Log-probabilities by two models of transformers' own, the guide's weights summed by hand."""
    policy = guide_policy()
    base = AutoModelForCausalLM.from_pretrained(policy.causal_lm.config.name_or_path).eval()
    guide = AutoModelForCausalLM.from_pretrained(policy.causal_lm.config.name_or_path).eval()
    for model in (base, guide):
        model.lm_head.bias = bias
    for name, layer in policy.adapter.layers.items():
        w2 = sum(w[k] * layer.p[:, :, k] for k in range(2))
        delta = layer.b1 @ layer.w1 @ layer.a1 + layer.b2 @ w2 @ layer.a2
        guide.get_submodule(name).weight.data += layer.scale * delta.detach()
    ids = torch.tensor([[*prefix, *tokens]])
    with torch.no_grad():
        lb, lg = (m(input_ids=ids).logits[0, -len(tokens) - 1 : -1] for m in (base, guide))
    logits = F.log_softmax(lb, -1) + F.log_softmax(lg, -1) / beta
    logp = F.log_softmax(logits / temperature, -1)
    return logp.gather(1, torch.tensor(tokens)[:, None])[:, 0], F.log_softmax(lb / temperature, -1)


@pytest.mark.parametrize(("beta", "fixed", "join"), [(1.0, False, False), (0.4, True, True)])
def test_guided_log_probabilities_are_those_of_two_models(beta, fixed, join):
    """Prompts of several lengths, slots that are used again, both kinds of step, a head's bias."""
    policy, w = guide_policy(), (0.8, 0.2)
    bias = None
    if fixed:
        generator = torch.Generator().manual_seed(4)
        bias = nn.Parameter(torch.randn(len(policy.network.weight), generator=generator))
        policy.causal_lm.lm_head.bias = bias
    requests = [Request(p, w, 3) for p in PROMPTS]
    sampling = Sampling(max_new_tokens=6, temperature=0.9, seed=1)
    with guided(policy, w, beta), engine(policy, max_rows=4, join=join) as sampler:
        sampler.runner.fixed_shapes = fixed
        out = sampler.generate(requests, sampling)
        assert sampler.shape.layers == 2 * policy.causal_lm.config.num_hidden_layers
    differs = 0.0
    for row in range(9):
        tokens = out.tokens_RT[row][out.mask_RT[row]].tolist()
        prefix = out.prefix[int(out.group_R[row])]
        wanted, base = plain_guided(w, beta, prefix, tokens, 0.9, bias)
        torch.testing.assert_close(out.logp_RT[row][out.mask_RT[row]], wanted, rtol=0, atol=1e-4)
        own = base.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        differs = max(differs, float((own - wanted).abs().max()))
    assert differs > 0.1


def test_a_preference_steers_and_what_is_left_is_the_base(policy):
    requests = [Request(p, EVEN, 4) for p in PROMPTS]
    options = {"max_new_tokens": 6, "temperature": 1.0, "seed": 2}

    def base_texts():
        with policy.reference() as base:
            return rollout(policy, requests, network=base, **options).texts

    before, texts = base_texts(), []
    for w in ((1.0, 0.0), (0.0, 1.0), (1.0, 0.0)):
        with guided(policy, w, 1.0):
            texts.append(rollout(policy, requests, **options).texts)
            assert base_texts() == before  # the reference, within it
    assert texts[0] == texts[2] != texts[1]
    assert base_texts() == before
    with pytest.raises(ValueError, match="answers at one preference"):
        rollout(policy, requests, **options)
    for other in ("generate", "vllm"):
        with pytest.raises(ValueError, match=f"{other}.*capability 'any-network'"):
            rollout(policy, requests, **options, backend=other)
    for w, beta, said in (
        ((0.5, 0.5, 0.0), 1.0, "must be 2 numbers"),
        ((0.7, 0.7), 1.0, "summing to 1"),
        (EVEN, 0.0, r"beta=0\.0: must be positive"),
    ):
        with pytest.raises(ValueError, match=said), guided(policy, w, beta):
            pass


def test_in_bfloat16_the_factors_stay_apart():
    policy = guide_policy(dtype="bfloat16")
    with guided(policy, EVEN, 1.0):
        assert all(layer.merged is None for layer in policy.adapter.layers.values())
        out = rollout(
            policy, [Request(PROMPTS[0], EVEN, 2)], max_new_tokens=4, temperature=1.0, seed=0
        )
    assert torch.isfinite(out.logp_RT).all()


@pytest.mark.usefixtures("one_thread")
def test_a_trained_guide_steers_the_base_on_the_known_front(tmp_path):
    """24 updates on the concave front; the base model's mean rewards are about 0.2 in both."""
    config = from_dict(
        {
            "recipe": "parm",
            "meta": {"steps": 12, "tasks": 1},
            "rollout": {"samples": 16},
            "grpo": {"lr": 1e-2},
            "policy": {"lora_rank": 4, "lora_alpha": 8},
        },
        preset("concave-front"),
    )
    trainer = Trainer(config, tmp_path / "run")
    assert trainer.train()
    means = {}
    for w in ((1.0, 0.0), EVEN, (0.0, 1.0)):
        with guided(trainer.policy, w, 1.0):
            requests = [Request(trainer.prompts[0], w, 64)]
            texts = rollout(
                trainer.policy, requests, max_new_tokens=6, temperature=1.0, seed=0
            ).texts
        means[w] = trainer.objectives.rewards([""] * 64, texts).mean(0).tolist()
    assert means[1.0, 0.0][0] > 0.7 and means[1.0, 0.0][1] < 0.1, means
    assert means[0.0, 1.0][1] > 0.7 and means[0.0, 1.0][0] < 0.1, means
    assert min(means[EVEN]) > 0.15, means


# --- the experience ----------------------------------------------------------------------------


def test_samples_are_the_base_s_and_every_prompt_has_its_own_preference(policy):
    config = parm_config(parm={"alpha": 0.5})
    sample = torch.tensor([[0.0, 0.2], [0.4, 0.1], [0.2, 0.6]])
    source = BaseSamples(
        policy,
        load_objectives(config.objectives),
        Scales.fit(sample, config.score, standard=False),
        config,
        "linear",
    )
    batch = source.collect([task(PROMPTS, EVEN, ("test", 0))])
    w_BK = batch.rolled.condition_RK[::8]
    assert batch.rolled.condition_RK.tolist() == w_BK.repeat_interleave(8, 0).tolist()
    assert len(w_BK.unique(dim=0)) == 3 and not (w_BK * 10).round().div(10).equal(w_BK)
    torch.testing.assert_close(w_BK.sum(1), torch.ones(3))
    assert batch.log["w"] == pytest.approx(w_BK.mean(0).tolist())
    again = source.collect([task(PROMPTS, (1.0, 0.0), ("test", 0))])  # the task's is not used
    assert again.rolled.texts == batch.rolled.texts
    assert source.collect([task(PROMPTS, EVEN, ("test", 1))]).rolled.texts != batch.rolled.texts
    for row in (0, 9, 20):
        tokens = batch.rolled.tokens_RT[row][batch.rolled.mask_RT[row]]
        prefix = batch.rolled.prefix[int(batch.rolled.group_R[row])]
        assert prefix == policy.encode_prompt(PROMPTS[row // 8].text) + policy.encode_suffix(None)
        ids = torch.tensor([[*prefix, *tokens.tolist()]])
        with torch.no_grad(), policy.reference() as base:
            hidden = base.body(input_ids=ids, use_cache=False).last_hidden_state[0]
        logp = F.log_softmax(base.logits(hidden[-len(tokens) - 1 : -1]), -1)
        wanted = logp.gather(1, tokens[:, None])[:, 0]
        got = batch.rolled.logp_RT[row][batch.rolled.mask_RT[row]]
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


# --- saving ------------------------------------------------------------------------------------


def test_a_saved_guide_comes_back_and_the_folder_is_the_guide_at_equal_weights(policy, tmp_path):
    policy.save(tmp_path / "policy")
    config = parm_config()
    back = load_policy(config.policy, config.names, seed=9, trained=tmp_path / "policy")
    for mine, its in zip(policy.trainable, back.trainable, strict=True):
        torch.testing.assert_close(its, mine, rtol=0, atol=0)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad(), policy.adapter.at(torch.tensor(EVEN)):
        hidden = policy.network.body(input_ids=ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(
            whole(input_ids=ids).logits, policy.network.logits(hidden), rtol=0, atol=1e-4
        )


def test_another_model_s_factors_are_refused(policy, tmp_path):
    config = parm_config()
    with pytest.raises(ValueError, match=r"no factors of a guide"):
        load_policy(config.policy, config.names, trained=tmp_path)
    (tmp_path / GUIDE).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"no factors of a guide"):
        load_policy(config.policy, config.names, trained=tmp_path)
    policy.adapter.save(tmp_path / GUIDE)
    wider = parm_config(policy={"lora_rank": 5})
    with pytest.raises(ValueError, match=r"a1 is \(4, \d+\) there and \(5, \d+\) here"):
        load_policy(wider.policy, wider.names, trained=tmp_path)
    held = load_file(tmp_path / GUIDE)
    name = next(iter(held))
    save_file({k: v for k, v in held.items() if k != name}, tmp_path / GUIDE)
    with pytest.raises(ValueError, match=rf"{name} is missing there"):
        load_policy(config.policy, config.names, trained=tmp_path)


# --- whole runs --------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_three_objectives(tmp_path):
    config = parm_config(
        objectives=[f"{n}=world:{f}" for n, f in zip("abc", FUNCTIONS, strict=True)],
        score={"utopia": [1.1] * 3},
        meta={"steps": 1},
    )
    trainer = Trainer(config, tmp_path / "run")
    assert trainer.train()
    assert all(layer.p.shape == (4, 4, 3) for layer in trainer.policy.adapter.layers.values())
    policy, guides = load_served(tmp_path / "run", config)
    w = (0.2, 0.3, 0.5)
    with guides.at(policy, w):
        out = rollout(policy, [Request(PROMPTS[0], w)], max_new_tokens=4, temperature=1.0, seed=0)
    assert out.logp_RT.isfinite().all()


@pytest.mark.usefixtures("one_thread")
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    config = parm_config(meta={"steps": 3}, checkpoint_every=1, grpo={"recompute": True})
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    assert Trainer(config, straight).train()
    stopped(config, halves)
    assert Trainer(config, halves, resume=True).train()
    assert_same_runs(halves, straight)
    assert (halves / "policy" / GUIDE).is_file()
    rows = updates(straight)
    assert len(rows) == 12 and rows[0]["loss"] > 0 and any(row["grad_norm"] > 0 for row in rows)
    held = json.loads((straight / "config.json").read_text())
    assert held["policy"]["tuning"] == "bilinear" and held["policy"]["preference_text"] == "none"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`tiny --recipe parm` from the command line, with its evaluation."""
    folder = tmp_path_factory.mktemp("parm") / "run"
    assert train_here("tiny", "--recipe", "parm", "--out", str(folder)) == 0
    return folder


def test_an_evaluated_run_has_the_guided_answers_of_every_weight(run):
    result = json.loads((run / "evaluation.json").read_text())
    assert (run / "report.html").is_file()
    config = read_config(run)
    policy = load_policy(config.policy, config.names, trained=run / "policy")
    weights = [tuple(w) for w in result["weights"]]
    by_id = {p["id"]: Prompt(p["id"], p["text"]) for p in result["prompts"]}
    options = {"max_new_tokens": 6, "temperature": 0.0, "seed": config.seed}
    for model in ("base", "policy"):
        for answer in (a for a in result["answers"] if a["model"] == model):
            w = tuple(answer["w"])
            requests = [Request(by_id[answer["prompt"]], w)]
            if model == "base":
                with policy.reference() as base:
                    (text,) = rollout(policy, requests, network=base, **options).texts
            else:
                with guided(policy, w, config.parm.beta):
                    (text,) = rollout(policy, requests, **options).texts
            assert text == answer["text"] and w in weights
    entry = result["results"]["policy"]["sampled"]
    assert entry["answers"] == len(by_id) * len(weights) * config.evaluation.samples
    # each prompt once for every guide
    prefill = sum(
        len(policy.encode_prompt(p.text) + policy.encode_suffix(None)) for p in by_id.values()
    )
    assert result["results"]["policy"]["greedy"]["prefill_tokens"] == len(weights) * prefill


def test_chat_is_guided(run, capsys):
    config = read_config(run)
    policy = load_policy(config.policy, config.names, trained=run / "policy")
    for w in ((1.0, 0.0), (0.25, 0.75)):
        asked = f"first={w[0]},second={w[1]}"
        chat([str(run), "--w", asked, "--prompt", "Write a new song.", "--temperature", "0",
              "--max-new-tokens", "6"])  # fmt: skip
        with guided(policy, w, config.parm.beta):
            out = rollout(
                policy,
                [Request(Prompt("x", "Write a new song."), w)],
                max_new_tokens=6,
                temperature=0.0,
                seed=0,
            )
        assert capsys.readouterr().out == out.texts[0].strip() + "\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--parm.beta", "0"], ("parm.beta=0.0", "positive")),
        (["--parm.beta_r", "-1"], ("parm.beta_r=-1.0", "positive")),
        (["--parm.alpha", "0"], ("parm.alpha=0.0", "positive")),
        (["--rollout.samples", "3"], ("rollout.samples=3", "'parm'", "even")),
        (["--policy.tuning", "full"], ("policy.tuning='full'", "'bilinear'", "leave it out")),
        (["--policy.preference_text", "bar"], ("policy.preference_text='bar'", "leave it out")),
        (["--recipe", "grid-grpo", "--parm.beta", "2"], ("parm.beta=2.0", "or use parm")),
        (["--recipe", "grid-grpo", "--policy.tuning", "bilinear"], ("'bilinear'", "'parm'")),
    ],
)
def test_bad_input_is_one_line_before_anything_runs(capfd, tmp_path, flags, words):
    refused(capfd, ["tiny", "--recipe", "parm", *flags, "--out", str(tmp_path / "x")], *words)
