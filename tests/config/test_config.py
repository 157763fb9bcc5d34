"""Every check of config.py, from Python, from a TOML file, and the presets."""

import dataclasses
import json

import pytest

from meal_fast.config import config as c
from meal_fast.config.config import Config, from_dict, load_toml, to_dict
from meal_fast.config.presets import PRESETS, preset
from meal_fast.data.preferences import lattice

# (section, option, a value that is refused)
REFUSED = [
    ("policy", "lora_rank", 0),
    ("policy", "lora_alpha", 0),
    ("prompts", "train", ""),
    ("prompts", "max_tokens", 0),
    ("preference", "alpha", 0.0),
    ("preference", "grid", 1),
    ("preference", "grid", -2),
    ("preference", "models", 1),
    ("rollout", "prompts", 0),
    ("rollout", "samples", 1),
    ("rollout", "max_new_tokens", 0),
    ("rollout", "temperature", 0.0),
    ("score", "mu", 0.0),
    ("score", "calibration", 1),
    ("grpo", "lr", 0.0),
    ("grpo", "weight_decay", -0.1),
    ("grpo", "beta", -0.1),
    ("grpo", "clip_low", -0.1),
    ("grpo", "keep", -1),
    ("grpo", "clip_low", 1.0),
    ("grpo", "clip_high", -0.1),
    ("grpo", "max_grad_norm", -1.0),
    ("grpo", "epochs", 0),
    ("grpo", "micro_tokens", -1),
    ("meta", "steps", 0),
    ("meta", "tasks", 0),
    ("meta", "n_inner", 0),
    ("meta", "epsilon", 0.0),
    ("meta", "max_delta", -1.0),
    ("evaluation", "prompts", 0),
    ("evaluation", "samples", 0),
    ("evaluation", "grid", 1),
]


@pytest.mark.parametrize(("section", "option", "value"), REFUSED)
def test_a_value_out_of_range_is_refused(section, option, value):
    with pytest.raises(ValueError, match=rf"^{section}\.{option}={value!r}: .+"):
        from_dict({section: {option: value}})


@pytest.mark.parametrize(
    ("section", "option"), sorted({(s, o) for s, o, value in REFUSED if isinstance(value, float)})
)
def test_a_nan_is_refused_from_python_too(section, option):
    kind = type(getattr(Config(), section))
    with pytest.raises(ValueError, match=rf"{section}\.{option}=nan"):
        kind(**{option: float("nan")})


def test_full_parameters_need_float32():
    with pytest.raises(ValueError, match=r"policy\.dtype='bfloat16'.*float32"):
        c.PolicyConfig(tuning="full", dtype="bfloat16")
    assert c.PolicyConfig(tuning="lora", dtype="bfloat16").dtype == "bfloat16"
    assert c.PolicyConfig(tuning="full", dtype="tfloat32").dtype == "tfloat32"


def test_utopia_is_finite_and_one_number_per_objective():
    with pytest.raises(ValueError, match=r"score\.utopia=.*not finite"):
        c.ScoreConfig(utopia=(1.0, float("inf")))
    with pytest.raises(ValueError, match=r"score\.utopia=.*2 numbers"):
        from_dict({"score": {"utopia": [1.0]}})
    assert from_dict({"score": {"utopia": [1, 2]}}).score.utopia == (1.0, 2.0)


@pytest.mark.parametrize(
    ("objectives", "words"),
    [
        (["a=m:f"], "two or more"),
        (["a=m:f", "m:g"], "NAME=SOURCE"),
        (["a=m:f", "a=m:g"], "names must differ"),
        (["a b=m:f", "c=m:g"], "plain words"),
        (["=m:f", "c=m:g"], "plain words"),
    ],
)
def test_objectives_are_two_or_more_named_sources(objectives, words):
    with pytest.raises(ValueError, match=f"^objectives=.*{words}"):
        from_dict({"objectives": objectives})


def test_names_keep_the_order_and_the_source_its_equals_signs():
    config = from_dict({"objectives": ["b=m:f", "a=m:g?x=1", "c=m:h"]})
    assert config.names == ("b", "a", "c")


def test_reptile_needs_two_inner_updates():
    with pytest.raises(ValueError, match=r"meta\.n_inner=1: .*without an outer loop"):
        from_dict({"meta": {"n_inner": 1}})
    joint = from_dict({"recipe": "weighted-grpo", "meta": {"n_inner": 1}})
    assert joint.meta.n_inner == 1


THREE = ["a=m:f", "b=m:g", "c=m:h"]


@pytest.mark.parametrize(
    ("values", "tasks"),
    [
        ({"recipe": "rewarded-soups"}, 2),
        ({"recipe": "rewarded-soups", "objectives": THREE}, 3),
        ({"recipe": "morlhf"}, 3),
        ({"recipe": "morlhf", "preference": {"models": 11}}, 11),
        ({"recipe": "morlhf", "objectives": THREE, "preference": {"models": 4}}, 10),
    ],
)
def test_recipes_of_several_models_settle_tasks_and_text(values, tasks):
    """A task is a model, and no model reads a preference: config.json says so, and reads back."""
    for base in (Config(), preset("hh-qwen2"), preset("steering")):
        config = from_dict(values, base)
        assert (config.meta.tasks, config.policy.preference_text) == (tasks, "none")
        assert len(lattice(len(config.names), config.model_points)) == tasks
        assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert dataclasses.replace(Config(), recipe="rewarded-soups").meta.tasks == 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"meta": {"tasks": 3}}, r"^meta\.tasks=3: recipe rewarded-soups makes it 2.*leave it out"),
        ({"policy": {"preference_text": "bar"}}, r"^policy\.preference_text='bar': .*'none'"),
        (
            {"recipe": "grid-grpo", "policy": {"preference_text": "none"}},
            r"^policy\.preference_text='none': the policy of grid-grpo.*bar or numbers",
        ),
        ({"recipe": "grid-grpo", "meta": {}}, r"^policy\.preference_text='none'"),
    ],
)
def test_what_contradicts_a_recipe_of_several_models_is_refused(values, words):
    base = from_dict({"recipe": "rewarded-soups"})
    with pytest.raises(ValueError, match=words):
        from_dict(values, base)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sed": 1}, r"^sed=1: unknown option; known: recipe, seed"),
        ({"meta": {"step": 1}}, r"^meta\.step=1: unknown option; known: steps"),
        ({"meta": 3}, r"^meta=3: must be a table"),
        ({"recipe": "ppo"}, r"^recipe='ppo': .*weighted-meta-grpo"),
        ({"recipe": 3}, r"^recipe=3: must be a string"),
        (
            {"policy": {"dtype": "int8"}},
            r"^policy\.dtype='int8': choose from auto, float32, tf.*, bf",
        ),
        ({"meta": {"adam": "keep"}}, r"^meta\.adam='keep': choose from persist_v"),
        ({"meta": {"steps": 1.5}}, r"^meta\.steps=1\.5: must be a whole number"),
        ({"meta": {"steps": True}}, r"^meta\.steps=True: must be a whole number"),
        ({"meta": {"steps": "3"}}, r"^meta\.steps='3': must be a whole number"),
        ({"grpo": {"lr": "fast"}}, r"^grpo\.lr='fast': must be a finite number"),
        ({"grpo": {"lr": True}}, r"^grpo\.lr=True: must be a finite number"),
        ({"grpo": {"lr": float("inf")}}, r"^grpo\.lr=inf: must be a finite number"),
        ({"objectives": "a=b"}, r"^objectives='a=b': must be a list"),
        ({"objectives": [1, 2]}, r"^objectives=1: must be a string"),
        ({"score": {"utopia": [1, None]}}, r"^score\.utopia=None: must be a finite number"),
        ({"checkpoint_every": 0}, r"^checkpoint_every=0: "),
    ],
)
def test_from_dict_refuses(values, words):
    with pytest.raises(ValueError, match=words):
        from_dict(values)


def test_recipe_is_checked_from_python_too():
    with pytest.raises(ValueError, match="recipe='ppo': unknown"):
        Config(recipe="ppo")


def test_whole_numbers_serve_as_floats():
    lr = from_dict({"grpo": {"lr": 1}}).grpo.lr
    assert lr == 1.0 and isinstance(lr, float)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        (b"seed = 1 # caf\xe9", "not UTF-8"),
        ("seed = ", "not TOML"),
        ("[meta]\nsteps = 1\nsteps = 2\n", "not TOML"),
        ("[meta]\nstepz = 1\n", r"^meta\.stepz=1: unknown option"),
        ("[grpo]\nlr = nan\n", r"^grpo\.lr=nan: "),
    ],
)
def test_a_broken_file_is_refused(tmp_path, text, words):
    path = tmp_path / "run.toml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=words) as caught:
        load_toml(path, Config())
    if "=" not in words:
        assert str(path) in str(caught.value)


def test_a_file_changes_only_what_it_names(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('seed = 4\nobjectives = ["a=m:f", "b=m:g"]\n[grpo]\nbeta = 0\n')
    base = preset("hh-qwen2")
    config = load_toml(path, base)
    expected = dataclasses.replace(
        base, seed=4, objectives=("a=m:f", "b=m:g"), grpo=dataclasses.replace(base.grpo, beta=0.0)
    )
    assert config == expected and base.seed == 0


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"preset='quick': unknown; choose from quickstart"):
        preset("quick")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_json(name):
    config = preset(name)
    rebuilt = from_dict(json.loads(json.dumps(to_dict(config))))
    assert rebuilt == config
    # replace runs every __post_init__ again, so a preset cannot slip past a check.
    assert dataclasses.replace(config) == config


def test_hh_qwen2_is_the_published_experiment():
    """BPS's figures [P]; what it leaves open may change, these may not."""
    p = preset("hh-qwen2")
    assert p.recipe == "weighted-meta-grpo"
    assert (p.policy.path, p.policy.tuning) == ("Qwen/Qwen2-0.5B-Instruct", "full")
    assert (p.grpo.lr, p.grpo.beta, p.score.mu) == (1e-6, 0.1, 0.1)
    assert (p.rollout.temperature, p.rollout.prompts, p.preference.alpha) == (0.9, 2, 1.0)
    assert (p.meta.steps, p.meta.tasks, p.meta.epsilon) == (400, 2, 1.5)


def test_options_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1


def test_choices_of_a_literal_and_of_anything_else():
    assert c.choices_of("AdamMode") == ("persist_v", "reset", "per_preference")
    assert c.choices_of("Dtype") == ("auto", "float32", "tfloat32", "bfloat16")
    assert c.choices_of("float") == ()
