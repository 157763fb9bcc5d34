"""What the cost model counts, against hand arithmetic and against what torch and PEFT make."""

import dataclasses
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from meal_fast.config import from_dict, preset
from meal_fast.config.cost import cost, held_sums, summed_bytes
from meal_fast.config.cost_memory import trained_numbers
from meal_fast.config.hardware import CARDS, Card, Shares, card_named
from meal_fast.config.mesh import Layout, layout
from meal_fast.config.model_shape import MODELS, reward_shape, shape_from, shape_of
from meal_fast.config.workload import work_of
from meal_fast.training.tree_sum import TreeSum, nodes

SMALL = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Every peak and every share is a round number, so that a reader can follow.
PLAIN = Shares(
    learn=1.0, prefill=1.0, decode=1.0, read=1.0, link=1.0, launch=0.0, push=1.0, hop=0.0
)
CARD = Card("plain", 1e15, 1e9, 1e9, 1e9, 1e9, 1e6, 1e6, 8, 0.0, half=True, shares=PLAIN)


def found(options=None, laid=None, *, model="packaged:smollm2-135m", card=CARD, lengths=(64, 16)):
    config = from_dict(options or {}, preset("quickstart"))
    return cost(work_of(config, *lengths), shape_of(model), card, laid or Layout())


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
@pytest.mark.parametrize("more", [{}, {"tie_word_embeddings": True}, {"head_dim": 8}])
def test_parameters_are_those_that_transformers_builds(kind, more, tmp_path):
    settings = kind(**SMALL, **more)
    model = AutoModelForCausalLM.from_config(settings)
    wanted = sum(p.numel() for p in model.parameters())
    counted = shape_from("x", settings.to_dict())
    assert counted.parameters == wanted
    model.save_pretrained(tmp_path)  # from the heads of its files, without a formula
    read = dataclasses.replace(shape_of(str(tmp_path)), name="x")
    assert read == counted and read.parameters == wanted


def test_biases_of_a_llama_are_counted():
    settings = LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True)
    model = AutoModelForCausalLM.from_config(settings)
    counted = shape_from("x", settings.to_dict())
    assert counted.parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["0.5B", "7B", "70B", "packaged:smollm2-135m"])
def test_the_built_in_sizes_are_those_of_the_models(name):
    kind = {"qwen2": Qwen2Config, "llama": LlamaConfig}[MODELS[name]["model_type"]]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(kind(**MODELS[name]))
    shape = shape_of(name)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    linear = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert shape.linear == sum(m.weight.numel() for m in linear)
    assert shape.linears == len(linear)


@pytest.fixture(scope="module")
def tiny():
    from meal_fast.models.policy import load_policy

    config = preset("tiny")
    return {
        how: load_policy(
            dataclasses.replace(config.policy, tuning=how, lora_rank=4), ("first", "second")
        )
        for how in ("lora", "full", "bilinear")
    }


@pytest.mark.parametrize("how", ["lora", "full", "bilinear"])
def test_what_is_trained_is_what_the_policy_trains(tiny, how):
    changes = {"policy": {"tuning": how, "lora_rank": 4}}
    changes |= {"recipe": "parm"} if how == "bilinear" else {}
    work = work_of(from_dict(changes, preset("tiny")))
    shape = shape_of("world:tiny")
    assert shape.parameters == sum(p.numel() for p in tiny["full"].model.parameters())
    trained = list(tiny[how].trainable)
    assert trained_numbers(work, shape) == sum(p.numel() for p in trained)
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moments = sum(s[n].nbytes for s in optimizer.state.values() for n in ("exp_avg", "exp_avg_sq"))
    held = cost(work, shape, CARDS["cpu"], Layout()).memory.phases
    assert held["always"]["Adam's moments"] == moments
    assert held["to learn"]["gradients"] == sum(p.grad.nbytes for p in trained)
    for p in trained:
        p.grad = None


@pytest.mark.parametrize("tasks", range(1, 17))
def test_sums_of_tasks_are_those_that_the_tree_holds(tasks):
    tree, most = TreeSum(tasks), 0
    for number in range(tasks):
        most = max(most, len(tree.held))  # while this task learns
        tree.add(number, [torch.zeros(1)])
    config = from_dict({"meta": {"tasks": tasks}}, preset("tiny"))
    got = cost(work_of(config), shape_of("world:tiny"), CARDS["cpu"], Layout())
    n = got.memory.trained
    assert got.memory.phases["always"].get("sums of deltas and v", 0) == 8 * n * most


def test_lora_s_factors_of_smollm2_by_hand():
    # q 576 + 576, k and v 576 + 192, o 576 + 576, gate and up 576 + 1536, down 1536 + 576
    sides = 1152 + 2 * 768 + 1152 + 3 * 2112
    assert shape_of("packaged:smollm2-135m").lora(16) == 16 * 30 * sides == 4_884_480


def test_seconds_of_learning_by_hand():
    options = {"grpo": {"beta": 0.0, "keep": 0}, "policy": {"dtype": "bfloat16"}}
    got = found(options, lengths=(64, 16))
    # 4 prompts x 2 preferences, 8 answers of 16 tokens each
    tokens, sampled = 8 * (64 + 8 * 16), 8 * 8 * 16
    attention = 4 * 40 * 9 * 64 * 30
    body = 2 * (2 * 106_168_320 + attention) + 6 * 4_884_480
    head = 2 * 2 * 49152 * 576
    adam = 28 * 4_884_480 / 1e9
    update = (tokens * body + sampled * head) / 1e9 + adam
    assert got.seconds["learn"] == pytest.approx(2 * update)  # n_inner 2, one task


def test_what_adds_passes():
    base = {"grpo": {"beta": 0.0, "keep": 0}}
    learn = {
        name: found(base | {"grpo": base["grpo"] | options}).seconds["learn"]
        for name, options in {
            "plain": {},
            "reference": {"beta": 0.1},
            "recompute": {"recompute": True},
            "twice": {"epochs": 2},
            "half": {"keep": 4},
        }.items()
    }
    assert learn["twice"] == pytest.approx(2 * learn["plain"])
    assert learn["half"] < learn["plain"] < learn["recompute"] < learn["reference"]
    # Forward and back are as much each: a third pass is half of both, and no Adam.
    assert learn["reference"] == pytest.approx(1.5 * learn["plain"], rel=0.07)


def test_seconds_of_sampling_are_of_reading_or_of_products():
    slow_memory = dataclasses.replace(
        CARD, bandwidth=1e6, flops=1e29, flops_full=1e29, flops_exact=1e29
    )
    got = found(card=slow_memory, lengths=(64, 16))
    # 64 rows at a time: weights once a step, keys and values of each row, its logits
    kv = 2 * 30 * 3 * 64
    step = 2 * (106_168_320 + 49152 * 576 + 64 * kv * 72) + 16 * 64 * 49152
    assert got.seconds["rollout"] == pytest.approx(2 * 16 * step / 1e6)
    quick_memory = dataclasses.replace(CARD, bandwidth=1e29)
    got = found(card=quick_memory, lengths=(64, 16))
    prefill = 4 * 64 * (2 * 106_168_320 + 4 * 32 * 576 * 30)
    products = 2 * (106_168_320 + 49152 * 576) + 2 * 4_884_480 + 4 * 72 * 576 * 30
    assert got.seconds["rollout"] == pytest.approx(2 * (prefill + 16 * 64 * products) / 1e9)


def test_seconds_of_rewards_by_hand():
    linear = 6 * 12 * 384 * 384  # BERT of six layers, four of D x D and two of D x 4 D a layer
    assert reward_shape("packaged:harmless").linear == linear
    got = found(lengths=(64, 16))
    assert got.seconds["reward"] == pytest.approx(2 * 2 * 2 * linear * 64 * 80 / 1e9)


def test_products_are_of_the_type_that_the_policy_has():
    """float32 weights of reward models are rounded where the policy's are, and not otherwise."""
    card = dataclasses.replace(CARD, flops=8e9, flops_full=4e9, flops_exact=1e9)
    seconds = {}
    for how, dtype in (("lora", "auto"), ("full", "auto"), ("lora", "float32")):
        options = {"policy": {"tuning": how, "dtype": dtype}}
        seconds[how, dtype] = found(options, card=card).seconds
    exact, rounded, plain = seconds.values()
    assert exact["reward"] == plain["reward"] == pytest.approx(4 * rounded["reward"])
    assert plain["learn"] > 6 * exact["learn"]


def test_sums_are_held_and_sent_as_the_tree_does_it():
    for count in range(1, 20):
        for start in range(count):
            for stop in range(start, count + 1):
                own = range(start, stop)
                assert held_sums(own, count) == len(nodes(own, count)), (own, count)
    # Two processes with a sum each send half of it twice; of three tasks, two hold one sum.
    assert summed_bytes(100, [range(0, 1), range(1, 2)], 2) == 100
    assert summed_bytes(100, [range(0, 1), range(1, 3)], 3) == (2 + 3) / 2 * 50
    assert summed_bytes(100, [range(0, 4)], 4) == 0


def test_bytes_on_the_wire_by_hand():
    n = 4_884_480
    options = {"recipe": "weighted-meta-grpo", "meta": {"tasks": 4, "n_inner": 3}}
    two = found(options, Layout(2))
    assert two.wire["deltas between groups"] == 8 * n == two.floor  # one delta and v
    assert two.wire["gradients, in a group"] == 0
    shared = found(options, Layout(1, 2, 1, 2))
    assert shared.wire["gradients, in a group"] == 4 * 3 * 4 * n  # of 12 updates
    assert shared.wire["deltas between groups"] == 0
    reset = found(options | {"meta": options["meta"] | {"adam": "reset"}}, Layout(2))
    assert reset.wire["deltas between groups"] == 4 * n
    joint = found({"recipe": "weighted-grpo"}, Layout(1, 2, 1, 2))
    assert joint.wire["deltas between groups"] == 0
    assert two.checkpoint == 12 * n


def test_shards_gather_what_they_do_not_hold():
    options = {"policy": {"tuning": "full"}, "grpo": {"micro_tokens": 1 << 20}}
    got = found(options, Layout(1, 1, 4, 4))
    p = shape_of("packaged:smollm2-135m").parameters
    updates = 2
    # Forward, back, the reference's and the gradients, float32: three quarters come from others.
    shards = updates * 0.75 * 4 * 4 * p
    assert got.wire["weights and gradients of shards"] == pytest.approx(shards)
    assert got.wire["weights to the sampler"] == pytest.approx(updates * 0.75 * 4 * p)
    assert got.memory.phases["always"]["weights"] == p
    assert got.memory.phases["to sample"]["the sampler's sum"] == 4 * p


LAYOUTS = [(g, d, s) for g in (1, 2, 4) for d in (1, 2, 4) for s in (1, 2, 4)]


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("card", ["h100", "cpu"])
def test_more_cards_are_never_slower_nor_hold_more(tuning, card):
    """Along each side of the mesh: what is always held, and the seconds of a card's own work."""
    options = {
        "policy": {"tuning": tuning},
        "rollout": {"prompts": 16},
        "meta": {"tasks": 4, "n_inner": 2},
    }
    # One card's sizes, so that what follows from free memory stays.
    options["grpo"] = {"micro_tokens": 2048}
    at = {
        laid: found(options, Layout(*laid, laid[1] * laid[2]), card=CARDS[card]) for laid in LAYOUTS
    }
    own = ("rollout", "reward", "learn")
    compared = 0
    for laid, less in at.items():
        for side in range(3):
            bigger = tuple(2 * x if i == side else x for i, x in enumerate(laid))
            if bigger not in at:
                continue
            more, compared = at[bigger], compared + 1
            for part in own:
                assert more.seconds[part] <= less.seconds[part] * (1 + 1e-9), (laid, bigger, part)
            held = [sum(x.memory.phases["always"].values()) for x in (less, more)]
            # Shards of a model that was whole: to sample, it is put together beside them.
            assert held[1] <= held[0] or (side == 2 and laid[2] == 1), (laid, bigger)
            kept = [x.memory.phases["to learn"]["activations"] for x in (less, more)]
            assert kept[1] <= kept[0]
    assert compared == 3 * 2 * 9


@pytest.mark.parametrize("card", list(CARDS))
@pytest.mark.parametrize("name", ["quickstart", "hh-qwen2", "concave-front"])
def test_every_figure_is_finite_and_none_is_negative(card, name):
    config = preset(name)
    got = cost(work_of(config), shape_of(config.policy.path), CARDS[card], layout(config, 1))
    numbers = [*got.wire.values(), *got.seconds.values(), got.checkpoint, got.tokens_per_second]
    numbers += [x for part in got.memory.phases.values() for x in part.values()]
    assert all(math.isfinite(x) and x >= 0 for x in numbers)
    assert got.memory.least <= got.memory.most and got.total > 0


def test_a_card_of_one_s_own_needs_its_figures():
    with pytest.raises(ValueError, match=r"card='b300'.*--card-memory"):
        card_named("b300")
    own = card_named("b300", memory=288e9, flops=2.5e15, bandwidth=8e12)
    assert own.flops_full == pytest.approx(1.25e15, rel=0.01) and own.node == 8
    half = card_named("h100", flops=494.5e12)
    assert half.flops_full == pytest.approx(CARDS["h100"].flops_full / 2)
    for wrong in ({"memory": 0.0}, {"bandwidth": -1.0}, {"flops": math.nan}, {"node": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            card_named("h100", **wrong)


def test_links_are_of_a_node_or_between_nodes():
    card = CARDS["h100"]
    assert card.between(8) == pytest.approx(0.7 * 450e9)
    assert card.between(9) == pytest.approx(0.7 * 50e9)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_type": "llama"}, "width=None"),
        (SMALL | {"model_type": "gpt_neox"}, "counted from its"),
        (SMALL | {"model_type": "llama", "num_hidden_layers": -1}, "layers=-1"),
        (SMALL | {"model_type": "mixtral", "num_local_experts": 8}, "experts=8"),
    ],
)
def test_a_config_that_does_not_say_it_is_refused(settings, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=said):
        shape_of(str(tmp_path))


def test_a_damaged_file_of_weights_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"model_type": "llama"}))
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0no head at all.")
    with pytest.raises(ValueError, match=r"model\.safetensors.*is no safetensors file"):
        shape_of(str(tmp_path))


def test_a_model_of_the_hub_is_found_where_its_library_keeps_it(tmp_path, monkeypatch):
    folder = tmp_path / "models--org--name" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SMALL | {"model_type": "llama"}))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert shape_of("org/name").layers == 3
    with pytest.raises(ValueError, match=r"its config\.json is not here"):
        shape_of("org/other")


def test_what_is_not_known_of_rewards_is_said():
    assert reward_shape("some/reward-model") is None
    assert reward_shape("meal_fast.data.measures:brief").parameters == 0
    assert reward_shape("https://localhost:1/x").parameters == 0
    work = work_of(from_dict({"objectives": ["a=some/reward-model", "b=packaged:harmless"]}))
    assert work.unknown == ("a",) and len(work.rewards) == 1


def test_lengths_that_cannot_be_are_refused():
    config = preset("quickstart")
    for lengths, said in (
        ((0, 4), "prompt-tokens"),
        ((4, 99), "response-tokens"),
        ((math.nan, 4), "prompt"),
    ):
        with pytest.raises(ValueError, match=said):
            work_of(config, *lengths)
