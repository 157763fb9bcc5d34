"""The worlds whose truth is known: that it is the truth, and that their policy is what it says."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from meal_fast import ops
from meal_fast.config.config import PolicyConfig
from meal_fast.data import toy
from meal_fast.data.assets import keys
from meal_fast.data.preferences import lattice
from meal_fast.models.policy import Policy, load_policy
from tests.helpers.processes import ROOT

SWEEP = lattice(2, 11)  # (1, 0), (0.9, 0.1), …, (0, 1)
TRUTH = toy.truth()
SCORES = [
    ("linear", 0.1),
    ("tchebycheff", 0.1),
    ("smooth-tchebycheff", 0.1),
    ("smooth-tchebycheff", 0.02),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return toy.build_world("concave-front", tmp_path_factory.mktemp("worlds"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def counts(responses):
    """How many a's and b's, of each different kind."""
    return {(y.count("a"), y.count("b")) for y in responses}


# ---- the front


def test_rewards_by_hand():
    said = ["aaaaaa", "aabbbb", "abc", "", "ccccccaaaa", "bbbbbbaa", "Anna"]
    prompts = ["?"] * len(said)
    third, half, two_thirds = (1 / 3) ** 1.5, (1 / 2) ** 1.5, (2 / 3) ** 1.5
    sixth = (1 / 6) ** 1.5
    assert toy.first(prompts, said) == pytest.approx([1, third, sixth, 0, 0, 0, sixth])
    assert toy.second(prompts, said) == pytest.approx([0, two_thirds, sixth, 0, 0, 1, 0])
    assert half == pytest.approx(0.35355339)  # the front's middle, as the module says


def test_enumeration_covers_every_text():
    """Any text, longer or shorter or of other letters, has the rewards of an enumerated one."""
    rng = np.random.default_rng(0)
    letters = list("abcABxyz é\n")
    texts = ["".join(rng.choice(letters, size=rng.integers(0, 10))) for _ in range(500)]
    rewards = zip(toy.first(texts, texts), toy.second(texts, texts), strict=True)
    known = {tuple(row) for row in TRUTH.reward_MK}
    assert set(rewards) <= known
    assert len(TRUTH.responses) == len(set(TRUTH.responses)) == 3**6


def test_the_front_is_what_has_no_c():
    on_front = {tuple(row) for row in TRUTH.front}
    for response, reward in zip(TRUTH.responses, TRUTH.reward_MK, strict=True):
        assert (tuple(reward) in on_front) == ("c" not in response), response
    assert len(TRUTH.front) == 7
    assert len(TRUTH.reward_MK) - sum("c" not in y for y in TRUTH.responses) == 729 - 64
    assert TRUTH.distance(np.array([[1.0, 0.0], [0.0, 0.0]])) == pytest.approx([0.0, 0.5])


def test_the_front_is_concave():
    """Every point between lies strictly below the chord of its neighbours, and of the two ends."""
    front = TRUTH.front
    for left, point, right in zip(front, front[1:], front[2:], strict=False):
        along = (point[0] - left[0]) / (right[0] - left[0])
        assert point[1] < left[1] + along * (right[1] - left[1]) - 1e-3
    assert (front[1:-1].sum(1) < 1.0 - 0.1).all()  # the ends' chord is r1 + r2 = 1


def test_a_stochastic_policy_lies_beyond_the_front():
    """The trap: mean rewards of a mixture are above the front, though each sample is on it."""
    samples = ["aaaaaa", "bbbbbb"] * 50
    each = np.array([toy.first(samples, samples), toy.second(samples, samples)]).T
    mean = each.mean(0)
    assert mean == pytest.approx([0.5, 0.5])
    middle = TRUTH.front[3]
    assert middle == pytest.approx([0.35355339, 0.35355339])
    assert (mean > middle).all()
    assert not any((point >= mean).all() for point in TRUTH.front)
    assert TRUTH.distance(mean[None])[0] > 0.2
    assert TRUTH.distance(each).max() == 0.0


# ---- what each score asks for


def test_linear_optima_are_always_an_end():
    for w in SWEEP:
        ends = {(6, 0)} if w[0] > w[1] else {(0, 6)} if w[0] < w[1] else {(6, 0), (0, 6)}
        assert counts(TRUTH.optimal("linear", w)) == ends


@pytest.mark.parametrize(
    ("score", "mu", "a_counts"),
    [
        ("tchebycheff", 0.1, [6, 6, 6, 5, 4, 3, 2, 1, 0, 0, 0]),
        ("smooth-tchebycheff", 0.02, [6, 6, 6, 5, 4, 3, 2, 1, 0, 0, 0]),
        ("smooth-tchebycheff", 0.1, [6, 6, 6, 6, 4, 3, 2, 0, 0, 0, 0]),
    ],
)
def test_tchebycheff_optima_over_the_sweep(score, mu, a_counts):
    for w, a in zip(SWEEP, a_counts, strict=True):
        assert counts(TRUTH.optimal(score, w, mu)) == {(a, 6 - a)}, w


def test_one_optimum_by_hand():
    """w = (0.6, 0.4): shortfalls w (1.1 - r) of 4 a's 0.3334, 0.3630; of 5 a's 0.2036, 0.4128."""
    w = (0.6, 0.4)
    points = np.array([[(4 / 6) ** 1.5, (2 / 6) ** 1.5], [(5 / 6) ** 1.5, (1 / 6) ** 1.5]])
    hard = toy.score_of(points, "tchebycheff", w)
    assert hard == pytest.approx([-0.36302, -0.41278], abs=1e-5)
    # -mu log(e^(0.3334/mu) + e^(0.3630/mu)) = -0.3630 - mu log(1 + e^(-0.0296/mu))
    soft = toy.score_of(points, "smooth-tchebycheff", w, 0.02)
    assert soft == pytest.approx([-0.36711, -0.41278], abs=1e-4)
    assert TRUTH.regret("aaaabb", "smooth-tchebycheff", w, 0.02) == 0.0
    assert TRUTH.regret("aaaaab", "smooth-tchebycheff", w, 0.02) == pytest.approx(0.0457, abs=1e-3)
    assert TRUTH.regret("cccccc", "smooth-tchebycheff", w, 0.02) > 0.25


def test_gaps_by_hand():
    linear, hard, soft, sharp = (TRUTH.largest_gap(score, mu) for score, mu in SCORES)
    assert linear == pytest.approx(2**0.5)  # from one end to the other: nothing in between
    # 6 and 4 a's: (1, 0) and (0.5443, 0.1925)
    assert soft == pytest.approx(np.hypot(1 - 0.54433, 0.19245), abs=1e-5)
    # all seven: the widest step is from 4 to 3 a's, (0.5443, 0.1925) and (0.3536, 0.3536)
    assert np.hypot(0.54433 - 0.35355, 0.35355 - 0.19245) == pytest.approx(0.24970, abs=1e-5)
    assert sharp == pytest.approx(0.24970, abs=1e-5) == hard
    assert linear > 2 * soft and soft > 1.5 * sharp


def test_no_optimum_is_nearly_a_tie():
    """The second best response of the sweep is behind by more than float32 training can blur."""
    for score, mu in SCORES[2:]:
        for w in SWEEP:
            values = np.unique(np.round(TRUTH.scores(score, w, mu), 9))
            assert values[-1] - values[-2] > 5e-3, (score, mu, w)


@pytest.mark.parametrize(("score", "mu"), SCORES)
def test_scores_agree_with_the_ops_that_train(score, mu):
    """Two derivations, one number: up to the constant of the linear score, none."""
    reward = torch.tensor(TRUTH.reward_MK)
    group = torch.zeros(len(reward), dtype=torch.int64)
    for w in SWEEP[::3]:
        trained, _ = ops.group_advantages(
            reward,
            torch.tensor(w, dtype=torch.float64),
            group,
            utopia=toy.UTOPIA,
            mu=mu,
            scalarization=score,
        )
        np.testing.assert_allclose(trained.numpy(), TRUTH.scores(score, w, mu), atol=1e-12)


def test_bad_names_and_values_are_refused():
    with pytest.raises(ValueError, match="score='quadratic'"):
        TRUTH.scores("quadratic", (0.5, 0.5))
    with pytest.raises(ValueError, match="mu=0"):
        TRUTH.scores("smooth-tchebycheff", (0.5, 0.5), 0)
    with pytest.raises(ValueError, match="world:flat: unknown; choose from concave-front, tiny"):
        toy.build_world("flat")
    with pytest.raises(ValueError, match="world:flat"):
        toy.world_prompts("flat", "train")


def test_prompts_of_the_worlds():
    assert toy.world_prompts("concave-front", "train") == ("Write six letters.",)
    train, held_out = (toy.world_prompts("tiny", split) for split in ("train", "evaluation"))
    assert len(set(train)) == len(train) >= 8 and len(held_out) >= 2
    assert not set(train) & set(held_out)


# ---- the policy


def test_the_folder_has_the_same_bytes_wherever_it_is_built(folder, tmp_path):
    threads = torch.get_num_threads()
    torch.manual_seed(9)  # the builder must neither use nor move the global generator
    before = torch.random.get_rng_state()
    torch.set_num_threads(3 if threads < 3 else 1)
    other = toy.build_world("concave-front", tmp_path)
    torch.set_num_threads(threads)
    assert torch.equal(torch.random.get_rng_state(), before)
    names = {p.name for p in folder.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= names
    assert names == {p.name for p in other.iterdir()}
    for name in names:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name


def test_a_world_is_built_once_and_again_when_it_changes(tmp_path, monkeypatch):
    built = toy.build_world("tiny", tmp_path)
    stamp = (built / "model.safetensors").stat().st_mtime_ns
    assert toy.build_world("tiny", tmp_path) == built
    assert (built / "model.safetensors").stat().st_mtime_ns == stamp
    for library in ("1.0", "1.1"):  # another version of one of the libraries
        monkeypatch.setattr(keys.metadata, "version", lambda name, version=library: version)
        toy.build_world("tiny", tmp_path)
        assert (built / "model.safetensors").stat().st_mtime_ns != stamp
        stamp = (built / "model.safetensors").stat().st_mtime_ns
    manifest = json.loads((built / "manifest.json").read_text())
    assert manifest["key"]["libraries"]["tokenizers"] == "1.1"
    other_code = tmp_path / "code" / "data" / "toy.py"  # and another word in the code
    other_code.parent.mkdir(parents=True)
    other_code.write_text(Path(toy.__file__).read_text().replace("0.05 if", "0.06 if"))
    shutil.copy(Path(toy.__file__).with_name("preferences.py"), other_code.parent)
    shutil.copy(Path(toy.__file__).parents[1] / "data_types.py", other_code.parents[1])
    monkeypatch.setattr(toy, "__file__", str(other_code))
    toy.build_world("tiny", tmp_path)
    assert (built / "model.safetensors").stat().st_mtime_ns != stamp
    shutil.rmtree(other_code.parents[1])
    monkeypatch.undo()
    (built / "tokenizer.json").write_text("{}")  # a broken cache is seen by its sizes
    toy.build_world("tiny", tmp_path)
    assert json.loads((built / "tokenizer.json").read_text())["model"]["type"] == "BPE"
    assert [p.name for p in tmp_path.iterdir()] == ["tiny"]  # no temporary folder is left


def test_the_default_place_is_the_cache_and_this_session_s_is_new(tmp_path, monkeypatch):
    assert Path(tempfile.gettempdir()) in toy.build_world("tiny").parents
    monkeypatch.setenv("MEAL_FAST_CACHE", str(tmp_path))
    monkeypatch.delenv("MEAL_FAST_WORLDS")
    assert toy.build_world("tiny") == tmp_path / "worlds" / "tiny"


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_the_same_weights_whatever_the_cpu_can_do(folder, tmp_path, capability):
    """torch's paths for older CPUs are chosen when it is loaded; what is not there is passed by."""
    code = "import pathlib, sys; from meal_fast.data import toy; "
    code += "toy.build_world('tiny', pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", code, tmp_path], env=environment, check=True, cwd=ROOT)
    weights = "model.safetensors"
    assert (tmp_path / "tiny" / weights).read_bytes() == (folder / weights).read_bytes()


def test_the_model_is_small_tied_and_float32(model):
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size) == (2, 32)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.num_parameters() < 50_000


@pytest.mark.parametrize(
    "text",
    ["Write six letters.", "aabbcc", " tabs\tand  spaces \n\n", "naïve 東京 🙂", "x=0.80y", ""],
)
def test_any_text_comes_back_whole(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokens_of_a_conversation(tokenizer):
    """Short, each preference a token of its own, the letters of a response single."""
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Write six letters. [first=0.80 second=0.20]"},
    ]
    said = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    user = "<|im_start|>user\nWrite six letters. [first=0.80 second=0.20]<|im_end|>\n"
    assert said == f"<|im_start|>system\nBe brief.<|im_end|>\n{user}<|im_start|>assistant\n"
    said = tokenizer.apply_chat_template(messages[1:], tokenize=False, add_generation_prompt=True)
    assert said == f"{user}<|im_start|>assistant\n"  # no system line unless asked for
    tokens = tokenizer.tokenize(said, add_special_tokens=False)
    assert {"first=0.80", "second=0.20", "user", "assistant"} <= {t.strip("Ġ") for t in tokens}
    assert len(tokens) < 20
    ids = {tokenizer.tokenize(f"[first={a:.2f} second={b:.2f}]")[1] for a, b in SWEEP}
    assert len(ids) == 11
    assert tokenizer.tokenize("abcaabbcc") == list("abcaabbcc")
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.bos_token == "<|im_start|>"


def test_every_preference_and_prompt_splits_where_the_policy_splits_it(folder):
    """`Policy` tokenises the prompt and the rest apart: it must be the tokens of the whole."""
    for name in ("tiny", "concave-front"):
        config = PolicyConfig(
            path=str(folder), tuning="full", preference_text="numbers", device="cpu"
        )
        policy = load_policy(config, toy.OBJECTIVES)
        for text in toy.world_prompts(name, "train"):
            for w in SWEEP:
                apart = policy.encode_prompt(text) + policy.encode_suffix(w)
                assert list(apart) == whole(policy, text, w)


def whole(policy: Policy, text, w):
    content = f"{text} [first={w[0]:.2f} second={w[1]:.2f}]"
    return policy.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=True
    )["input_ids"]


def test_the_policy_babbles_its_letters(model, tokenizer):
    """Most of what it samples at first are a's, b's and c's, none rare: it has what to compare."""
    said = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Write six letters. [first=0.50 second=0.50]"}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )["input_ids"]
    torch.manual_seed(0)
    out = model.generate(said, do_sample=True, max_new_tokens=6, num_return_sequences=256, top_k=0)[
        :, said.shape[1] :
    ]
    letters = tokenizer.convert_tokens_to_ids(list("abc"))
    share = [float((out == letter).float().mean()) for letter in letters]
    assert min(share) > 0.08 and sum(share) > 0.5
